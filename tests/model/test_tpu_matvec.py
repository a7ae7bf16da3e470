"""Products of one query a key, heads together, against each head by itself."""

import numpy as np
import pytest

from gqa_t5x.model import attention, sharding, tpu_matvec
from helpers.sharding_cases import config, entered, partitioner


def head_by_head(q_BNH, k_BNHS, v_BNSH):
  """Attention of each head alone, in NumPy and float64."""
  out = np.zeros(q_BNH.shape)
  for b, n in np.ndindex(q_BNH.shape[:2]):
    logits = q_BNH[b, n].astype(np.float64) @ k_BNHS[b, n]
    weights = np.exp(logits - logits.max())
    out[b, n] = weights / weights.sum() @ v_BNSH[b, n]
  return out


@pytest.mark.parametrize('beside', [0, 3])
@pytest.mark.parametrize('N', [1, 2, 6, 8, 12, 16])
def test_equals_each_head_alone(N, beside, monkeypatch):
  monkeypatch.setattr(sharding, 'platform', lambda: 'tpu')
  seen = []
  for name in ('logits', 'weighted_sum'):
    product = getattr(tpu_matvec, name)
    monkeypatch.setattr(
      tpu_matvec, name, lambda *args, p=product: seen.append(p) or p(*args)
    )
  rng = np.random.default_rng(N)
  q, k, v = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((3, 1, N, 4), (3, N, 4, 7), (3, N, 7, 4))
  )
  more = rng.normal(size=(2, 3, N, 4, beside)).astype(np.float32)
  extra = (more[0], more[1].swapaxes(2, 3)) if beside else None
  found = attention.grouped_attention(q, k, v, beside=extra)
  all_k = np.concatenate([k, more[0]], axis=3)
  all_v = np.concatenate([v, more[1].swapaxes(2, 3)], axis=2)
  np.testing.assert_allclose(
    found[:, 0], head_by_head(q[:, 0], all_k, all_v), rtol=2e-5, atol=2e-6
  )
  assert len(seen) == (4 if beside else 2)


# Key/value heads, model partitions -> heads together: within a device, eight at most.
@pytest.mark.parametrize(
  ('N', 'num_partitions', 'expected'),
  [(8, 1, 8), (8, 2, 4), (8, 4, 2), (8, 8, 1)],
)
def test_heads_of_one_device(N, num_partitions, expected):
  assert config(N).num_heads == N
  with entered(partitioner(N, num_partitions, None)):
    assert tpu_matvec.heads_together(N) == expected


@pytest.mark.parametrize(('N', 'expected'), [(1, 1), (6, 2), (12, 4), (16, 8), (64, 8)])
def test_heads_of_a_single_device(N, expected):
  assert tpu_matvec.heads_together(N) == expected
