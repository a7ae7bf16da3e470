"""The best of a vocabulary that devices share, against NumPy; equal values included."""

import jax
import numpy as np
import pytest

from gqa_t5x.decoding import top_tokens
from helpers.sharding_cases import entered, partitioner


def largest(x_BnV, k):
  """Returns the k largest values and their places; the first of equal ones first."""
  flat = x_BnV.reshape(len(x_BnV), -1)
  places = np.argsort(-flat, axis=1, kind='stable')[:, :k]
  return np.take_along_axis(flat, places, axis=1), places


@pytest.mark.parametrize('num_partitions', [None, 1, 4, 8])
@pytest.mark.parametrize(
  ('B', 'n', 'V', 'k'),
  [
    (8, 1, 24, 1),
    (8, 2, 40, 4),
    (2, 5, 16, 10),  # More than a device has of a beam.
    (2, 3, 8, 24),  # All that there are.
    (8, 2, 25, 4),  # The devices do not divide the tokens,
    (3, 2, 24, 4),  # the rows,
    (5, 2, 23, 4),  # or either.
  ],
)
def test_as_if_on_one_device(num_partitions, B, n, V, k):
  values = np.random.default_rng(0).integers(-6, 6, (B, n, V)).astype(np.float32)
  values[0, :, ::2] = -np.inf
  expected = largest(values, k)
  assert len(np.unique(expected[0])) < expected[0].size
  run = jax.jit(lambda x: top_tokens.top_k(x, k))
  if num_partitions is None:
    got = run(values)
  else:
    with entered(partitioner(1, num_partitions)):
      got = run(values)
  for found, wanted in zip(got, expected, strict=True):
    np.testing.assert_array_equal(found, wanted)
