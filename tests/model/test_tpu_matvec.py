"""Products where a key has one query, against each head by itself."""

import jax
import numpy as np
import pytest

from gqa_t5x.model import attention, sharding, tpu_matvec
from helpers.sharding_cases import entered, partitioner


def head_by_head(q_BNH, k_BNHS, v_BNSH):
  """Attention of each head alone, in NumPy and float64."""
  out = np.zeros(q_BNH.shape)
  for b, n in np.ndindex(q_BNH.shape[:2]):
    logits = q_BNH[b, n].astype(np.float64) @ k_BNHS[b, n]
    weights = np.exp(logits - logits.max())
    out[b, n] = weights / weights.sum() @ v_BNSH[b, n]
  return out


@pytest.mark.parametrize('P', [0, 3])
@pytest.mark.parametrize('N', [1, 6, 8, 16])
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

  expected = head_by_head(q[:, 0], k, v)
  np.testing.assert_allclose(attend(q)[:, 0], expected, rtol=2e-5, atol=2e-6)
  # The queries' rows: one for each head that is multiplied together.
  R = tpu_matvec.heads_together(N)
  assert f'f32[{B},{N // R},{R},{R * H}]' in str(jax.make_jaxpr(attend)(q))


@pytest.mark.parametrize(
  ('num_partitions', 'expected'), [(1, 8), (2, 4), (4, 2), (8, 1)]
)
def test_heads_together_are_of_one_device(num_partitions, expected):
  with entered(partitioner(8, num_partitions)):
    assert tpu_matvec.heads_together(8) == expected


@pytest.mark.parametrize(('N', 'expected'), [(1, 1), (6, 2), (12, 4), (16, 8), (64, 8)])
def test_heads_together_are_eight_at_most(N, expected):
  assert tpu_matvec.heads_together(N) == expected
