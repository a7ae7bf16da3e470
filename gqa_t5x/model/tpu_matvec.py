"""Attention's two products on a TPU where a key has one query: decoding with MHA.

Of one row XLA makes no matrix product: it multiplies element by element, slower than a
chip reads the keys. But a matrix unit works on eight rows in the time of one. So the
queries of eight heads are multiplied with the keys of all eight, as one row each that
is zero where another head's keys are; and with each head's values, its probabilities
and seven rows of zeros. (Eight heads together there, too, would cost a chip's memory
more than a matrix unit gains: docs/tpu.md.)

  R heads together   k = K / R groups of them   r: rows, one for each of the heads
"""

import math

import jax
import jax.numpy as jnp

from gqa_t5x.model import axes, sharding

Array = jax.Array

ROWS = 8  # that a matrix unit works on together


def heads_together(num_heads: int) -> int:
  """Returns R, a divisor of the heads that a device has.

  Args:
    num_heads: N, and K.
  """
  name, _, _ = axes.kv_axes(num_heads, num_heads)
  return math.gcd(num_heads // sharding.parts(name), ROWS)


def logits(q_BKH: Array, k_BKHS: Array, dtype: jnp.dtype | None) -> Array:
  """Multiplies queries with keys.

  Args:
    q_BKH: one query a key.
    k_BKHS: keys.
    dtype: of the result; None: of the queries.

  Returns:
    `[B, K, S]`.
  """
  B, K, H = q_BKH.shape
  R = heads_together(K)
  own_rR1 = jnp.eye(R, dtype=q_BKH.dtype)[:, :, None]
  q_BkrX = (q_BKH.reshape(B, K // R, R, 1, H) * own_rR1).reshape(B, K // R, R, R * H)
  k_BkXS = k_BKHS.reshape(B, K // R, R * H, -1)
  out_BkrS = jnp.einsum('BkrX,BkXS->BkrS', q_BkrX, k_BkXS, preferred_element_type=dtype)
  return out_BkrS.reshape(B, K, -1)


def weighted_sum(probs_BKS: Array, v_BKSH: Array) -> Array:
  """Adds up values.

  Args:
    probs_BKS: their weights.
    v_BKSH: values.

  Returns:
    `[B, K, H]`.
  """
  probs_BKrS = jnp.pad(probs_BKS[:, :, None], ((0, 0), (0, 0), (0, ROWS - 1), (0, 0)))
  return jnp.einsum('BKrS,BKSH->BKrH', probs_BKrS, v_BKSH)[:, :, 0]
