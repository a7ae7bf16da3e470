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
  """Adds up what occurs so many times."""
  return Products(*(times * sum(column) for column in zip(*parts, strict=True)))


def encoder(cfg: T5Config, batch_size: int, S: int) -> Products:
  """Returns the products of all layers of the encoder.

  Source: Vaswani et al. 2017; T5.1.1's gated MLP.
  """
  tokens = batch_size * S
  layer = (
    _projections(cfg, tokens, cfg.num_heads, cfg.head_dim),
    _projections(cfg, tokens, cfg.encoder_kv, cfg.head_dim),
    _attend(cfg, batch_size, S, S, cfg.encoder_kv, cfg.head_dim),
    _mlp(cfg, tokens),
  )
  return total(layer, cfg.num_encoder_layers)


def cross_kv(cfg: T5Config, batch_size: int, S: int) -> Products:
  """Returns the products that make all cross-attention K and V of encoded inputs.

  Source: GQA, section 2.2.
  """
  layer = _projections(cfg, batch_size * S, cfg.cross_kv, cfg.kv_size)
  return total([layer], cfg.num_decoder_layers)


def decoder(cfg: T5Config, rows: int, T: int, self_keys: int, S: int) -> Products:
  """Returns the products of the decoder with its logits, given cross K and V.

  Args:
    cfg: the model.
    rows: sequences; each counts cross K and V of its own.
    T: new tokens of each: 1 in a decode step.
    self_keys: positions that each token's self-attention computes, masked or not.
    S: input length.

  Source: Vaswani et al. 2017; GQA, section 2.2; T5.1.1's gated MLP.
  """
  tokens = rows * T
  layer = (
    total([_projections(cfg, tokens, cfg.num_heads, cfg.head_dim)], 2),
    total([_map_heads(cfg, tokens)], 2),
    _projections(cfg, tokens, cfg.self_kv, cfg.kv_size),
    _attend(cfg, rows, T, self_keys, cfg.self_kv, cfg.kv_size),
    _attend(cfg, rows, T, S, cfg.cross_kv, cfg.kv_size),
    _mlp(cfg, tokens),
  )
  logits = _dense(cfg, tokens, cfg.vocab_size, 1, FLOAT32_BYTES)
  return total([total(layer, cfg.num_decoder_layers), logits])


def _projections(cfg: T5Config, tokens: int, heads: int, head_dim: int) -> Products:
  """Returns two products between width and heads: query and out, or key and value."""
  return _dense(cfg, tokens, heads * head_dim, 2, np.dtype(cfg.dtype).itemsize)


def _map_heads(cfg: T5Config, tokens: int) -> Products:
  """Returns the two products of every query head between its size and that of K/V."""
  N, H, R = cfg.num_heads, cfg.head_dim, cfg.kv_size
  if R == H:
    return Products(0, 0, 0)
  return Products(
    flops=2 * 2 * tokens * N * H * R,
    weights=2 * N * H * R,
    activation_bytes=2 * np.dtype(cfg.dtype).itemsize * tokens * N * (H + R),
  )


def _mlp(cfg: T5Config, tokens: int) -> Products:
  number = len(cfg.mlp_activations) + 1
  return _dense(cfg, tokens, cfg.mlp_dim, number, np.dtype(cfg.dtype).itemsize)


def _dense(
  cfg: T5Config, tokens: int, size: int, number: int, itemsize: int
) -> Products:
  """Returns products between the model's width and another size."""
  return Products(
    flops=number * 2 * tokens * cfg.emb_dim * size,
    weights=number * cfg.emb_dim * size,
    activation_bytes=number * itemsize * tokens * (cfg.emb_dim + size),
  )


def _attend(cfg: T5Config, rows: int, T: int, S: int, K: int, R: int) -> Products:
  """Returns the two products of attention: logits, and probabilities times values."""
  N, itemsize = cfg.num_heads, np.dtype(cfg.dtype).itemsize
  logits_itemsize = FLOAT32_BYTES if cfg.float32_attention_logits else itemsize
  logits = rows * N * T * S  # As many are probabilities.
  vectors = 2 * rows * R * (T * N + S * K)  # Queries and results; keys and values.
  nbytes = itemsize * vectors + (logits_itemsize + itemsize) * logits
  return Products(flops=2 * 2 * logits * R, weights=0, activation_bytes=nbytes)
