"""The decode cache against arrays written out by hand.

What attention writes is in test_attention.py, at one place for all rows, and in
test_generate.py, at one for each; whole decodes with pending keys and values are in
test_golden.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gqa_t5x.model import decode_cache

# --- Positions and masks ------------------------------------------------------


class Decoder(nn.Module):
  """Asks for positions as the network's decoder does."""

  @nn.compact
  def __call__(self, *args):
    return decode_cache.advance(self, *args)


def advance(length, S=None, prefill_lengths=None, slots_of_cache=0, **cache):
  """Returns the positions of a call, and the counter after it."""
  cache = {name: jnp.asarray(value) for name, value in cache.items()}
  if cache:
    cache['layer'] = {'cached_value': jnp.zeros((1, 1, slots_of_cache, 1))}
  at, variables = Decoder().apply(
    {'cache': cache}, length, S, prefill_lengths, mutable=['cache']
  )
  return at, variables['cache']['cache_index']


@pytest.mark.parametrize(
  ('index', 'length', 'expected'),
  [
    (3, 2, [[3, 4]]),
    ([2, 0, 3], 2, [[2, 3], [0, 1], [3, 4]]),
    ([[4, 1], [0, 3]], 1, [[4], [1], [0], [3]]),
  ],
)
def test_positions_of_new_tokens(index, length, expected):
  at, counter = advance(length, 5, cache_index=index, slots_of_cache=5)
  assert at.queries_BT.dtype == jnp.int32
  np.testing.assert_array_equal(at.queries_BT, expected)
  np.testing.assert_array_equal(at.index, index)
  np.testing.assert_array_equal(at.keys_S, np.arange(5))
  seen = np.arange(5) <= np.array(expected)[:, :, None]
  np.testing.assert_array_equal(at.mask, seen[:, None])
  np.testing.assert_array_equal(counter, np.array(index) + length)


def test_the_first_call_counts_nothing():
  at, counter = advance(4)
  assert (at.queries_BT.shape, at.keys_S.shape, at.mask.shape) == (
    (1, 4),
    (4,),
    (1, 1, 4, 4),
  )
  assert counter == 0


def test_a_prefill_counts_its_lengths():
  lengths = jnp.asarray([3, 0, 1])
  at, counter = advance(4, 4, lengths, cache_index=0, slots_of_cache=4)
  np.testing.assert_array_equal(at.queries_BT, [[0, 1, 2, 3]])
  np.testing.assert_array_equal(counter, lengths)


def test_positions_with_pending_ones():
  """Of five positions two are in the cache, three are pending."""
  at, _ = advance(1, 5, cache_index=3, pending_positions=[2, 3, 4], slots_of_cache=5)
  late = decode_cache.UNREACHED
  np.testing.assert_array_equal(at.keys_S, [0, 1, late, late, late, 2, 3, 4])
  np.testing.assert_array_equal(at.mask[0, 0], [[1, 1, 0, 0, 0, 1, 1, 0]])
  assert at.index == 1  # The second of those that are pending.


@pytest.mark.parametrize('slots', [None, np.zeros((1, 2, 6), int)])
def test_another_length_than_the_cache(slots):
  cache = {'cache_index': 0, 'slots_of_cache': 6}
  if slots is not None:
    cache |= {'slots': slots, 'slots_of_cache': 6 * 2}
  message = r'for 6 positions, but this call is for 7; pass max_decode_length=6\.'
  with pytest.raises(ValueError, match=message):
    advance(1, 7, **cache)


# --- Rows for samples, slots for beams ----------------------------------------


def a_cache(B, S, index=0):
  """Returns a cache of one head of size 2; its keys and values are all distinct."""
  value = np.arange(B * S * 2, dtype=np.float32).reshape(B, 1, S, 2)
  key = 1000 + value.swapaxes(2, 3)
  layer = {'self_attention': {'cached_key': key, 'cached_value': value}}
  return {'decoder': {'cache_index': np.int32(index), 'layers_0': layer}}


def test_repeat_rows():
  """The decodes of an input are neighbours."""
  got = decode_cache.repeat_rows(a_cache(2, 2), 3)['decoder']
  first, second = [[0, 1], [2, 3]], [[4, 5], [6, 7]]
  expected = np.array([first] * 3 + [second] * 3)[:, None]
  layer = got['layers_0']['self_attention']
  np.testing.assert_array_equal(layer['cached_key'], 1000 + expected.swapaxes(2, 3))
  np.testing.assert_array_equal(layer['cached_value'], expected)
  assert got['cache_index'].shape == ()


def test_with_beams():
  """A slot for every beam at every position; each beam begins with its own."""
  cache = jax.tree.map(jnp.zeros_like, a_cache(2, 4))
  layer = cache['decoder']['layers_0']['self_attention']
  layer['cached_key'] = layer['cached_key'].astype(jnp.bfloat16)
  got = decode_cache.with_beams(cache, 3)['decoder']
  layer = got['layers_0']['self_attention']
  assert layer['cached_key'].dtype == jnp.bfloat16
  assert layer['cached_value'].dtype == jnp.float32
  np.testing.assert_array_equal(layer['cached_key'], np.zeros((2, 1, 2, 4 * 3)))
  np.testing.assert_array_equal(layer['cached_value'], np.zeros((2, 1, 4 * 3, 2)))
  own = [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2]]
  assert got['slots'].dtype == jnp.int32
  np.testing.assert_array_equal(got['slots'], [own, own])
  assert (got['cache_index'].shape, int(got['cache_index'])) == ((), 0)


