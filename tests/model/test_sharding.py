"""How every array is laid out over eight devices, and that no K and V are moved.

By hand in the tables: what splits keys and values, and the mesh axes of every parameter
and of everything that decoding keeps.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from jax.sharding import NamedSharding, PartitionSpec
from t5x import adafactor, models, utils

from gqa_t5x.decoding import generate, sampling
from gqa_t5x.model import network, sharding
from helpers import model_oracle as oracle
from helpers.sharding_cases import (
  CASES,
  COMPARED,
  DEVICES,
  EOS,
  RULE,
  B,
  H,
  N,
  S,
  T,
  batch,
  config,
  entered,
  partitioner,
  sharded_params,
  sharded_rows,
)

# --- Layouts ------------------------------------------------------------------

# End of a parameter's path -> mesh axes, 1-D and 2-D; `kv` is that of the K/V heads.
PARAMETERS = {
  r'token_embedder/embedding': (('model', None), ('model', 'data')),
  r'relpos_bias/rel_embedding': (('model', None), ('model', None)),
  r'(layer_)?norm/scale': ((None,), ('data',)),
  r'attention/query/kernel': ((None, 'model'), ('data', 'model')),
  r'encoder/.*/(key|value)/kernel': ((None, 'model'), ('data', 'model')),
  r'decoder/.*/(key|value)/kernel': ((None, 'kv'), ('data', 'kv')),
  r'attention/out/kernel': (('model', None), ('model', 'data')),
  r'mlp/wi_[01]/kernel': ((None, 'model'), ('data', 'model')),
  r'mlp/wo/kernel': (('model', None), ('model', 'data')),
  r'logits_dense/kernel': ((None, 'model'), ('data', 'model')),
}
KV_HEADS = {'heads': 'model', 'batch': None, 'replicated': None}
# Rows and heads of everything in `cache` and `encoded_kv`.
KEPT = {
  'heads': ('data', 'model'),
  'batch': (('data', 'model'), None),
  'replicated': ('data', None),
}


def expected_parameter(path: str, parameter_dims: int, kv: str | None):
  found = [rows for end, rows in PARAMETERS.items() if re.search(f'{end}$', path)]
  (row,) = found
  return tuple(kv if axis == 'kv' else axis for axis in row[parameter_dims - 1])


@functools.cache
def initializer(K, layout):
  """T5X's, of the model with its optimizer."""
  vocabulary = seqio.ByteVocabulary()
  model = models.EncoderDecoderModel(
    network.Transformer(config(K)), vocabulary, vocabulary, adafactor.Adafactor()
  )
  inputs = ('encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens')
  return utils.TrainStateInitializer(
    optimizer_def=model.optimizer_def,
    init_fn=model.get_initial_variables,
    input_shapes=dict.fromkeys(inputs, (B, T)),
    input_types=dict.fromkeys(inputs, jnp.int32),
    partitioner=layout,
  )


@pytest.mark.parametrize('parameter_dims', [1, 2])
@pytest.mark.parametrize(('K', 'num_partitions', 'kv_sharding'), CASES)
def test_parameters(K, num_partitions, kv_sharding, parameter_dims):
  layout = partitioner(K, num_partitions, kv_sharding, parameter_dims)
  kv = KV_HEADS[kv_sharding or RULE[K, num_partitions]]
  state = initializer(K, partitioner(K, 1)).global_train_state_shape
  got = oracle.flat(layout.get_mesh_axes(state).params)
  assert len(got) == 29
  assert {path: tuple(spec) for path, spec in got.items()} == {
    path: expected_parameter(path, parameter_dims, kv) for path in got
  }


