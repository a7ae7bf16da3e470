"""The decode cache against arrays written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x.model import decode_cache

write = jax.jit(decode_cache.write, static_argnames='axis')


@pytest.mark.parametrize(
  ('index', 'length', 'expected'),
  [
    (3, 2, [[3, 4]]),
    (0, 1, [[0]]),
    ([2, 0, 5], 2, [[2, 3], [0, 1], [5, 6]]),
    ([[4, 1], [0, 3]], 1, [[4], [1], [0], [3]]),
  ],
)
def test_query_positions(index, length, expected):
  got = decode_cache.query_positions(jnp.asarray(index, jnp.int32), length)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, expected)


def test_causal_mask():
  got = decode_cache.causal_mask(
    jnp.asarray([[0, 1], [2, 3]]), jnp.asarray([0, 1, 99, 4, 3])
  )
  expected = [
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
    [[1, 1, 0, 0, 0], [1, 1, 0, 0, 1]],
  ]
  assert got.dtype == bool
  np.testing.assert_array_equal(got, np.array(expected, bool)[:, None])


# Four rows, one head, five positions of size one; one or two new positions.
CACHE = np.array(
  [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15], [16, 17, 18, 19, 20]],
  np.float32,
)
ONE = np.array([[-1], [-2], [-3], [-4]], np.float32)
TWO = np.array([[-1, -2], [-3, -4], [-5, -6], [-7, -8]], np.float32)


@pytest.mark.parametrize(
  ('new', 'index', 'expected'),
  [
    (
      ONE,
      2,
      [[1, 2, -1, 4, 5], [6, 7, -2, 9, 10], [11, 12, -3, 14, 15], [16, 17, -4, 19, 20]],
    ),
    (
      ONE,
      [0, 4, 1, 3],
      [[-1, 2, 3, 4, 5], [6, 7, 8, 9, -2], [11, -3, 13, 14, 15], [16, 17, 18, -4, 20]],
    ),
    (
      ONE,
      [[0, 4], [1, 3]],
      [[-1, 2, 3, 4, 5], [6, 7, 8, 9, -2], [11, -3, 13, 14, 15], [16, 17, 18, -4, 20]],
    ),
    (
      TWO,
      1,
      [
        [1, -1, -2, 4, 5],
        [6, -3, -4, 9, 10],
        [11, -5, -6, 14, 15],
        [16, -7, -8, 19, 20],
      ],
    ),
    (
      TWO,
      [3, 0, 2, 1],
      [
        [1, 2, 3, -1, -2],
        [-3, -4, 8, 9, 10],
        [11, 12, -5, -6, 15],
        [16, -7, -8, 19, 20],
      ],
    ),
  ],
)
def test_write(new, index, expected):
  got = write(
    CACHE[:, None, :, None], new[:, None, :, None], jnp.asarray(index), axis=2
  )
  np.testing.assert_array_equal(got, np.array(expected)[:, None, :, None])


@pytest.mark.parametrize('K', [1, 2, 4])
@pytest.mark.parametrize('index', [3, [3, 0, 2], [[3], [0], [2]]])
def test_write_keeps_heads_and_units_apart(K, index):
  rng = np.random.default_rng(0)
  cache = rng.standard_normal((3, K, 5, 6)).astype(np.float32)
  new = rng.standard_normal((3, K, 2, 6)).astype(np.float32)
  expected = cache.copy()
  for b, start in enumerate(np.broadcast_to(np.reshape(index, -1), 3)):
    for k in range(K):
      expected[b, k, start : start + 2] = new[b, k]
  got = write(cache, new, jnp.asarray(index), axis=2)
  np.testing.assert_array_equal(got, expected)
  cache, new = cache.swapaxes(2, 3), new.swapaxes(2, 3)  # as keys are kept
  got = write(cache, new, jnp.asarray(index), axis=3)
  np.testing.assert_array_equal(got, expected.swapaxes(2, 3))


def test_write_keeps_the_dtype_of_the_cache():
  cache = jnp.zeros((1, 1, 2, 1), jnp.bfloat16)
  got = write(cache, jnp.full((1, 1, 1, 1), 1.001, jnp.float32), jnp.asarray(1), axis=2)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got.astype(np.float32), [[[[0], [1]]]])


# Rows for samples, slots for beams.


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
    (
      [[1, 2, 0], [2, 2, 2]],
      [
        [[1, 1, 0, 0], [2, 0, 1, 1], [0, 1, 2, 2]],
        [[2, 2, 0, 0], [2, 2, 1, 1], [2, 2, 2, 2]],
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


@pytest.mark.parametrize(
  ('index', 'expected'),
  [
    (0, [[0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]),
    (1, [[0, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]]),
    (2, [[0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 0, 1]]),
  ],
)
def test_beam_mask(index, expected):
  slots = jnp.asarray([[[1, 0, 0], [0, 1, 1]], [[0, 0, 0], [1, 1, 1]]])
  got = decode_cache.beam_mask(slots, jnp.asarray([[index]]), jnp.arange(3))
  assert (got.shape, got.dtype) == ((2, 1, 2, 6), bool)
  np.testing.assert_array_equal(got[0, 0], np.array(expected, bool))
  straight = [[1, 0] * (index + 1), [0, 1] * (index + 1)]
  np.testing.assert_array_equal(got[1, 0][:, : 2 * (index + 1)], straight)
  assert not got[1, 0][:, 2 * (index + 1) :].any()


def test_beam_mask_of_keys_in_another_order():
  """The second is not known yet; the last is beyond the table, and too late."""
  slots = jnp.asarray([[[1, 0, 0], [0, 1, 1]]])
  got = decode_cache.beam_mask(slots, jnp.asarray([[2]]), jnp.asarray([0, 99, 2, 1, 3]))
  expected = [[0, 1, 0, 0, 1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1, 0, 1, 0, 0]]
  np.testing.assert_array_equal(got[0, 0], np.array(expected, bool))


def test_every_beam_finds_its_own_past():
  """Random reorderings against lists that are copied for every beam."""
  B, n, S = 3, 4, 9
  rng = np.random.default_rng(7)
  pasts = [[[] for _ in range(n)] for _ in range(B)]
  cache = {'decoder': {'cache_index': jnp.zeros((), jnp.int32)}}
  cache['decoder']['layer'] = {'cached_value': jnp.zeros((B, 1, S, 1))}
  cache = decode_cache.with_beams(cache, n)['decoder']
  for s in range(S):
    new = rng.standard_normal((B, 1, n, 1)).astype(np.float32)
    value = cache['layer']['cached_value']
    value = write(value, new, jnp.asarray(s * n), axis=2)
    cache['layer'] = {'cached_value': value}
    mask = decode_cache.beam_mask(cache['slots'], jnp.asarray([[s]]), jnp.arange(S))
    seen = np.asarray(mask)
    stored = np.asarray(value)
    for b in range(B):
      for i in range(n):
        pasts[b][i].append(new[b, 0, i, 0])
        np.testing.assert_array_equal(stored[b, 0, seen[b, 0, i], 0], pasts[b][i])
    origin = rng.integers(0, n, (B, n))
    pasts = [[list(pasts[b][j]) for j in origin[b]] for b in range(B)]
    cache['cache_index'] = jnp.asarray(s + 1)
    cache = decode_cache.reorder({'decoder': cache}, jnp.asarray(origin))['decoder']