# Two inputs, three beams, four positions; two positions are written.
SLOTS = np.array(
  [
    [[0, 1, 0, 0], [1, 1, 1, 1], [2, 0, 2, 2]],
    [[0, 0, 0, 0], [0, 2, 1, 1], [2, 2, 2, 2]],
  ],
  np.int32,
)


@pytest.mark.parametrize(
  ('origin', 'expected'),
  [
    ([[0, 1, 2], [0, 1, 2]], SLOTS),
    (
      [[2, 0, 0], [1, 1, 2]],
      [
        [[2, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2]],
        [[0, 2, 0, 0], [0, 2, 1, 1], [2, 2, 2, 2]],
      ],
    ),
  ],
)
def test_reorder(origin, expected):
  """Pasts move; what is to come is written in each beam's own slot."""
  cache = a_cache(2, 4 * 3, index=2)
  cache['decoder']['slots'] = SLOTS
  got = decode_cache.reorder(cache, jnp.asarray(origin))['decoder']
  np.testing.assert_array_equal(got['slots'], expected)
  assert got['cache_index'] == 2
  for name in ('cached_key', 'cached_value'):  # The same arrays: nothing is copied.
    before = cache['decoder']['layers_0']['self_attention'][name]
    assert got['layers_0']['self_attention'][name] is before


def by_slot(slots, query, keys):
  """Returns mask and bias by slots, bool and float `[B, 1, n, S * n]`."""
  at = decode_cache.Positions(
    jnp.asarray([[query]]), jnp.asarray(keys), None, None, jnp.asarray(slots)
  )
  return at.by_slot(jnp.asarray(keys, jnp.float32)[None, None, None])


def test_by_slot():
  """Keys in any order; positions 99 and 3 are later than the new token."""
  slots = [[[1, 0, 0], [0, 1, 1]], [[0, 0, 0], [1, 1, 1]]]
  mask, bias = by_slot(slots, 2, [0, 99, 2, 1, 3])
  assert (mask.shape, mask.dtype) == ((2, 1, 2, 5 * 2), bool)
  first = [[0, 1, 0, 0, 1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1, 0, 1, 0, 0]]
  second = [[1, 0, 0, 0, 1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1, 0, 1, 0, 0]]
  np.testing.assert_array_equal(mask[:, 0], np.array([first, second], bool))
  np.testing.assert_array_equal(bias[0, 0, 0], [0, 0, 99, 99, 2, 2, 1, 1, 3, 3])


def test_every_beam_finds_its_own_past():
  """Random reorderings against lists that are copied for every beam."""
  B, n, S = 3, 4, 9
  rng = np.random.default_rng(7)
  pasts = [[[] for _ in range(n)] for _ in range(B)]
  cache = decode_cache.with_beams(a_cache(B, S), n)
  stored = np.zeros((B, S * n))
  for s in range(S):
    stored[:, s * n : (s + 1) * n] = new = rng.standard_normal((B, n))
    seen = np.asarray(by_slot(cache['decoder']['slots'], s, range(S))[0])
    for b, i in np.ndindex(B, n):
      pasts[b][i].append(new[b, i])
      np.testing.assert_array_equal(stored[b, seen[b, 0, i]], pasts[b][i])
    origin = rng.integers(0, n, (B, n))
    pasts = [[list(pasts[b][j]) for j in origin[b]] for b in range(B)]
    cache['decoder']['cache_index'] = s + 1
    cache = decode_cache.reorder(cache, jnp.asarray(origin))


# --- Pending keys and values --------------------------------------------------


@pytest.mark.parametrize(('S', 'P'), [(40, 16), (16, 16), (5, 5)])
def test_with_pending(S, P):
  beams = 2
  cache, most = decode_cache.with_pending(a_cache(3, S * beams, index=4), beams)
  assert most == P
  decoder = cache['decoder']
  np.testing.assert_array_equal(decoder['pending_positions'], 4 + np.arange(P))
  layer = decoder['layers_0']['self_attention']
  assert layer['pending_key'].shape == layer['pending_value'].shape == (P, 3, 2, 1, 2)
  assert layer['cached_value'].shape == (3, 1, S * beams, 2)


@pytest.mark.parametrize('now', [3, 4, 5])
def test_flush(now, monkeypatch):
  """Positions 2, 3 and 4 move into the cache; those from now on are pending next."""
  monkeypatch.setattr(decode_cache, 'MAX_PENDING', 3)
  beams, S = 2, 6
  cache = jax.tree.map(jnp.zeros_like, a_cache(1, S * beams))
  cache['decoder']['cache_index'] = jnp.asarray(2)
  cache, _ = decode_cache.with_pending(cache, beams)
  layer = cache['decoder']['layers_0']['self_attention']
  # 100 s + 10 beam + 0 or 1: position s of those that are pending.
  s, beam, unit = np.ogrid[:3, :2, :2]
  numbers = (100 * s + 10 * beam + unit).astype(np.float32)
  layer['pending_key'] = jnp.asarray(numbers[:, None, :, None])
  layer['pending_value'] = 1000 + layer['pending_key']
  cache['decoder']['cache_index'] = jnp.asarray(now)
  flushed = decode_cache.flush(cache)['decoder']
  np.testing.assert_array_equal(flushed['pending_positions'], now + np.arange(3))
  in_order = [[0, 1], [10, 11], [100, 101], [110, 111], [200, 201], [210, 211]]
  expected = np.zeros((S * beams, 2))
  expected[2 * beams : 5 * beams] = in_order
  layer = flushed['layers_0']['self_attention']
  np.testing.assert_array_equal(layer['cached_key'][0, 0], expected.T)
  expected[2 * beams : 5 * beams] += 1000
  np.testing.assert_array_equal(layer['cached_value'][0, 0], expected)
