"""The decode cache: positions, slots of beams, room for what is pending.

Prefills and steps are in test_generate.py; whole decodes, with rows for samples, slots
for beams and pending keys and values, in test_golden.py.
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


def advance(length, S, slots_of_cache, **cache):
  """Returns the positions of a call, and the counter after it."""
  cache = {name: jnp.asarray(value) for name, value in cache.items()}
  cache['layer'] = {'cached_value': jnp.zeros((1, 1, slots_of_cache, 1))}
  at, variables = Decoder().apply({'cache': cache}, length, S, None, mutable=['cache'])
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


def test_with_beams():
  """A slot for every beam at every position; each beam begins with its own."""
  cache = jax.tree.map(jnp.zeros_like, a_cache(2, 4))
  layer = cache['decoder']['layers_0']['self_attention']
  layer['cached_key'] = layer['cached_key'].astype(jnp.bfloat16)
  got = decode_cache.with_beams(cache, 3)['decoder']
  layer = got['layers_0']['self_attention']
  assert layer['cached_key'].dtype == jnp.bfloat16
  assert layer['cached_value'].dtype == jnp.float32
  assert layer['cached_value'].shape == (2, 1, 4 * 3, 2)
  own = [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2]]
  assert got['slots'].dtype == jnp.int32
  np.testing.assert_array_equal(got['slots'], [own, own])
  assert (got['cache_index'].shape, int(got['cache_index'])) == ((), 0)


def by_slot(slots, query, keys):
  """Returns the mask by slots, bool `[B, 1, n, S * n]`."""
  at = decode_cache.Positions(
    jnp.asarray([[query]]), jnp.asarray(keys), None, None, jnp.asarray(slots)
  )
  return np.asarray(at.by_slot(jnp.zeros((1, 1, 1, len(keys))))[0])


def test_every_beam_finds_its_own_past():
  """Random reorderings against lists that are copied for every beam."""
  B, n, S = 3, 4, 9
  rng = np.random.default_rng(7)
  pasts = [[[] for _ in range(n)] for _ in range(B)]
  cache = decode_cache.with_beams(a_cache(B, S), n)
  stored = np.zeros((B, S * n))
  for s in range(S):
    stored[:, s * n : (s + 1) * n] = new = rng.standard_normal((B, n))
    seen = by_slot(cache['decoder']['slots'], s, range(S))
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
