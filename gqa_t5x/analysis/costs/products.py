"""The matrix products of a forward pass, summed: FLOPs, and bytes they touch.

They are nearly all of the arithmetic: norms, softmax, activations and biases are left
out. Bytes are those of each product alone, operands read once and result written
once, as if no two were fused. Letters as in axes.py.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from gqa_t5x.model.network import T5Config

# Logits over the vocabulary, and the product that makes them, are always float32.
FLOAT32_BYTES = 4


class Products(NamedTuple):
  """A sum over matrix products.

  Attributes:
    flops: FLOPs, 2 a multiply-add.
    weights: elements of kernels.
    activation_bytes: bytes of all other operands and of results.
  """

  flops: int
  weights: int
  activation_bytes: int


def total(parts: Iterable[Products], times: int = 1) -> Products:
  """Adds up.

  Args:
    parts: the sums to add.
    times: how often they all occur.

  Returns:
    Their sum.
  """
  return Products(*(times * sum(column) for column in zip(*parts, strict=True)))


def encoder(cfg: T5Config, batch_size: int, S: int) -> Products:
  """Returns the products of the encoder.

  Args:
    cfg: the configuration.
    batch_size: B.
    S: input length.

  Returns:
    Their sum over all layers.

  Source: Vaswani et al. 2017; T5.1.1's gated MLP.
  """
  tokens = batch_size * S
  layer = (
    _query_and_out(cfg, tokens),
    _key_and_value(cfg, tokens, cfg.encoder_kv),
    _attend(cfg, batch_size, S, S, cfg.encoder_kv),
    _mlp(cfg, tokens),
  )
  return total(layer, cfg.num_encoder_layers)


def cross_kv(cfg: T5Config, batch_size: int, S: int) -> Products:
  """Returns the products that make cross-attention K and V of encoded inputs.

  Args:
    cfg: the configuration.
    batch_size: B.
    S: input length.

  Returns:
    Their sum over all layers.

  Source: GQA, section 2.2.
  """
  layer = _key_and_value(cfg, batch_size * S, cfg.cross_kv)
  return total([layer], cfg.num_decoder_layers)


def decoder(cfg: T5Config, rows: int, T: int, self_keys: int, S: int) -> Products:
  """Returns the products of the decoder with its logits, given cross K and V.

  Args:
    cfg: the configuration.
    rows: sequences; each counts cross K and V of its own.
    T: new tokens of each: 1 in a decode step.
    self_keys: positions that each token's self-attention computes, masked or not.
    S: input length.

  Returns:
    Their sum over all layers.

  Source: Vaswani et al. 2017; GQA, section 2.2; T5.1.1's gated MLP.
  """
  tokens = rows * T
  layer = (
    _query_and_out(cfg, tokens),
    _key_and_value(cfg, tokens, cfg.self_kv),
    _attend(cfg, rows, T, self_keys, cfg.self_kv),
    _query_and_out(cfg, tokens),
    _attend(cfg, rows, T, S, cfg.cross_kv),
    _mlp(cfg, tokens),
  )
  logits = _dense(tokens, cfg.emb_dim, cfg.vocab_size, FLOAT32_BYTES)
  return total([total(layer, cfg.num_decoder_layers), logits])


def _query_and_out(cfg: T5Config, tokens: int) -> Products:
  one = _dense(tokens, cfg.emb_dim, cfg.num_heads * cfg.head_dim, _itemsize(cfg))
  return total([one], 2)


def _key_and_value(cfg: T5Config, tokens: int, K: int) -> Products:
  return total([_dense(tokens, cfg.emb_dim, K * cfg.head_dim, _itemsize(cfg))], 2)


def _mlp(cfg: T5Config, tokens: int) -> Products:
  one = _dense(tokens, cfg.emb_dim, cfg.mlp_dim, _itemsize(cfg))
  return total([one], len(cfg.mlp_activations) + 1)


def _dense(tokens: int, fan_in: int, fan_out: int, itemsize: int) -> Products:
  return Products(
    flops=2 * tokens * fan_in * fan_out,
    weights=fan_in * fan_out,
    activation_bytes=itemsize * tokens * (fan_in + fan_out),
  )


def _attend(cfg: T5Config, rows: int, T: int, S: int, K: int) -> Products:
  """Returns the two products of attention: logits, and probabilities times values."""
  N, H, itemsize = cfg.num_heads, cfg.head_dim, _itemsize(cfg)
  logits_itemsize = FLOAT32_BYTES if cfg.float32_attention_logits else itemsize
  logits_or_probs = rows * N * T * S
  vectors = 2 * rows * H * (T * N + S * K)  # Queries and results; keys and values.
  return Products(
    flops=2 * 2 * logits_or_probs * H,
    weights=0,
    activation_bytes=itemsize * vectors
    + (logits_itemsize + itemsize) * logits_or_probs,
  )


def _itemsize(cfg: T5Config) -> int:
  return np.dtype(cfg.dtype).itemsize
