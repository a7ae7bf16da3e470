"""The T5 encoder-decoder with any number of key/value heads, and its configuration.

`Transformer` is what T5X calls: its methods and their argument names are T5X's.
With `num_kv_heads = num_heads` its parameters are those of T5X's own network.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from gqa_t5x.model import axes, decode_cache, layers, quantize
from gqa_t5x.model.dense import Dense
from gqa_t5x.model.sizes import SIZES, VOCAB_SIZE

REMAT_POLICIES = {
  'none': None,
  'minimal': jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
  'full': jax.checkpoint_policies.nothing_saveable,
}


_COUNTS = ('vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim')
_COUNTS += ('num_encoder_layers', 'num_decoder_layers')


@struct.dataclass
class T5Config:
  """Hyperparameters: T5X's fields under T5X's names, then those of this project.

  Attributes:
    num_kv_heads: K of the decoder's attention; None means all heads (MHA).
    self_attention_num_kv_heads, cross_attention_num_kv_heads: K of one kind, if it
      differs.
    encoder_num_kv_heads: K of the encoder; None means all heads, as in the paper.
    kv_head_dim: R, the size of a key/value head of the decoder; None means head_dim.
    relpos_per_layer: every layer has a position bias of its own (umT5); else the layers
      of a stack share one.
    relpos_num_buckets, relpos_max_distance: of relative positions, the latter in
      tokens; Hugging Face's relative_attention_num_buckets and _max_distance.
    layer_norm_epsilon: added to the mean square.
    remat_policy: 'none' recomputes nothing in the backward pass, 'minimal' keeps the
      results of weight matrix products, 'full' keeps only each layer's input.
    quantize: what is int8 (quantize.py): 'weights' (`generate` makes them so), the
      decoder's keys and values ('cache'), 'weights_and_cache'; None: nothing. Not for
      training.

  Raises:
    ValueError: for heads that do not divide, or share more than there is, an unknown
      policy or quantization, and numbers that make no sense.
  """

  vocab_size: int
  dtype: Any = jnp.float32
  emb_dim: int = 512
  num_heads: int = 8
  num_encoder_layers: int = 6
  num_decoder_layers: int = 6
  head_dim: int = 64
  mlp_dim: int = 2048
  mlp_activations: Sequence[str] = ('relu',)
  dropout_rate: float = 0.1
  logits_via_embedding: bool = False
  float32_attention_logits: bool = False
  num_kv_heads: int | None = None
  self_attention_num_kv_heads: int | None = None
  cross_attention_num_kv_heads: int | None = None
  encoder_num_kv_heads: int | None = None
  kv_head_dim: int | None = None
  relpos_per_layer: bool = False
  relpos_num_buckets: int = 32
  relpos_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  remat_policy: str = 'none'
  quantize: str | None = None

  def __post_init__(self):
    for name in _COUNTS:
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if not 4 <= self.relpos_num_buckets < 2 * self.relpos_max_distance:
      raise ValueError(
        f'relpos_num_buckets={self.relpos_num_buckets} must be at least 4, and below'
        f' twice relpos_max_distance={self.relpos_max_distance}.'
      )
    for num_kv_heads in (self.encoder_kv, self.self_kv, self.cross_kv):
      axes.check_heads(self.num_heads, num_kv_heads)
    axes.check_kv_head_dim(self.num_heads, self.head_dim, self.kv_size)
    quantize.check(self.quantize)
    if self.remat_policy not in REMAT_POLICIES:
      known = ', '.join(REMAT_POLICIES)
      raise ValueError(f'remat_policy={self.remat_policy!r}; choose one of {known}.')

  # K of each attention kind.
  @property
  def self_kv(self) -> int:
    return _first(self.self_attention_num_kv_heads, self.num_kv_heads, self.num_heads)

  @property
  def cross_kv(self) -> int:
    return _first(self.cross_attention_num_kv_heads, self.num_kv_heads, self.num_heads)

  @property
  def encoder_kv(self) -> int:
    return _first(self.encoder_num_kv_heads, self.num_heads)

  @property
  def kv_size(self) -> int:
    """R of the decoder's attention; the encoder's is H."""
    return _first(self.kv_head_dim, self.head_dim)


def _first(*numbers: int | None) -> int:
  """Returns the first number that is given; 0 is given, too, and refused."""
  return next(n for n in numbers if n is not None)


def config(size: str, **overrides) -> T5Config:
  """Returns the configuration of a size in `sizes.SIZES`; None overrides nothing."""
  if size not in SIZES:
    raise ValueError(f'size={size!r} is unknown; choose one of {", ".join(SIZES)}.')
  t5_1_1 = dict(
    vocab_size=VOCAB_SIZE, mlp_activations=('gelu', 'linear'), dropout_rate=0.0
  )
  given = {name: value for name, value in overrides.items() if value is not None}
  return T5Config(**(t5_1_1 | SIZES[size] | given))


def _remat(layer: type[nn.Module], cfg: T5Config, static_argnum: int):
  """Returns the layer class, recomputing in the backward pass as configured."""
  if cfg.remat_policy == 'none':
    return layer
  policy = REMAT_POLICIES[cfg.remat_policy]
  return nn.remat(layer, policy=policy, static_argnums=(static_argnum,))


class Encoder(nn.Module):
  """The stack of encoder layers."""

  config: T5Config
  shared_embedding: nn.Module

  @nn.compact
  def __call__(self, tokens_BS: Array, mask: Array, deterministic: bool) -> Array:
    """Encodes int `[B, S]` under a bool mask `[B, 1, S, S]` to `[B, S, D]`."""
    cfg = self.config
    S = tokens_BS.shape[1]
    at = decode_cache.Positions(jnp.arange(S)[None], jnp.arange(S), mask)
    shared = layers.shared_mask_and_bias(cfg, at, bidirectional=True)
    x_BSD = layers.dropout(cfg, self.shared_embedding(tokens_BS), deterministic)
    layer = _remat(layers.EncoderLayer, cfg, static_argnum=4)
    for i in range(cfg.num_encoder_layers):
      x_BSD = layer(cfg, name=f'layers_{i}')(x_BSD, at, shared, deterministic)
    x_BSD = layers.layer_norm(cfg, 'encoder_norm')(x_BSD)
    # Here T5X drops single units, not whole columns.
    return nn.Dropout(cfg.dropout_rate)(x_BSD, deterministic=deterministic)


class Decoder(nn.Module):
  """The stack of decoder layers."""

  config: T5Config
  shared_embedding: nn.Module

  @nn.compact
  def __call__(
    self,
    encoded_BSD: Array,
    tokens_BT: Array,
    self_mask: Array | None,
    cross_mask: Array,
    *,
    deterministic: bool,
    decode: bool = False,
    max_decode_length: int | None = None,
    prefill_lengths: Array | None = None,
  ) -> Array:
    """Returns float32 logits `[B, T, V]`; see `Transformer.decode`."""
    cfg = self.config
    T = tokens_BT.shape[1]
    if decode:
      at = decode_cache.advance(self, T, max_decode_length, prefill_lengths)
    else:
      at = decode_cache.Positions(jnp.arange(T)[None], jnp.arange(T), self_mask)
    shared = layers.shared_mask_and_bias(cfg, at, bidirectional=False)
    x_BTD = layers.dropout(cfg, self.shared_embedding(tokens_BT), deterministic)
    layer = _remat(layers.DecoderLayer, cfg, static_argnum=6)
    for i in range(cfg.num_decoder_layers):
      x_BTD = layer(cfg, name=f'layers_{i}')(
        x_BTD, encoded_BSD, cross_mask, at, shared, deterministic
      )
    x_BTD = layers.layer_norm(cfg, 'decoder_norm')(x_BTD)
    x_BTD = layers.dropout(cfg, x_BTD, deterministic)
    if cfg.logits_via_embedding:
      return self.shared_embedding.attend(x_BTD) / jnp.sqrt(cfg.emb_dim)
    return Dense(
      cfg.vocab_size, (axes.EMBED, axes.VOCAB), jnp.float32, name='logits_dense'
    )(x_BTD)


class Transformer(nn.Module):
  """T5; encode, decode and __call__ take T5X's arguments."""

  config: T5Config

  def setup(self):
    cfg = self.config
    self.shared_embedding = layers.Embed(
      cfg.vocab_size, cfg.emb_dim, cfg.dtype, name='token_embedder'
    )
    self.encoder = Encoder(cfg, self.shared_embedding)
    self.decoder = Decoder(cfg, self.shared_embedding)

  def encode(
    self,
    encoder_input_tokens: Array,
    encoder_segment_ids: Array | None = None,
    enable_dropout: bool = True,
  ) -> Array:
    """Encodes int `[B, S]` (0 is padding), perhaps packed, to `[B, S, D]`."""
    self._check_dropout(enable_dropout)
    mask = _pair_mask(encoder_input_tokens > 0, encoder_input_tokens > 0)
    if encoder_segment_ids is not None:
      mask &= _pair_mask(encoder_segment_ids, encoder_segment_ids, jnp.equal)
    return self.encoder(encoder_input_tokens, mask, deterministic=not enable_dropout)

  def decode(
    self,
    encoded: Array,
    encoder_input_tokens: Array,
    decoder_input_tokens: Array,
    decoder_target_tokens: Array,
    encoder_segment_ids: Array | None = None,
    decoder_segment_ids: Array | None = None,
    decoder_positions: Array | None = None,
    enable_dropout: bool = True,
    decode: bool = False,
    max_decode_length: int | None = None,
    prefill: bool = False,
    prefill_lengths: Array | None = None,
  ) -> Array:
    """Returns float32 logits `[B, T, V]`.

    Args:
      encoded: `[B, S, D]`; ignored once cross-attention K and V are kept.
      encoder_input_tokens, encoder_segment_ids: int `[B, S]`, for masks.
      decoder_input_tokens: int `[B, T]`: targets shifted right, or the next tokens.
      decoder_target_tokens, decoder_segment_ids: int `[B, T]`, for masks, which
        decoding does not need.
      decoder_positions: not used: T5 knows relative positions only.
      decode: use the `cache` collection. The first call makes it (zeros) for T
        positions, each later one appends its tokens.
      max_decode_length: length of the cache; needed for all calls but the first.
      prefill: fill the cache from a prompt in one pass.
      prefill_lengths: int `[B]`, tokens of each prompt; decoding goes on there.

    Raises:
      ValueError: for packed examples while decoding, or a length that is not the
        cache's.
    """
    self._check_dropout(enable_dropout)
    decode = decode or prefill
    if decode and encoder_segment_ids is not None:
      raise ValueError(
        'encoder_segment_ids were given while decoding: packed examples cannot be'
        ' decoded; set pack = False for this dataset.'
      )
    if decode:  # Every token counts, and the decoder masks by position.
      self_mask, cross_mask = None, (encoder_input_tokens > 0)[:, None, None, :]
    else:
      valid = decoder_target_tokens > 0
      cross_mask = _pair_mask(valid, encoder_input_tokens > 0)
      self_mask = _pair_mask(valid, valid) & jnp.tri(valid.shape[1], dtype=bool)
      if decoder_segment_ids is not None:
        self_mask &= _pair_mask(decoder_segment_ids, decoder_segment_ids, jnp.equal)
        cross_mask &= _pair_mask(decoder_segment_ids, encoder_segment_ids, jnp.equal)
    return self.decoder(
      encoded,
      decoder_input_tokens,
      self_mask,
      cross_mask,
      deterministic=not enable_dropout,
      decode=decode,
      max_decode_length=max_decode_length,
      prefill_lengths=prefill_lengths,
    )

  def __call__(
    self,
    encoder_input_tokens: Array,
    decoder_input_tokens: Array,
    decoder_target_tokens: Array,
    encoder_segment_ids: Array | None = None,
    decoder_segment_ids: Array | None = None,
    encoder_positions: Array | None = None,
    decoder_positions: Array | None = None,
    *,
    enable_dropout: bool = True,
    decode: bool = False,
  ) -> Array:
    """Encodes and decodes; arguments and result as in `encode` and `decode`."""
    del encoder_positions
    encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids=encoder_segment_ids,
      decoder_segment_ids=decoder_segment_ids,
      decoder_positions=decoder_positions,
      enable_dropout=enable_dropout,
      decode=decode,
    )

  def _check_dropout(self, enable_dropout: bool) -> None:
    if enable_dropout and self.config.quantize is not None:
      raise ValueError(
        f'quantize={self.config.quantize!r} is for decoding: training needs'
        ' quantize=None, and all else enable_dropout=False.'
      )


def _pair_mask(query_BT: Array, key_BS: Array, compare=jnp.logical_and) -> Array:
  """Compares every query position with every key position: bool `[B, 1, T, S]`."""
  return compare(query_BT[:, None, :, None], key_BS[:, None, None, :])
