"""Grouped-query attention (GQA, Ainslie et al. 2023, arXiv 2305.13245).

K key/value heads serve N query heads, G = N / K each: K = N is multi-head, K = 1
multi-query attention, and one path computes them all. A key/value head may have a size
of its own, R: T5 has no rotary embedding, so nothing ties it to H, the size of a query
head. Letters as in axes.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from gqa_t5x.model import axes, decode_cache, sharding, tpu_matvec
from gqa_t5x.model.dense import Dense, PerHead
from gqa_t5x.model.quantize import Int8

KERNEL_INIT = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
# Masked logits get this value, as in T5X, or the least of their dtype: a fully masked
# row stays finite.
MASKED_LOGIT = -1e10
INPUT_AXES = (axes.BATCH, axes.LENGTH, axes.EMBED)
QUERY_AXES = (axes.BATCH, axes.LENGTH, axes.HEADS, axes.HEAD_DIM)


def grouped_attention(
  q_BTNR: Array,
  k_BKRS: Array | Int8,
  v_BKSR: Array | Int8,
  *,
  mask: Array | None = None,
  bias: Array | None = None,
  float32_logits: bool = False,
  dropout: Callable[[Array], Array] = lambda probs_BKGTS: probs_BKGTS,
  pending: Sequence[Array | Int8] | None = None,
) -> Array:
  """Attends from N query heads to K key/value heads.

  Query head n reads key/value head n // G. T5 does not divide the logits by
  sqrt(H): the query initialiser does.

  Args:
    k_BKRS: each head transposed, so that both products read rows. Of int8 keys, and
      values, `scale` is `[B, K, 1, S]`.
    mask: bool, broadcastable to `[B, 1, T, S]`; True where a query may look.
    bias: `[B or 1, N, T or 1, S]`, added to the logits.
    float32_logits: accumulate logits and softmax in float32 whatever the dtype.
    pending: keys and values of P more positions (decode_cache.py), laid out alike;
      mask and bias then cover S + P positions.

  Returns:
    `[B, T, N, R]` in the dtype of the queries.

  Source: GQA, section 2.2.
  """
  B, T, N, R = q_BTNR.shape
  K = k_BKRS.shape[1]
  axes.check_heads(N, K)
  q_BKGTR = jnp.moveaxis(q_BTNR.reshape(B, T, K, N // K, R), 1, 3)
  logits_dtype = jnp.float32 if float32_logits else None
  logits_BKGTS = _logits(q_BKGTR, k_BKRS, logits_dtype)
  if pending is not None:
    pending_BKGTP = _logits(q_BKGTR, pending[0], logits_dtype)
    logits_BKGTS = jnp.concatenate([logits_BKGTS, pending_BKGTP], axis=-1)
  if bias is not None:
    bias_BKGTS = bias.reshape(-1, K, N // K, *bias.shape[2:])
    logits_BKGTS += bias_BKGTS.astype(logits_BKGTS.dtype)
  if mask is not None:
    masked = max(MASKED_LOGIT, float(jnp.finfo(logits_BKGTS.dtype).min))
    logits_BKGTS = jnp.where(mask[:, :, None], logits_BKGTS, masked)
  probs_BKGTS = dropout(jax.nn.softmax(logits_BKGTS))
  S, dtype = v_BKSR.shape[2], q_BTNR.dtype
  out_BKGTR = _weighted_sum(probs_BKGTS[..., :S], v_BKSR, dtype)
  if pending is not None:
    out_BKGTR += _weighted_sum(probs_BKGTS[..., S:], pending[1], dtype)
  return jnp.moveaxis(out_BKGTR, 3, 1).reshape(B, T, N, R)


def _logits(q_BKGTR: Array, k_BKRS: Array | Int8, dtype: Any) -> Array:
  if isinstance(k_BKRS, Int8):
    codes_BKRS = k_BKRS.codes.astype(q_BKGTR.dtype)
    return _logits(q_BKGTR, codes_BKRS, jnp.float32) * k_BKRS.scale[:, :, None]
  if tpu_matvec.is_matvec(q_BKGTR):
    return tpu_matvec.logits(q_BKGTR, k_BKRS, dtype)
  return jnp.einsum('BKGTR,BKRS->BKGTS', q_BKGTR, k_BKRS, preferred_element_type=dtype)


def _weighted_sum(probs_BKGTS: Array, v_BKSR: Array | Int8, dtype: Any) -> Array:
  if isinstance(v_BKSR, Int8):
    probs_BKGTS = probs_BKGTS * v_BKSR.scale[:, :, None]
    return _weighted_sum(probs_BKGTS, v_BKSR.codes.astype(dtype), dtype)
  probs_BKGTS = probs_BKGTS.astype(dtype)
  if tpu_matvec.is_matvec(probs_BKGTS):
    return tpu_matvec.weighted_sum(probs_BKGTS, v_BKSR)
  return jnp.einsum('BKGTS,BKSR->BKGTR', probs_BKGTS, v_BKSR)


class GroupedQueryAttention(nn.Module):
  """Projections and dropout around `grouped_attention`; keys and values are cached.

  Where R is not H, what a head reads of a key is a map of its own, `key_up`. It goes to
  the queries instead, (x U) q = x (U q), so that K heads of R numbers are all that is
  kept; and `value_up` to the weighted sums. Source: DeepSeek-V2 (2405.04434), section
  2.1, without its detour for rotary embeddings.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  dtype: Any = jnp.float32
  dropout_rate: float = 0.0  # On the probabilities, broadcast over query length.
  float32_logits: bool = False  # While decoding in any case.
  kv_head_dim: int | None = None  # R; None: H.
  int8_kv: bool = False  # Whether keys and values are rounded to int8.

  @nn.compact
  def __call__(
    self,
    inputs_q: Array,
    inputs_kv: Array,
    mask: Array | None = None,
    bias: Array | None = None,
    *,
    cache_index: Array | None = None,
    deterministic: bool = False,
  ) -> Array:
    """Attends from `[B, T, D]` to `[B, S, D]`; returns `[B, T, D]`.

    Where keys and values have fewer rows than queries, as for beams and samples of
    one input, the queries of neighbouring rows become positions of one row: no key or
    value is repeated. Mask and bias, as in `grouped_attention`, then have those B and
    T. `cache_index` is that of `decode_cache.Positions`, in self-attention alone.
    """
    N, H, R = self.num_heads, self.head_dim, self._kv_size
    B, T, D = inputs_q.shape
    q_BTNR = self._map_heads('key_up', 'BTNH,RNH->BTNR', self._project_q(inputs_q))
    k_BKRS, v_BKSR, pending, kept = decode_cache.keys_and_values(
      self, inputs_kv, self._project_kv, cache_index
    )
    # Queries go where kept keys and values lie, never the reverse.
    _, _, cache_heads = axes.kv_axes(N, self.num_kv_heads)
    kept_axes = (axes.CACHE_BATCH, axes.LENGTH, cache_heads, axes.HEAD_DIM)
    meeting_axes = kept_axes if kept else QUERY_AXES
    q_BTNR = q_BTNR.reshape(k_BKRS.shape[0], -1, N, R)
    out_BTNR = grouped_attention(
      sharding.constrain(q_BTNR, meeting_axes),
      k_BKRS,
      v_BKSR,
      mask=mask,
      bias=bias,
      float32_logits=self.float32_logits or kept,
      dropout=self._dropout(deterministic),
      pending=pending,
    )
    out_BTNR = sharding.constrain(out_BTNR, meeting_axes).reshape(B, T, N, R)
    out_BTNR = sharding.constrain(out_BTNR, QUERY_AXES)
    out_BTNH = self._map_heads('value_up', 'BTNR,RNH->BTNH', out_BTNR)
    return Dense(
      D, (axes.JOINED_HEADS, axes.EMBED), self.dtype, KERNEL_INIT, name='out'
    )(out_BTNH.reshape(B, T, N * H))

  @property
  def _kv_size(self) -> int:
    return self.head_dim if self.kv_head_dim is None else self.kv_head_dim

  def _project_q(self, x_BTD: Array) -> Array:
    """Projects to `[B, T, N, H]`; the initialiser holds T5's 1 / sqrt(H)."""

    def query_init(*args):
      return KERNEL_INIT(*args) / jnp.sqrt(self.head_dim).astype(self.dtype)

    x_BTD = sharding.constrain(x_BTD, INPUT_AXES)
    sizes = self.num_heads, self.head_dim
    q_BTNH = self._project('query', x_BTD, sizes, axes.JOINED_HEADS, query_init)
    return sharding.constrain(q_BTNH, QUERY_AXES)

  def _project_kv(self, x_BSD: Array) -> tuple[Array, Array]:
    """Projects to keys `[B, K, R, S]` and values `[B, K, S, R]`."""
    sizes = self.num_kv_heads, self._kv_size
    _, joined_axis, _ = axes.kv_axes(self.num_heads, self.num_kv_heads)
    # Or the layout of the cache would spread to all activations.
    x_BSD = sharding.constrain(x_BSD, INPUT_AXES)
    k_BKRS = jnp.einsum('BSKR->BKRS', self._project('key', x_BSD, sizes, joined_axis))
    v_BKSR = jnp.einsum('BSKR->BKSR', self._project('value', x_BSD, sizes, joined_axis))
    return k_BKRS, v_BKSR

  def _project(self, name, x_BTD, sizes, joined_axis, init=KERNEL_INIT) -> Array:
    """Projects to heads: `sizes` are their number, and the size of each."""
    kernel_axes = axes.EMBED, joined_axis
    x_BTX = Dense(math.prod(sizes), kernel_axes, self.dtype, init, name=name)(x_BTD)
    return x_BTX.reshape(*x_BTX.shape[:2], *sizes)

  def _map_heads(self, name: str, einsum: str, x_BTNX: Array) -> Array:
    """Maps each query head from its size to that of K/V heads, or back."""
    if self._kv_size == self.head_dim:
      return x_BTNX
    shape_RNH = self._kv_size, self.num_heads, self.head_dim
    x_BTNX = PerHead(shape_RNH, self.dtype, KERNEL_INIT, name=name)(einsum, x_BTNX)
    return sharding.constrain(x_BTNX, QUERY_AXES)

  def _dropout(self, deterministic: bool) -> Callable[[Array], Array]:
    """Returns dropout on the probabilities; all queries of a row drop the same keys."""
    if deterministic or self.dropout_rate == 0.0:
      return lambda probs_BKGTS: probs_BKGTS
    rng = self.make_rng('dropout')
    keep_rate = 1.0 - self.dropout_rate

    def dropout(probs_BKGTS):
      probs_BKGTS = probs_BKGTS.astype(self.dtype)
      B, K, G, _, S = probs_BKGTS.shape
      keep = jax.random.bernoulli(rng, keep_rate, (B, K, G, 1, S))
      return probs_BKGTS * (keep / keep_rate).astype(self.dtype)

    return dropout
