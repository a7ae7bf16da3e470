"""Attention's two products on a TPU where a key has one query: decoding with MHA.

Of one row XLA makes no matrix product: it multiplies element by element, slower than a
chip reads the keys. But a matrix unit works on eight rows in the time of one. So eight
heads are multiplied together, the query of each with the keys and values of all eight,
and what is of another head's counts nothing.

  R heads together   k = K / R groups of them   r: rows, one for each of the heads
"""

import math

import jax
import jax.numpy as jnp

from gqa_t5x import axes, sharding

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
  B, K, S, H = v_BKSH.shape
  R = heads_together(K)
  probs_BkrS = probs_BKS.reshape(B, K // R, R, S)
  v_BkRSH = v_BKSH.reshape(B, K // R, R, S, H)
  out_BkRrH = jnp.einsum('BkrS,BkRSH->BkRrH', probs_BkrS, v_BkRSH)
  own_Rr1 = jnp.eye(R, dtype=out_BkRrH.dtype)[:, :, None]
  return jnp.sum(out_BkRrH * own_Rr1, axis=3).reshape(B, K, H)