def test_parameters_of_a_state():
  """The arrays themselves, and their share of a device."""
  K, num_partitions, parameter_dims = 2, 2, 2
  layout = partitioner(K, num_partitions, None, parameter_dims)
  state = initializer(K, layout).from_scratch(jax.random.PRNGKey(0))
  kv = KV_HEADS[RULE[K, num_partitions]]
  sizes = dict(layout.mesh.shape) | {None: 1}
  for path, array in oracle.flat(state.params).items():
    expected = expected_parameter(path, parameter_dims, kv)
    shape = tuple(n // sizes[axis] for n, axis in zip(array.shape, expected))  # noqa: B905
    assert array.addressable_shards[3].data.shape == shape, path


def is_laid_out(array, layout, rows, heads) -> bool:
  expected = NamedSharding(layout.mesh, PartitionSpec(rows, heads, None, None))
  return array.sharding.is_equivalent_to(expected, 4)


def kept_arrays(cfg, layout):
  """Everything that decoding keeps, after it is prepared and after a step, by path."""
  module = network.Transformer(cfg)
  params = sharded_params(cfg, layout)
  (inputs,) = sharded_rows(layout, batch()[0])
  with entered(layout):
    prepare = oracle.jit(functools.partial(generate.prepare, module), static_argnums=2)
    cache, kept = prepare(params, inputs, T)
    step = oracle.jit(functools.partial(generate.step, module), static_argnums=5)
    _, after = step(params, kept, cache, inputs, jnp.zeros(B, jnp.int32), T)
  collections = {'empty': cache, 'cache': after, 'encoded_kv': kept['encoded_kv']}
  flat = oracle.flat(collections)
  return {path: array for path, array in flat.items() if array.ndim == 4}


@pytest.mark.parametrize(('K', 'num_partitions', 'kv_sharding'), COMPARED)
def test_kept_keys_and_values(K, num_partitions, kv_sharding):
  layout = partitioner(K, num_partitions, kv_sharding)
  rows, heads = KEPT[kv_sharding or RULE[K, num_partitions]]
  got = kept_arrays(config(K), layout)
  assert len(got) == 6
  devices = dict(layout.mesh.shape) | {None: 1, ('data', 'model'): DEVICES}
  for path, array in got.items():
    assert array.shape[:2] == (B, K), path
    assert is_laid_out(array, layout, rows, heads), path
    assert array.addressable_shards[3].data.shape == (
      B // devices[rows],
      K // devices[heads],
      *array.shape[2:],
    )


def test_attention_kinds_of_one_model():
  """Multi-head self-attention is split over heads next to multi-query attention."""
  cfg, layout = config(1, self_attention_num_kv_heads=N), partitioner(1, 4)
  got = kept_arrays(cfg, layout)
  assert len(got) == 6
  for path, array in got.items():
    expected = KEPT['batch' if path.startswith('encoded_kv') else 'heads']
    assert is_laid_out(array, layout, *expected), path


# --- Communication ------------------------------------------------------------

COLLECTIVE = re.compile(
  r' = (?P<shapes>.*?) (?P<kind>all-gather|all-to-all|all-reduce|collective-permute'
  r'|reduce-scatter)(-start)?\('
)


def collectives(text: str) -> list[tuple[str, int]]:
  """The kind of each in a compiled program, and how many numbers a device gets."""
  found = []
  for match in filter(None, map(COLLECTIVE.search, text.splitlines())):
    shapes = re.findall(r'\w+\[([\d,]*)\]', match['shapes'])
    size = sum(math.prod(map(int, filter(None, s.split(',')))) for s in shapes)
    found.append((match['kind'], size))
  return found


# What splits keys and values -> all-to-alls of a layer's two attentions: queries go
# to where the rows are, and outputs back.
MOVES = {'heads': 0, 'batch': 4, 'replicated': 0}


@pytest.mark.parametrize(
  ('K', 'num_partitions', 'kv_sharding', 'platform'),
  [
    (8, 4, None, 'tpu'),
    (2, 4, None, 'tpu'),
    (1, 4, 'replicated', 'tpu'),
    (2, 4, None, 'cpu'),
  ],
)
def test_keys_and_values_stay_where_they_are(
  K, num_partitions, kv_sharding, platform, monkeypatch
):
  """In the compiled loop. On a CPU the kernels are transposed first."""
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  layout = partitioner(K, num_partitions, kv_sharding)
  mode = kv_sharding or RULE[K, num_partitions]
  cfg, length = config(K, num_decoder_layers=2), 40
  module = network.Transformer(cfg)
  rows = sharded_rows(layout, *(np.zeros((B, length), np.int32),) * 2)
  with entered(layout):
    lowered = oracle.jit(
      functools.partial(
        generate.generate, module, decode_fn=sampling.greedy, eos_id=EOS
      )
    ).lower(sharded_params(cfg, layout), *rows)
  found = collectives(lowered.compile().as_text())
  split = math.prod(
    dict(layout.mesh.shape).get(axis, 1)
    for axis in jax.tree.leaves(KEPT[mode])
    if axis is not None
  )
  smallest_kept = B * K * H * length // split
  moved = [size for kind, size in found if kind != 'all-reduce']
  assert max(moved) < smallest_kept
  assert len([kind for kind, _ in found if kind == 'all-to-all']) == 2 * MOVES[mode]
  # A layer: behind both attentions and the MLP.
  assert len([kind for kind, _ in found if kind == 'all-reduce']) >= 6


def test_moved_keys_are_seen():
  """What the test above would catch."""
  layout = partitioner(2, 2)
  (keys,) = sharded_rows(layout, np.ones((B, 2, H, S), np.float32))
  everywhere = NamedSharding(layout.mesh, PartitionSpec())
  text = jax.jit(lambda x: x + 1, out_shardings=everywhere).lower(keys).compile()
  assert collectives(text.as_text()) == [('all-gather', B * 2 * H * S)]
