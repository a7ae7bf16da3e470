"""What a model costs by formula: parameters, FLOPs, bytes, and Shazeer's ratio.

FLOPs are those of matrix products, 2 a multiply-add. Bytes are those that cross the
memory bus if whatever is needed is read once; products.py says more. Keys and values
count at K heads: nothing repeats them. Lengths count padding. An element of an
activation or a cache is of the config's `dtype`, or int8 as its `quantize` says.
Numbers below 1 are BadInput.
"""

import dataclasses

import numpy as np

from gqa_t5x.analysis.costs import products
from gqa_t5x.errors import BadInput
from gqa_t5x.model import axes, quantize
from gqa_t5x.model.network import T5Config

_SCALE_BYTES = 4


def num_parameters(cfg: T5Config) -> int:
  """Returns the number of parameters: kernels, embedding, norms and position biases.

  Source: T5; GQA, section 2.2 (K and V kernels of K heads).
  """
  made_once = products.encoder(cfg, 1, 1), products.cross_kv(cfg, 1, 1)
  # Both stacks have a norm at their end, too.
  norms = 2 * cfg.num_encoder_layers + 3 * cfg.num_decoder_layers + 2
  return (
    products.total(made_once).weights
    + step_kernels(cfg)
    + cfg.vocab_size * cfg.emb_dim
    + norms * cfg.emb_dim
    + _biases(cfg, cfg.num_encoder_layers)
    + _biases(cfg, cfg.num_decoder_layers)
  )


def _biases(cfg: T5Config, num_layers: int) -> int:
  """Returns the number of parameters in the position biases of a stack."""
  tables = num_layers if cfg.relpos_per_layer else 1
  return tables * cfg.relpos_num_buckets * cfg.num_heads


def step_kernels(cfg: T5Config) -> int:
  """Returns the number of parameters in kernels that a decode step multiplies with.

  They are the decoder's, without those of cross-attention K and V, and without the
  embedding where it makes the logits.
  """
  table = cfg.vocab_size * cfg.emb_dim if cfg.logits_via_embedding else 0
  return products.decoder(cfg, 1, 1, 1, 1).weights - table


def param_bytes(cfg: T5Config, itemsize: int) -> int:
  """Returns the bytes of all parameters, `itemsize` each where they are not int8.

  Norms and position biases are few, and count as kernels.
  """
  table = 0 if cfg.logits_via_embedding else cfg.vocab_size * cfg.emb_dim
  kernels = num_parameters(cfg) - table
  return table * itemsize + kernels * _kernel_itemsize(cfg, itemsize)


@dataclasses.dataclass(frozen=True)
class DecodeStep:
  """The cost of decoding one token of every row.

  Left out of the bytes, because small: the position that a step writes to its cache
  (one part in `self_positions` of what it reads there), all activations, and the scales
  of int8 kernels (those of keys and values count).

  Attributes:
    flops: of the step.
    param_bytes: of parameters read: the decoder with its output projection, but not
      what makes cross-attention K and V, since those are computed once an input; and of
      the embedding table one vector a row, or all of it if it is the output projection,
      too.
    cross_kv_bytes: of cross-attention K and V read, once an input: the beams of an
      input share them.
    self_cache_bytes: of the self-attention cache read, once a row.
  """

  flops: int
  param_bytes: int
  cross_kv_bytes: int
  self_cache_bytes: int

  @property
  def cache_bytes(self) -> int:
    """Of keys and values: all that there are."""
    return self.cross_kv_bytes + self.self_cache_bytes

  @property
  def bytes(self) -> int:
    """Of parameters, keys and values."""
    return self.param_bytes + self.cache_bytes


