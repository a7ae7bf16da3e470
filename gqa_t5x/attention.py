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
from flax.linen import partitioning as nn_partitioning
from jax import lax

from gqa_t5x import axes, kv_cache

Array = jax.Array
DType = Any
Initializer = Callable[..., Array]

param_with_axes = nn_partitioning.param_with_axes
with_sharding_constraint = nn_partitioning.with_sharding_constraint

# Masked logits get this value, as in T5X: a fully masked row stays finite.
MASKED_LOGIT = -1e10


def check_heads(num_heads: int, num_kv_heads: int) -> None:
  """Checks that K divides N.

  Args:
    num_heads: N.
    num_kv_heads: K.

  Raises:
    ValueError: if it does not; names the numbers that would do.
  """
  if num_heads < 1:
    raise ValueError(f'num_heads={num_heads} must be at least 1.')
  if not 1 <= num_kv_heads <= num_heads or num_heads % num_kv_heads:
    divisors = [k for k in range(1, num_heads + 1) if num_heads % k == 0]
    raise ValueError(
      f'num_heads={num_heads} is not divisible by num_kv_heads={num_kv_heads};'
      f' choose one of {", ".join(map(str, divisors))}.'
    )


def grouped_attention(
  q_BTNH: Array,
  k_BKHS: Array,
  v_BKSH: Array,
  *,
  mask: Array | None = None,
  bias: Array | None = None,
  float32_logits: bool = False,
  dropout: Callable[[Array], Array] = lambda probs_BKGTS: probs_BKGTS,
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

  Returns:
    `[B, T, N, H]` in the dtype of the queries.

  Raises:
    ValueError: if K does not divide N.

  Source: GQA, section 2.2.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BKHS.shape[1]
  check_heads(N, K)
  q_BKGTH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3)
  logits_BKGTS = jnp.einsum(
    'BKGTH,BKHS->BKGTS',
    q_BKGTH,
    k_BKHS,
    preferred_element_type=jnp.float32 if float32_logits else None,
  )
  if bias is not None:
    bias_BKGTS = bias.reshape(-1, K, N // K, *bias.shape[2:])
    logits_BKGTS += bias_BKGTS.astype(logits_BKGTS.dtype)
  if mask is not None:
    logits_BKGTS = jnp.where(mask[:, :, None], logits_BKGTS, MASKED_LOGIT)
  probs_BKGTS = dropout(jax.nn.softmax(logits_BKGTS).astype(q_BTNH.dtype))
  out_BKGTH = jnp.einsum('BKGTS,BKSH->BKGTH', probs_BKGTS, v_BKSH)
  return jnp.moveaxis(out_BKGTH, 3, 1).reshape(B, T, N, H)


class Dense(nn.Module):
  """A linear map without bias; parameters are float32, arithmetic is `dtype`.

  Attributes:
    features: output width.
    kernel_axes: logical axes of the `[in, out]` kernel.
    dtype: activation dtype.
    kernel_init: initialiser.
  """

  features: int
  kernel_axes: tuple[str, str]
  dtype: DType = jnp.float32
  kernel_init: Initializer = nn.initializers.variance_scaling(
    1.0, 'fan_in', 'truncated_normal'
  )

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[..., in]` to `[..., features]`.

    A transposed kernel in the collection `transposed` takes the place of the parameter
    (see decoding.py).
    """
    if self.has_variable('transposed', 'kernel'):
      y_FR = self._dot(
        self.get_variable('transposed', 'kernel'), x.reshape(-1, x.shape[-1]).T
      )
      # Without the barrier the compiler turns the product round again.
      return lax.optimization_barrier(y_FR).T.reshape(*x.shape[:-1], self.features)
    kernel = param_with_axes(
      'kernel',
      self.kernel_init,
      (x.shape[-1], self.features),
      jnp.float32,
      axes=self.kernel_axes,
    )
    return self._dot(x, kernel)

  def _dot(self, x: Array, y: Array) -> Array:
    if x.dtype == y.dtype and jnp.promote_types(x.dtype, self.dtype) == self.dtype:
      # Of bfloat16 parameters a wider copy would be written and read at every step.
      return jnp.dot(x, y, preferred_element_type=self.dtype)
    return jnp.dot(x.astype(self.dtype), y.astype(self.dtype))


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
      cache_index: self-attention while decoding: how many positions are cached
        (see kv_cache.py); S is then the cache's length. Without a cache in the
        variables, a zero one of length T is made, and not written.
      deterministic: True turns dropout off.

    Returns:
      `[B, T, D]`.

    Raises:
      ValueError: if K does not divide N, or the mask is not as long as the cache.
    """
    check_heads(self.num_heads, self.num_kv_heads)
    B, T, D = inputs_q.shape
    q_BTNH = self._project_q(inputs_q)
    decoding = cache_index is not None or self.has_variable('encoded_kv', 'key')
    if cache_index is None:
      k_BKHS, v_BKSH = self._kept_keys_and_values(inputs_kv)
    else:
      k_BKHS, v_BKSH = self._append_to_cache(inputs_kv, cache_index, mask)
    out_BTNH = grouped_attention(
      q_BTNH.reshape(k_BKHS.shape[0], -1, *q_BTNH.shape[2:]),
      k_BKHS,
      v_BKSH,
      mask=mask,
      bias=bias,
      float32_logits=self.float32_logits or decoding,
      dropout=self._dropout(deterministic),
    )
    return Dense(
      D, (axes.JOINED_HEADS, axes.EMBED), self.dtype, self.kernel_init, name='out'
    )(out_BTNH.reshape(B, T, self.num_heads * self.head_dim))

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
    return with_sharding_constraint(
      q_BTNH, (axes.BATCH, axes.LENGTH, axes.HEADS, axes.HEAD_DIM)
    )

  def _kept_keys_and_values(self, inputs_kv: Array) -> tuple[Array, Array]:
    """Returns K and V of the inputs, kept from an earlier call or computed now."""
    if self.has_variable('encoded_kv', 'key'):
      get = self.get_variable
      return get('encoded_kv', 'key'), get('encoded_kv', 'value')
    k_BKHS, v_BKSH = self._project_kv(inputs_kv)
    if self.is_mutable_collection('encoded_kv') and not self.is_initializing():
      self.put_variable('encoded_kv', 'key', k_BKHS)
      self.put_variable('encoded_kv', 'value', v_BKSH)
    return k_BKHS, v_BKSH

  def _project_kv(self, inputs_kv: Array) -> tuple[Array, Array]:
    """Projects `[B, S, D]` to keys `[B, K, H, S]` and values `[B, K, S, H]`."""
    kv_heads, joined_kv_heads = axes.kv_axes(self.num_heads, self.num_kv_heads)

    def project(name):
      x_BSD = Dense(
        self.num_kv_heads * self.head_dim,
        (axes.EMBED, joined_kv_heads),
        self.dtype,
        self.kernel_init,
        name=name,
      )(inputs_kv)
      return x_BSD.reshape(*x_BSD.shape[:2], self.num_kv_heads, self.head_dim)

    k_BKHS = with_sharding_constraint(
      jnp.einsum('BSKH->BKHS', project('key')),
      (axes.BATCH, kv_heads, axes.HEAD_DIM, axes.LENGTH),
    )
    v_BKSH = with_sharding_constraint(
      jnp.einsum('BSKH->BKSH', project('value')),
      (axes.BATCH, kv_heads, axes.LENGTH, axes.HEAD_DIM),
    )
    return k_BKHS, v_BKSH

  def _append_to_cache(
    self, inputs_kv: Array, cache_index: Array, mask: Array
  ) -> tuple[Array, Array]:
    """Writes K and V of new tokens into the cache and returns the whole of it."""
    exists = self.has_variable('cache', 'cached_key')
    if exists:  # Beams of one input share its row.
      B = self.get_variable('cache', 'cached_key').shape[0]
      num_beams = inputs_kv.shape[0] // B
      inputs_kv = inputs_kv.reshape(B, -1, inputs_kv.shape[-1])
    k_BKHT, v_BKTH = self._project_kv(inputs_kv)
    cached_key = self.variable('cache', 'cached_key', jnp.zeros_like, k_BKHT)
    cached_value = self.variable('cache', 'cached_value', jnp.zeros_like, v_BKTH)
    if not exists:  # T5X's first call, on tokens that are all ones: only shapes count.
      return k_BKHT, v_BKTH
    cache_length = cached_value.value.shape[2]
    if mask.shape[-1] != cache_length:
      raise ValueError(
        f'The cache was made for {cache_length} positions, but this call is for'
        f' {mask.shape[-1]}; pass max_decode_length={cache_length}.'
      )
    start = cache_index * num_beams
    cached_key.value = kv_cache.write(cached_key.value, k_BKHT, start, axis=3)
    cached_value.value = kv_cache.write(cached_value.value, v_BKTH, start, axis=2)
    return cached_key.value, cached_value.value

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
