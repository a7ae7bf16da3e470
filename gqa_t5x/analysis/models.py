"""The models that are looked at, as shapes alone, and what they decode."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.linen import partitioning as nn_partitioning

from gqa_t5x.analysis.costs import formulas
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network, quantize

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def config(
  size: str,
  num_kv_heads: int | None,
  dtype: str,
  kv_head_dim: int | None = None,
  quantization: str | None = None,
) -> network.T5Config:
  """Returns a model's configuration; what it refuses is BadInput.

  `num_kv_heads` is K of decoder self- and cross-attention; None: the size's, or MHA.
  `kv_head_dim` is R; None: the head size. `quantization` is of quantize.py.
  """
  heads = {'num_kv_heads': num_kv_heads, 'kv_head_dim': kv_head_dim}
  heads['quantize'] = quantization
  try:
    return network.config(size, **heads, dtype=DTYPES[dtype])
  except ValueError as error:
    raise BadInput(f'size={size}: {error}') from error


def variable_shapes(cfg: network.T5Config) -> dict[str, Any]:
  """Returns the shapes of a model's `params`, and their logical axes, `params_axes`."""
  tokens = jnp.ones((1, 1), jnp.int32)
  return jax.eval_shape(
    lambda: network.Transformer(cfg).init(
      jax.random.PRNGKey(0), tokens, tokens, tokens, enable_dropout=False
    )
  )


def decoding_shapes(cfg: network.T5Config) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the parameters that a step reads, as shapes, and their logical axes.

  They are of the config's `dtype`, or int8 as it says.
  """
  variables = variable_shapes(cfg)
  names = unfreeze(nn_partitioning.get_axis_names(variables['params_axes']))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, cfg.dtype), variables['params']
  )
  if not quantize.of_weights(cfg.quantize):
    return params, names
  return jax.eval_shape(quantize.params_to_int8, params), quantize.axes_to_int8(names)


@dataclasses.dataclass(frozen=True)
class DecodeSetting:
  """A model and the lengths that it decodes; impossible ones are BadInput when used.

  Attributes:
    size, num_kv_heads, kv_head_dim: as of `config`.
    batch_size: B, inputs, on all devices together.
    input_length: S, tokens.
    output_length: T, tokens; positions of the self-attention cache.
    dtype: of parameters, activations and cache: a key of DTYPES.
    num_beams: 1 decodes greedily.
    quantize: what is int8 instead: of `quantize.QUANTIZATIONS`, or None.
  """

  size: str
  num_kv_heads: int | None
  batch_size: int
  input_length: int
  output_length: int
  dtype: str
  num_beams: int
  kv_head_dim: int | None = dataclasses.field(default=None, kw_only=True)
  quantize: str | None = dataclasses.field(default=None, kw_only=True)

  @property
  def config(self) -> network.T5Config:
    """The model's configuration."""
    return config(
      self.size, self.num_kv_heads, self.dtype, self.kv_head_dim, self.quantize
    )

  @property
  def cost(self) -> formulas.DecodeStep:
    """FLOPs and bytes of a step with the cache full."""
    cfg = self.config
    return formulas.decode_step(
      cfg,
      self.batch_size,
      self.input_length,
      self.output_length,
      num_beams=self.num_beams,
      param_itemsize=jnp.dtype(cfg.dtype).itemsize,
    )
