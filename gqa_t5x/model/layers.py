"""T5 around attention: norm, MLP, embedding, position bias, and whole layers.

Parameter names, shapes, initialisers and arithmetic are those of T5X's minimal
T5.1.1, so that a checkpoint of one is a checkpoint of the other.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.partitioning import param_with_axes
from jax import Array, lax

from gqa_t5x.model import attention, axes, decode_cache, quantize, sharding
from gqa_t5x.model.dense import Dense


class LayerNorm(nn.Module):
  """T5's layer norm of `[..., D]`: root mean square only, no bias; float32 inside."""

  dtype: Any = jnp.float32
  epsilon: float = 1e-6  # Added to the mean square.

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = x.astype(jnp.float32)
    scale = param_with_axes(
      'scale', nn.initializers.ones, (x.shape[-1],), jnp.float32, axes=(axes.EMBED,)
    )
    mean_square = jnp.mean(lax.square(x), axis=-1, keepdims=True)
    y = (x * lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)
    return y * scale.astype(self.dtype)


class MlpBlock(nn.Module):
  """T5's MLP: the product of activations of parallel maps, then `wo`."""

  mlp_dim: int
  activations: Sequence[str]  # Of each map: 'linear', or a function of `flax.linen`.
  dropout_rate: float = 0.0  # On the hidden units, broadcast over length.
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BTD: Array, deterministic: bool = False) -> Array:
    branches = []
    for i, activation in enumerate(self.activations):
      name = 'wi' if len(self.activations) == 1 else f'wi_{i}'
      h = Dense(self.mlp_dim, (axes.EMBED, axes.MLP), self.dtype, name=name)(x_BTD)
      branches.append(h if activation == 'linear' else getattr(nn, activation)(h))
    h_BTF = functools.reduce(operator.mul, branches)
    h_BTF = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
      h_BTF, deterministic=deterministic
    )
    h_BTF = sharding.constrain(h_BTF, (axes.BATCH, axes.LENGTH, axes.MLP))
    return Dense(x_BTD.shape[-1], (axes.MLP, axes.EMBED), self.dtype, name='wo')(h_BTF)


class Embed(nn.Module):
  """The token table shared by encoder and decoder."""

  vocab_size: int
  emb_dim: int
  dtype: Any = jnp.float32

  def setup(self):
    self.embedding = param_with_axes(
      'embedding',
      nn.initializers.normal(stddev=1.0),
      (self.vocab_size, self.emb_dim),
      jnp.float32,
      axes=(axes.VOCAB, axes.EMBED),
    )

    self.scale_V = self.get_variable('params', 'embedding' + quantize.SCALE)

  def __call__(self, tokens: Array) -> Array:
    """Looks up int `[B, T]`; returns `[B, T, D]`."""
    tokens = tokens.astype(jnp.int32)  # t5x.eval and t5x.infer initialise with floats.
    x_BTD = jnp.take(self.embedding, tokens, axis=0, mode='clip')
    if self.scale_V is not None:
      x_BTD = x_BTD * jnp.take(self.scale_V, tokens, mode='clip')[..., None]
    x_BTD = x_BTD.astype(self.dtype)
    return sharding.constrain(x_BTD, (axes.BATCH, axes.LENGTH, axes.EMBED))

  def attend(self, x_BTD: Array) -> Array:
    """Returns float32 logits `[B, T, V]` against the table."""
    logits_BTV = jnp.dot(x_BTD.astype(jnp.float32), self.embedding.T)
    return quantize.scaled(logits_BTV, self.scale_V)


