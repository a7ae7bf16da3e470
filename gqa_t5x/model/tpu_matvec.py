"""Attention's two products on a TPU where a key has one query: decoding with MHA.

Of one row XLA makes no matrix product: it multiplies element by element, slower than a
chip reads the keys. But a matrix unit works on eight rows in the time of one. So the
queries of R heads, each zero where another head's keys are, are multiplied with the
keys of all R together. The values are multiplied head by head, with the probabilities
and rows of zeros: R heads together would take more of a chip's memory than the matrix
unit gains (docs/tpu.md).

  R heads together   k = K / R sets of them   r: rows, one for each head of a set
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
  """Returns R, a divisor of the heads that a device has, for N = K heads in all."""
  return math.gcd(num_heads // sharding.parts(axes.HEADS), ROWS)


def logits(q_BK11H: Array, k_BKHS: Array, dtype: jnp.dtype | None) -> Array:
  """Multiplies queries with keys: `[B, K, 1, 1, S]`; no dtype: that of the queries."""
  q_BKH = q_BK11H[:, :, 0, 0]
  B, K, H = q_BKH.shape
  R = heads_together(K)
  own_rR1 = jnp.eye(R, dtype=q_BKH.dtype)[:, :, None]
  q_BkrX = (q_BKH.reshape(B, K // R, R, 1, H) * own_rR1).reshape(B, K // R, R, R * H)
  k_BkXS = k_BKHS.reshape(B, K // R, R * H, -1)
  out_BkrS = jnp.einsum('BkrX,BkXS->BkrS', q_BkrX, k_BkXS, preferred_element_type=dtype)
  return out_BkrS.reshape(B, K, -1)[:, :, None, None]


def weighted_sum(probs_BK11S: Array, v_BKSH: Array) -> Array:
  """Sums values by their weights: `[B, K, 1, 1, H]`."""
  pad = ((0, 0), (0, 0), (0, ROWS - 1), (0, 0))
  probs_BKrS = jnp.pad(probs_BK11S[:, :, 0, 0][:, :, None], pad)
  return jnp.einsum('BKrS,BKSH->BKrH', probs_BKrS, v_BKSH)[:, :, 0][:, :, None, None]
