"""The decode cache against arrays written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x import kv_cache

write = jax.jit(kv_cache.write)


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
  got = kv_cache.query_positions(jnp.asarray(index, jnp.int32), length)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, expected)


def test_causal_mask():
  got = kv_cache.causal_mask(jnp.asarray([[0, 1], [2, 3]]), 5)
  expected = [
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
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
  got = write(CACHE[:, None, :, None], new[:, None, :, None], jnp.asarray(index))
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
  np.testing.assert_array_equal(write(cache, new, jnp.asarray(index)), expected)


def test_write_keeps_the_dtype_of_the_cache():
  cache = jnp.zeros((1, 1, 2, 1), jnp.bfloat16)
  got = write(cache, jnp.full((1, 1, 1, 1), 1.001, jnp.float32), jnp.asarray(1))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got.astype(np.float32), [[[[0], [1]]]])