def decode_step(
  cfg: T5Config,
  batch_size: int,
  input_length: int,
  self_positions: int,
  *,
  num_beams: int = 1,
  param_itemsize: int = 4,
) -> DecodeStep:
  """Returns the cost of one decode step.

  Args:
    cfg: the model.
    batch_size: B, inputs.
    input_length: S, tokens.
    self_positions: positions of the self-attention cache that the step reads: the
      length of the cache where all of it is read, else those written so far.
    num_beams: rows an input.
    param_itemsize: bytes of one parameter in memory, if it is not int8.

  Source: Shazeer 2019, sections 2.4 (MHA: a step reads every weight once), 3.1 (MQA).
  """
  _check_positive(
    batch_size=batch_size,
    input_length=input_length,
    self_positions=self_positions,
    num_beams=num_beams,
    param_itemsize=param_itemsize,
  )
  rows = batch_size * num_beams
  norms = 3 * cfg.num_decoder_layers + 1
  table = cfg.vocab_size * cfg.emb_dim if cfg.logits_via_embedding else 0
  vectors = 0 if table else rows
  others = (norms + vectors) * cfg.emb_dim + _biases(cfg, cfg.num_decoder_layers)
  kernel_bytes = _kernel_itemsize(cfg, param_itemsize) * (step_kernels(cfg) + table)
  return DecodeStep(
    flops=products.decoder(cfg, rows, 1, self_positions, input_length).flops,
    param_bytes=kernel_bytes + param_itemsize * others,
    cross_kv_bytes=batch_size * input_length * _key_value_bytes(cfg, cfg.cross_kv),
    self_cache_bytes=rows * self_positions * _key_value_bytes(cfg, cfg.self_kv),
  )


def prepare_flops(cfg: T5Config, batch_size: int, input_length: int) -> int:
  """Returns the FLOPs before the first decode step: the encoder, and cross K and V.

  Source: Vaswani et al. 2017; Shazeer 2019, section 2.3.
  """
  _check_positive(batch_size=batch_size, input_length=input_length)
  encoder = products.encoder(cfg, batch_size, input_length)
  return encoder.flops + products.cross_kv(cfg, batch_size, input_length).flops


def training_step(
  cfg: T5Config, batch_size: int, input_length: int, target_length: int
) -> products.Products:
  """Returns the cost of training on one batch: three times its forward pass.

  The backward pass of a product is two of the same size, one for each operand's
  gradient, which read and write the same three matrices. What rematerialisation
  computes again is not counted, nor is packing: every query sees every key. The
  optimizer is not, either. Kernels count when read forward, when read backward, and
  when their gradient is written.

  Source: Shazeer 2019, section 2.3.
  """
  _check_positive(
    batch_size=batch_size, input_length=input_length, target_length=target_length
  )
  parts = (
    products.encoder(cfg, batch_size, input_length),
    products.cross_kv(cfg, batch_size, input_length),
    products.decoder(cfg, batch_size, target_length, target_length, input_length),
  )
  return products.total(parts, 3)


def shazeer_decoding_ratio(b: int, n: int, d: int, h: int, g: int) -> float:
  """Returns the memory accesses per arithmetic operation of incremental decoding.

  That is n g/(d h) + 1/b: numbers read a multiply-add, up to a constant factor; n/d +
  1/b for MHA and n/(d h) + 1/b for MQA.

  Args:
    b: batch size (B).
    n: length (S and T).
    d: model width (D), h times the head size.
    h: query heads (N).
    g: key/value heads (K), which must divide h.

  Source: Shazeer 2019, sections 2.4 (MHA) and 3.1 (MQA).
  """
  _check_positive(b=b, n=n, d=d)
  axes.check_heads(h, g)
  return n * g / (d * h) + 1 / b


def _key_value_bytes(cfg: T5Config, K: int) -> int:
  """Returns the bytes of one token's K and V in all decoder layers."""
  nbytes = cfg.kv_size * np.dtype(cfg.dtype).itemsize
  if quantize.of_cache(cfg.quantize):
    nbytes = cfg.kv_size + _SCALE_BYTES
  return 2 * cfg.num_decoder_layers * K * nbytes


def _kernel_itemsize(cfg: T5Config, itemsize: int) -> int:
  return 1 if quantize.of_weights(cfg.quantize) else itemsize


def _check_positive(**numbers: int) -> None:
  for name, number in numbers.items():
    if number < 1:
      raise BadInput(f'{name}={number} must be at least 1.')
