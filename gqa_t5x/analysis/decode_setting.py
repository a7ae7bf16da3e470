"""What is decoded: common to what is measured and what is compiled."""

import dataclasses

import jax.numpy as jnp

from gqa_t5x.analysis import models
from gqa_t5x.analysis.costs import formulas
from gqa_t5x.model import network


@dataclasses.dataclass(frozen=True)
class DecodeSetting:
  """A model and the lengths that it decodes.

  Attributes:
    size: a key of sizes.SIZES.
    num_kv_heads: K of decoder self- and cross-attention; None: the size's, or MHA.
    batch_size: B, inputs, on all devices together.
    input_length: S, tokens.
    output_length: T, tokens; positions of the self-attention cache.
    dtype: of parameters, activations and cache: a key of models.DTYPES.
    num_beams: 1 decodes greedily.
  """

  size: str
  num_kv_heads: int | None
  batch_size: int
  input_length: int
  output_length: int
  dtype: str
  num_beams: int

  @property
  def config(self) -> network.T5Config:
    """The model's configuration; its errors are BadInput."""
    return models.config(self.size, self.num_kv_heads, self.dtype)

  @property
  def cost(self) -> formulas.DecodeStep:
    """FLOPs and bytes of a step with the cache full; its errors are BadInput."""
    cfg = self.config
    return formulas.decode_step(
      cfg,
      self.batch_size,
      self.input_length,
      self.output_length,
      num_beams=self.num_beams,
      param_itemsize=jnp.dtype(cfg.dtype).itemsize,
    )
