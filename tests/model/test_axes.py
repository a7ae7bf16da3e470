"""Every dimension has a sharding rule, and no rule cuts inside a K/V head."""

import itertools

import pytest
from flax.linen import partitioning as nn_partitioning
from t5x import partitioning

from gqa_t5x.model import axes

NAMES = [
  value
  for name, value in vars(axes).items()
  if name.isupper() and isinstance(value, str)
]


def rules(num_kv_heads, num_partitions, kv_sharding=None, dimensions=(1, 1)):
  return partitioning.standard_logical_axis_rules(
    *dimensions,
    additional_rules=axes.kv_head_rules(num_kv_heads, num_partitions, kv_sharding),
  )


def resolve(names, *args):
  """Returns the mesh axes as T5X's partitioner finds them, None for replicated."""
  return tuple(nn_partitioning.logical_to_mesh_axes(names, rules(*args)))


# What splits keys and values -> mesh axes of: the kernel; keys in training; keys that
# are kept; queries that meet them.
BOTH = ('data', 'model')
LAYOUTS = {
  'heads': (
    (None, 'model'),
    ('data', 'model', None, None),
    ('data', 'model', None, None),
    ('data', None, 'model', None),
  ),
  'batch': (
    (None, None),
    ('data', None, None, None),
    (BOTH, None, None, None),
    (BOTH, None, None, None),
  ),
  'replicated': (
    (None, None),
    ('data', None, None, None),
    ('data', None, None, None),
    ('data', None, 'model', None),
  ),
}


@pytest.mark.parametrize(
  ('num_kv_heads', 'num_partitions', 'kv_sharding', 'expected'),
  [
    (8, 2, None, 'heads'),
    (6, 4, None, 'batch'),
    (1, 1, None, 'heads'),
    (1, 2, None, 'batch'),
    (None, 8, None, 'heads'),
    # Overruled.
    (8, 8, 'heads', 'heads'),
    (8, 8, 'batch', 'batch'),
    (8, 8, 'replicated', 'replicated'),
    (1, 8, 'replicated', 'replicated'),
    (None, 8, 'heads', 'heads'),
  ],
)
def test_kv_head_rules(num_kv_heads, num_partitions, kv_sharding, expected):
  def resolved(*names):
    return resolve(names, num_kv_heads, num_partitions, kv_sharding)

  kernel, trained, kept, queries = LAYOUTS[expected]
  assert resolved('embed', 'joined_kv_heads') == kernel
  assert resolved('batch', 'kv_heads', 'length', 'kv') == trained
  assert resolved('cache_batch', 'kv_heads', 'length', 'kv') == kept
  assert resolved('cache_batch', 'length', 'cache_heads', 'kv') == queries
  # Layers with all heads are split over them whatever the others do.
  assert resolved('cache_batch', 'heads', 'length', 'kv') == LAYOUTS['heads'][2]
  assert resolved('cache_batch', 'length', 'heads', 'kv') == LAYOUTS['heads'][3]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((0, 1), 'num_kv_heads=0 and num_partitions=1 must both be at least 1.'),
    ((None, 0), 'num_kv_heads=None and num_partitions=0 must both be at least 1.'),
    (
      (4, 8, 'rows'),
      "kv_sharding='rows' is unknown; choose one of heads, batch, replicated.",
    ),
    (
      (6, 4, 'heads'),
      "kv_sharding='heads' would cut inside a head: num_kv_heads=6 is not divisible by"
      ' num_partitions=4; choose one of 1, 2, 3, 6 partitions, or'
      " kv_sharding='batch' or 'replicated'.",
    ),
    (
      (None, 8, 'batch'),
      "kv_sharding='batch' is for fewer key/value heads than query heads, and"
      ' num_kv_heads is None: give num_kv_heads, or no kv_sharding.',
    ),
  ],
)
def test_kv_head_rules_of_bad_input(arguments, message):
  with pytest.raises(ValueError) as error:
    axes.kv_head_rules(*arguments)
  assert str(error.value) == message


def test_no_head_is_cut():
  """Over all counts: a partition gets a whole number of K/V heads, or all of them."""
  for K, partitions in itertools.product(range(1, 17), range(1, 17)):
    _, mesh_axis = resolve(('embed', 'joined_kv_heads'), K, partitions)
    assert mesh_axis == (None if K % partitions else 'model')


def test_every_name_has_a_rule():
  for kv_sharding, *dimensions in itertools.product(LAYOUTS, (1, 2), (1, 2)):
    known = {name for name, _ in rules(2, 2, kv_sharding, dimensions)}
    assert len(NAMES) == 13
    assert set(NAMES) <= known
  assert list(axes.KV_SHARDINGS) == list(LAYOUTS)
