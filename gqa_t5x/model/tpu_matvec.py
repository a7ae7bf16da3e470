"""Attention's two products on a TPU where a key has one query: decoding with MHA.

Of one row XLA makes no matrix product: it multiplies element by element, slower than a
chip reads the keys. But a matrix unit works on eight rows in the time of one. So the
queries of M heads, each zero where another head's keys are, are multiplied with the
keys of all M together. The values are multiplied head by head, with the probabilities
and rows of zeros: M heads together would take more of a chip's memory than the matrix
unit gains (docs/tpu.md).

  M heads together   k = K / M sets of them   m: rows, one for each head of a set
"""

import math

import jax.numpy as jnp
from jax import Array

from gqa_t5x.model import axes, sharding

ROWS = 8  # that a matrix unit works on together


def is_matvec(x_BKGT: Array) -> bool:
  """Returns whether a key has one query, on a TPU; x has one more axis."""
  return x_BKGT.shape[2] * x_BKGT.shape[3] == 1 and sharding.platform() == 'tpu'


def heads_together(num_heads: int) -> int:
  """Returns M, a divisor of the heads that a device has, for N = K heads in all."""
  return math.gcd(num_heads // sharding.parts(axes.HEADS), ROWS)


def logits(q_BK11R: Array, k_BKRS: Array, dtype: jnp.dtype | None) -> Array:
  """Multiplies queries with keys: `[B, K, 1, 1, S]`; no dtype: that of the queries."""
  q_BKR = q_BK11R[:, :, 0, 0]
  B, K, R = q_BKR.shape
  M = heads_together(K)
  own_mM1 = jnp.eye(M, dtype=q_BKR.dtype)[:, :, None]
  q_BkmX = (q_BKR.reshape(B, K // M, M, 1, R) * own_mM1).reshape(B, K // M, M, M * R)
  k_BkXS = k_BKRS.reshape(B, K // M, M * R, -1)
  out_BkmS = jnp.einsum('BkmX,BkXS->BkmS', q_BkmX, k_BkXS, preferred_element_type=dtype)
  return out_BkmS.reshape(B, K, -1)[:, :, None, None]


def weighted_sum(probs_BK11S: Array, v_BKSR: Array) -> Array:
  """Sums values by their weights: `[B, K, 1, 1, R]`."""
  pad = ((0, 0), (0, 0), (0, ROWS - 1), (0, 0))
  probs_BKmS = jnp.pad(probs_BK11S[:, :, 0, 0][:, :, None], pad)
  return jnp.einsum('BKmS,BKSR->BKmR', probs_BKmS, v_BKSR)[:, :, 0][:, :, None, None]
