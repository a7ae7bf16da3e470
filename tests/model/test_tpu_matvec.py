"""Products where a key has one query, against each head by itself."""

import jax
import numpy as np
import pytest

from gqa_t5x.model import attention, sharding, tpu_matvec
from helpers import model_oracle as oracle
from helpers.sharding_cases import entered, partitioner


@pytest.mark.parametrize(('N', 'P'), [(1, 0), (6, 3), (8, 0), (16, 3)])
def test_equals_each_head_alone(N, P, monkeypatch):
  """Of S + P positions the last P are pending."""
  monkeypatch.setattr(sharding, 'platform', lambda: 'tpu')
  B, H, S = 3, 4, 7
  rng = np.random.default_rng(N)
  q, k, v = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((B, 1, N, H), (B, N, H, S + P), (B, N, S + P, H))
  )
  pending = (k[..., S:], v[:, :, S:]) if P else None

  def attend(q):
    return attention.grouped_attention(q, k[..., :S], v[:, :, :S], pending=pending)

  got = oracle.jit(attend)(q)
  for b in range(B):
    expected = oracle.attend(q[b], k[b].transpose(2, 0, 1), v[b].swapaxes(0, 1))
    np.testing.assert_allclose(got[b], expected, rtol=2e-5, atol=2e-6)
  # The queries' rows: one for each head that is multiplied together.
  M = tpu_matvec.heads_together(N)
  assert f'f32[{B},{N // M},{M},{M * H}]' in str(jax.make_jaxpr(attend)(q))


@pytest.mark.parametrize(
  ('num_partitions', 'expected'), [(1, 8), (2, 4), (4, 2), (8, 1)]
)
def test_heads_together_are_of_one_device(num_partitions, expected):
  with entered(partitioner(8, num_partitions)):
    assert tpu_matvec.heads_together(8) == expected


@pytest.mark.parametrize(('N', 'expected'), [(1, 1), (6, 2), (12, 4), (16, 8), (64, 8)])
def test_heads_together_are_eight_at_most(N, expected):
  assert tpu_matvec.heads_together(N) == expected
