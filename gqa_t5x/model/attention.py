"""Grouped-query attention (GQA, Ainslie et al. 2023, arXiv 2305.13245).

K key/value heads serve N query heads, G = N / K each: K = N is multi-head, K = 1
multi-query attention, and one path computes them all. Letters as in axes.py:

  B batch   T query length   S key/value length   D model width
  N query heads   K key/value heads   G = N / K   H head size
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from gqa_t5x.model import axes, decode_cache, recent, sharding, tpu_matvec
from gqa_t5x.model.dense import Dense

Array = jax.Array
DType = Any
Initializer = Callable[..., Array]

# Masked logits get this value, as in T5X: a fully masked row stays finite.
MASKED_LOGIT = -1e10
INPUT_AXES = (axes.BATCH, axes.LENGTH, axes.EMBED)
QUERY_AXES = (axes.BATCH, axes.LENGTH, axes.HEADS, axes.HEAD_DIM)


def grouped_attention(
  q_BTNH: Array,
  k_BKHS: Array,
  v_BKSH: Array,
  *,
  mask: Array | None = None,
  bias: Array | None = None,
  float32_logits: bool = False,
  dropout: Callable[[Array], Array] = lambda probs_BKGTS: probs_BKGTS,
  beside: tuple[Array, Array] | None = None,
) -> Array:
  """Attends from N query heads to K key/value heads.

  Query head n reads key/value head n // G. T5 does not divide the logits by
  sqrt(H): the query initialiser does.

  Args:
    q_BTNH: queries.
    k_BKHS: keys, each head transposed: so both products read rows.
    v_BKSH: values.
    mask: bool, broadcastable to `[B, 1, T, S]`; True where a query may look.
    bias: `[B or 1, N, T or 1, S]`, added to the logits.
    float32_logits: accumulate logits and softmax in float32 whatever the dtype.
    dropout: applied to the probabilities `[B, K, G, T, S]`.
    beside: keys and values of P more positions; S is then S + P in mask and bias.

  Returns:
    `[B, T, N, H]` in the dtype of the queries.

  Raises:
    ValueError: if K does not divide N.

  Source: GQA, section 2.2.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BKHS.shape[1]
  axes.check_heads(N, K)
  q_BKGTH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3)
  logits_dtype = jnp.float32 if float32_logits else None
  logits_BKGTS = _logits(q_BKGTH, k_BKHS, logits_dtype)
  if beside is not None:
    others_BKGTP = _logits(q_BKGTH, beside[0], logits_dtype)
    logits_BKGTS = jnp.concatenate([logits_BKGTS, others_BKGTP], axis=-1)
  if bias is not None:
    bias_BKGTS = bias.reshape(-1, K, N // K, *bias.shape[2:])
    logits_BKGTS += bias_BKGTS.astype(logits_BKGTS.dtype)
  if mask is not None:
    logits_BKGTS = jnp.where(mask[:, :, None], logits_BKGTS, MASKED_LOGIT)
  probs_BKGTS = dropout(jax.nn.softmax(logits_BKGTS).astype(q_BTNH.dtype))
  S = v_BKSH.shape[2]
  out_BKGTH = _weighted_sum(probs_BKGTS[..., :S], v_BKSH)
  if beside is not None:
    out_BKGTH += _weighted_sum(probs_BKGTS[..., S:], beside[1])
  return jnp.moveaxis(out_BKGTH, 3, 1).reshape(B, T, N, H)


def _logits(q_BKGTH: Array, k_BKHS: Array, dtype: DType) -> Array:
  if _one_query(q_BKGTH):
    logits_BKS = tpu_matvec.logits(q_BKGTH[:, :, 0, 0], k_BKHS, dtype)
    return logits_BKS[:, :, None, None]
  return jnp.einsum('BKGTH,BKHS->BKGTS', q_BKGTH, k_BKHS, preferred_element_type=dtype)


def _weighted_sum(probs_BKGTS: Array, v_BKSH: Array) -> Array:
  if _one_query(probs_BKGTS):
    out_BKH = tpu_matvec.weighted_sum(probs_BKGTS[:, :, 0, 0], v_BKSH)
    return out_BKH[:, :, None, None]
  return jnp.einsum('BKGTS,BKSH->BKGTH', probs_BKGTS, v_BKSH)


def _one_query(x_BKGT: Array) -> bool:
  return x_BKGT.shape[2] * x_BKGT.shape[3] == 1 and sharding.platform() == 'tpu'


class GroupedQueryAttention(nn.Module):
  """Projections, decode cache and dropout around `grouped_attention`.

  Attributes:
    num_heads: N.
    num_kv_heads: K, a divisor of N.
    head_dim: H.
    dtype: activation dtype.
    dropout_rate: dropout on the probabilities, broadcast over query length.
    float32_logits: see `grouped_attention`; steps of decoding.py do so in any case.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  dtype: DType = jnp.float32
  dropout_rate: float = 0.0
  float32_logits: bool = False
  kernel_init: Initializer = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')

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
    """Applies attention.

    While decoding, self-attention appends to its keys and values in the collection
    `cache`. Cross-attention keeps its own, for all later calls, in the collection
    `encoded_kv` if a caller makes that mutable, and computes them anew if not.

    Rows may share keys and values: where those have fewer rows, as beams and samples
    of one input do, the queries of neighbouring rows stand side by side as if they
    were positions of one row. Nothing is repeated.

    Args:
      inputs_q: `[B, T, D]`.
      inputs_kv: `[B, S, D]`, the same as `inputs_q` in self-attention; ignored once
        `encoded_kv` holds K and V.
      mask: bool `[B or 1, 1, T or 1, S]`, B and T as after sharing.
      bias: `[B or 1, N, T or 1, S]`, the same.
      cache_index: self-attention while decoding: where new tokens go, in the cache
        (see kv_cache.py) or beside it (recent.py); S is then of all that is kept.
        Without a cache in the variables, a zero one of length T is made, and not
        written.
      deterministic: True turns dropout off.

    Returns:
      `[B, T, D]`.

    Raises:
      ValueError: if K does not divide N, or the mask is not as long as the cache.
    """
    axes.check_heads(self.num_heads, self.num_kv_heads)
    B, T, D = inputs_q.shape
    q_BTNH = self._project_q(sharding.constrain(inputs_q, INPUT_AXES))
    decoding = cache_index is not None or self.has_variable('encoded_kv', 'key')
    if cache_index is None:
      (k_BKHS, v_BKSH), beside = self._kept_keys_and_values(inputs_kv), None
    else:
      k_BKHS, v_BKSH, beside = self._append_to_cache(inputs_kv, cache_index, mask)
    meeting_axes = self._kept_axes if decoding else QUERY_AXES
    q_BTNH = q_BTNH.reshape(k_BKHS.shape[0], -1, *q_BTNH.shape[2:])
    out_BTNH = grouped_attention(
      sharding.constrain(q_BTNH, meeting_axes),
      k_BKHS,
      v_BKSH,
      mask=mask,
      bias=bias,
      float32_logits=self.float32_logits or decoding,
      dropout=self._dropout(deterministic),
      beside=beside,
    )
    out_BTNH = sharding.constrain(out_BTNH, meeting_axes)
    return self._project_out(out_BTNH.reshape(B, T, *out_BTNH.shape[2:]), D)

  @property
  def _kept_axes(self) -> tuple[str, ...]:
    """Axes of queries and outputs where keys and values lie that are kept.

    Queries and outputs go there, never the reverse.
    """
    _, _, heads = axes.kv_axes(self.num_heads, self.num_kv_heads)
    return axes.CACHE_BATCH, axes.LENGTH, heads, axes.HEAD_DIM

  def _project_q(self, inputs_q: Array) -> Array:
    """Projects `[B, T, D]` to `[B, T, N, H]`; the initialiser holds 1 / sqrt(H)."""
    kernel_init = self.kernel_init

    def query_init(*args):
      return kernel_init(*args) / jnp.sqrt(self.head_dim).astype(self.dtype)

    q_BTNH = Dense(
      self.num_heads * self.head_dim,
      (axes.EMBED, axes.JOINED_HEADS),
      self.dtype,
      query_init,
      name='query',
    )(inputs_q).reshape(*inputs_q.shape[:2], self.num_heads, self.head_dim)
    return sharding.constrain(q_BTNH, QUERY_AXES)

  def _project_out(self, out_BTNH: Array, D: int) -> Array:
    """Projects `[B, T, N, H]` to `[B, T, D]`."""
    out_BTNH = sharding.constrain(out_BTNH, QUERY_AXES)
    return Dense(
      D, (axes.JOINED_HEADS, axes.EMBED), self.dtype, self.kernel_init, name='out'
    )(out_BTNH.reshape(*out_BTNH.shape[:2], -1))

  def _kept_keys_and_values(self, inputs_kv: Array) -> tuple[Array, Array]:
    """Returns K and V of the inputs, kept from an earlier call or computed now."""
    if self.has_variable('encoded_kv', 'key'):
      get = self.get_variable
      return get('encoded_kv', 'key'), get('encoded_kv', 'value')
    keep = self.is_mutable_collection('encoded_kv') and not self.is_initializing()
    batch = axes.CACHE_BATCH if keep else axes.BATCH
    k_BKHS, v_BKSH = self._project_kv(inputs_kv, batch)
    if keep:
      self.put_variable('encoded_kv', 'key', k_BKHS)
      self.put_variable('encoded_kv', 'value', v_BKSH)
    return k_BKHS, v_BKSH

  def _project_kv(self, inputs_kv: Array, batch: str) -> tuple[Array, Array]:
    """Projects `[B, S, D]` to keys `[B, K, H, S]` and values `[B, K, S, H]`."""
    _, joined_kv_heads, _ = axes.kv_axes(self.num_heads, self.num_kv_heads)
    # Or the layout of what is kept would spread to all activations.
    inputs_kv = sharding.constrain(inputs_kv, INPUT_AXES)

    def project(name):
      x_BSD = Dense(
        self.num_kv_heads * self.head_dim,
        (axes.EMBED, joined_kv_heads),
        self.dtype,
        self.kernel_init,
        name=name,
      )(inputs_kv)
      return x_BSD.reshape(*x_BSD.shape[:2], self.num_kv_heads, self.head_dim)

    return self._constrain_kv(
      jnp.einsum('BSKH->BKHS', project('key')),
      jnp.einsum('BSKH->BKSH', project('value')),
      batch,
    )

  def _constrain_kv(
    self, k_BKHS: Array, v_BKSH: Array, batch: str
  ) -> tuple[Array, Array]:
    """Shards keys and values; `batch` is the logical axis of their rows."""
    kv_heads, _, _ = axes.kv_axes(self.num_heads, self.num_kv_heads)
    return (
      sharding.constrain(k_BKHS, (batch, kv_heads, axes.HEAD_DIM, axes.LENGTH)),
      sharding.constrain(v_BKSH, (batch, kv_heads, axes.LENGTH, axes.HEAD_DIM)),
    )

  def _append_to_cache(
    self, inputs_kv: Array, cache_index: Array, mask: Array
  ) -> tuple[Array, Array, tuple[Array, Array] | None]:
    """Writes K and V of new tokens into the cache, or beside it (recent.py).

    Returns the cache's keys, its values, and both of what is beside it.
    """
    if not self.has_variable('cache', 'cached_key'):
      # T5X's first call, on tokens that are all ones: only shapes count.
      k_BKHT, v_BKTH = self._project_kv(inputs_kv, axes.CACHE_BATCH)
      self._put_cache(jnp.zeros_like(k_BKHT), jnp.zeros_like(v_BKTH))
      return k_BKHT, v_BKTH, None
    cached_key = self.get_variable('cache', 'cached_key')
    cached_value = self.get_variable('cache', 'cached_value')
    B = cached_key.shape[0]  # Beams of one input share its row.
    k_BKHT, v_BKTH = self._project_kv(
      inputs_kv.reshape(B, -1, inputs_kv.shape[-1]), axes.CACHE_BATCH
    )
    num_beams = inputs_kv.shape[0] // B
    if self.has_variable('cache', 'recent_key'):
      beside = (
        self._put_recent('recent_key', jnp.einsum('BKHn->BnKH', k_BKHT), cache_index),
        self._put_recent('recent_value', jnp.einsum('BKnH->BnKH', v_BKTH), cache_index),
      )
      return cached_key, cached_value, beside
    if mask.shape[-1] != cached_key.shape[3]:
      raise ValueError(
        f'The cache was made for {cached_key.shape[3]} positions, but this call is for'
        f' {mask.shape[-1]}; pass max_decode_length={cached_key.shape[3]}.'
      )
    index = cache_index * num_beams
    return *self._put_cache(
      decode_cache.write(cached_key, k_BKHT, index, axis=3),
      decode_cache.write(cached_value, v_BKTH, index, axis=2),
    ), None

  def _put_recent(self, name: str, new_BnKH: Array, index: Array) -> Array:
    """Keeps a new token's keys or values beside the cache; returns all that are."""
    x_PBnKH = self.get_variable('cache', name)
    x_PBnKH = lax.dynamic_update_index_in_dim(
      x_PBnKH, new_BnKH.astype(x_PBnKH.dtype), index, axis=0
    )
    kv_heads, _, _ = axes.kv_axes(self.num_heads, self.num_kv_heads)
    recent_axes = (None, axes.CACHE_BATCH, None, kv_heads, axes.HEAD_DIM)
    x_PBnKH = sharding.constrain(x_PBnKH, recent_axes)
    self.put_variable('cache', name, x_PBnKH)
    return recent.in_order(name, x_PBnKH)

  def _put_cache(self, k_BKHS: Array, v_BKSH: Array) -> tuple[Array, Array]:
    k_BKHS, v_BKSH = self._constrain_kv(k_BKHS, v_BKSH, axes.CACHE_BATCH)
    self.put_variable('cache', 'cached_key', k_BKHS)
    self.put_variable('cache', 'cached_value', v_BKSH)
    return k_BKHS, v_BKSH

  def _dropout(self, deterministic: bool) -> Callable[[Array], Array]:
    """Returns dropout on the probabilities; all queries of a row drop the same keys."""
    if deterministic or self.dropout_rate == 0.0:
      return lambda probs_BKGTS: probs_BKGTS
    rng = self.make_rng('dropout')
    keep_rate = 1.0 - self.dropout_rate

    def dropout(probs_BKGTS):
      B, K, G, _, S = probs_BKGTS.shape
      keep = jax.random.bernoulli(rng, keep_rate, (B, K, G, 1, S))
      return probs_BKGTS * (keep / keep_rate).astype(probs_BKGTS.dtype)

    return dropout