def relative_position_buckets(
  bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> np.ndarray:
  """Returns the bucket of every relative position, as a table made once in NumPy.

  Half of the buckets hold one distance each, the rest grow logarithmically; all
  distances of `max_distance` tokens and more share the last. Bidirectional attention
  splits the buckets between the two directions; causal attention has none for the
  future (bucket 0).

  Returns:
    int32 `[2 * max_distance + 1]`; entry `max_distance + d` is the bucket of key
    position minus query position = d, d clipped to +-max_distance.

  Source: T5 (Raffel et al. 2020, section 2.1).
  """
  d = np.arange(-max_distance, max_distance + 1, dtype=np.int32)
  half = num_buckets // 2 if bidirectional else num_buckets
  distance = np.abs(d) if bidirectional else np.maximum(-d, 0)
  exact = half // 2
  # float32 and the epsilon are T5X's: they decide on which side a boundary falls.
  log_ratio = np.log(
    distance.astype(np.float32) / exact + np.finfo(np.float32).eps
  ) / np.log(max_distance / exact)
  far = np.minimum(exact + (log_ratio * (half - exact)).astype(np.int32), half - 1)
  bucket = np.where(distance < exact, distance, far)
  if bidirectional:
    bucket = bucket + np.where(d > 0, half, 0)
  return bucket.astype(np.int32)


class RelativePositionBiases(nn.Module):
  """T5's learned attention bias by relative position, one value a head."""

  num_heads: int
  bidirectional: bool
  dtype: Any = jnp.float32
  num_buckets: int = 32
  max_distance: int = 128  # tokens

  @nn.compact
  def __call__(self, query_positions_BT: Array, key_positions_S: Array) -> Array:
    """Returns biases `[B or 1, N, T, S]` by int32 positions."""
    table_NR = param_with_axes(
      'rel_embedding',
      nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform'),
      (self.num_heads, self.num_buckets),
      jnp.float32,
      axes=(axes.HEADS, axes.RELPOS_BUCKETS),
    )
    distance_BTS = key_positions_S - query_positions_BT[..., None]
    most = self.max_distance
    table = relative_position_buckets(self.bidirectional, self.num_buckets, most)
    bucket_BTS = jnp.take(table, jnp.clip(distance_BTS, -most, most) + most)
    bias_NBTS = jnp.take(table_NR.astype(self.dtype), bucket_BTS, axis=1)
    return jnp.swapaxes(bias_NBTS, 0, 1)


class EncoderLayer(nn.Module):
  """Self-attention and MLP, each behind a layer norm and with a residual."""

  config: Any  # A `network.T5Config`, as in all that follows.

  @nn.compact
  def __call__(self, x_BTD, at, shared, deterministic):
    cfg = self.config
    mask, bias = shared or mask_and_bias(cfg, at, bidirectional=True)
    y = layer_norm(cfg, 'pre_attention_layer_norm')(x_BTD)
    y = _attention(cfg, cfg.encoder_kv, cfg.head_dim, 'attention')(
      y, y, mask, bias, deterministic=deterministic
    )
    x_BTD = x_BTD + dropout(cfg, y, deterministic)
    return x_BTD + _mlp(cfg, x_BTD, deterministic)


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention and MLP."""

  config: Any

  @nn.compact
  def __call__(self, x_BTD, encoded_BSD, cross_mask, at, shared, deterministic):
    cfg = self.config
    mask, bias = shared or mask_and_bias(cfg, at, bidirectional=False)
    y = layer_norm(cfg, 'pre_self_attention_layer_norm')(x_BTD)
    int8_kv = quantize.of_cache(cfg.quantize)
    y = _attention(cfg, cfg.self_kv, cfg.kv_size, 'self_attention', int8_kv)(
      y, y, mask, bias, cache_index=at.index, deterministic=deterministic
    )
    x_BTD = x_BTD + dropout(cfg, y, deterministic)
    y = layer_norm(cfg, 'pre_cross_attention_layer_norm')(x_BTD)
    cross = _attention(
      cfg, cfg.cross_kv, cfg.kv_size, 'encoder_decoder_attention', int8_kv
    )
    y = cross(y, encoded_BSD, cross_mask, deterministic=deterministic)
    x_BTD = x_BTD + dropout(cfg, y, deterministic)
    return x_BTD + _mlp(cfg, x_BTD, deterministic)


def _attention(
  cfg: Any, num_kv_heads: int, kv_head_dim: int, name: str, int8_kv: bool = False
) -> nn.Module:
  return attention.GroupedQueryAttention(
    num_heads=cfg.num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=cfg.head_dim,
    kv_head_dim=kv_head_dim,
    dtype=cfg.dtype,
    dropout_rate=cfg.dropout_rate,
    float32_logits=cfg.float32_attention_logits,
    int8_kv=int8_kv,
    name=name,
  )


def layer_norm(cfg: Any, name: str) -> nn.Module:
  return LayerNorm(cfg.dtype, cfg.layer_norm_epsilon, name=name)


def shared_mask_and_bias(
  cfg: Any, at: decode_cache.Positions, bidirectional: bool
) -> tuple[Array, Array] | None:
  """Returns what a stack's layers share; None where each has a bias of its own."""
  return None if cfg.relpos_per_layer else mask_and_bias(cfg, at, bidirectional)


def mask_and_bias(
  cfg: Any, at: decode_cache.Positions, bidirectional: bool
) -> tuple[Array, Array]:
  """Returns mask and position bias of self-attention, by the slots of its keys.

  The table of the bias is a parameter of the module that calls.
  """
  bias = RelativePositionBiases(
    num_heads=cfg.num_heads,
    bidirectional=bidirectional,
    num_buckets=cfg.relpos_num_buckets,
    max_distance=cfg.relpos_max_distance,
    dtype=cfg.dtype,
    name='relpos_bias',
  )(at.queries_BT, at.keys_S)
  mask, bias = at.by_slot(bias)
  if at.index is not None:  # While decoding it lies where keys and values do.
    _, _, heads = axes.kv_axes(cfg.num_heads, cfg.self_kv)
    free = jax.sharding.PartitionSpec.UNCONSTRAINED
    bias = sharding.constrain(bias, (free, heads, free, free))
  return mask, bias


def _mlp(cfg: Any, x_BTD: Array, deterministic: bool) -> Array:
  y = layer_norm(cfg, 'pre_mlp_layer_norm')(x_BTD)
  y = MlpBlock(
    cfg.mlp_dim, cfg.mlp_activations, cfg.dropout_rate, cfg.dtype, name='mlp'
  )(y, deterministic)
  return dropout(cfg, y, deterministic)


def dropout(cfg: Any, x_BTD: Array, deterministic: bool) -> Array:
  """Dropout that T5 broadcasts over the length."""
  return nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))(
    x_BTD, deterministic=deterministic
  )
