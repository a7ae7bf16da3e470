"""What refitting the outputs of a converted model needs, from passes of the original.

Each converted module reads what the original one reads, in the original model.

Letters: B batch, L length, X = N*H numbers of all heads, D width.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from gqa_t5x.checkpoints.tree import KINDS
from gqa_t5x.conversion.input_sums import outer, watch
from gqa_t5x.conversion.output_refit import HEADS, RESIDUAL
from gqa_t5x.errors import BadInput
from gqa_t5x.model.network import T5Config

Array = jax.Array


def sum_outputs(
  original: nn.Module,
  original_values: Any,
  converted: T5Config,
  values: Any,
  batch: Mapping[str, Array],
) -> dict[str, Array]:
  """Sums c'^T c' and c'^T (y - c' O') over a batch's real tokens (output_refit.py).

  Args:
    original: a `network.Transformer`, whose parameters are `original_values`.
    converted: of the model with other key/value heads, whose parameters are `values`.
    batch: model features, packed or not; token 0 is padding.

  Returns:
    Float32 by name, of each module with other heads: decoder/layers_0/self_attention/
    heads [X, X] and .../residual [X, D]. And the number of real tokens, "encoder" and
    "decoder".

  Raises:
    BadInput: no module has other heads.
  """
  sizes, old = _heads(converted), _heads(original.config)
  kinds = {KINDS[kind]: sizes[kind] for kind in KINDS if sizes[kind] != old[kind]}
  if not kinds:
    raise BadInput(
      'the converted checkpoint has the key/value heads of the original: there is'
      ' nothing to refit'
    )

  def sums_of(watched, args, kwargs, output, segments):
    if len(watched.path) != 3 or (watched.path[0], watched.path[2]) not in kinds:
      return {}
    stack, layer, name = watched.path
    K, R = kinds[stack, name]
    module = watched.clone(num_kv_heads=K, kv_head_dim=R, parent=None, name=None)
    heads_BLX, new_BLD = _run(module, values[stack][layer][name], args, kwargs)
    return {
      HEADS: outer(heads_BLX, heads_BLX, segments[stack]),
      RESIDUAL: outer(heads_BLX, output - new_BLD, segments[stack]),
    }

  return watch(original, original_values, batch, sums_of)


def _heads(cfg: T5Config) -> dict[str, tuple[int, int]]:
  """Kind of attention -> number and size of its key/value heads."""
  return {
    'encoder': (cfg.encoder_kv, cfg.head_dim),
    'self_attention': (cfg.self_kv, cfg.kv_size),
    'cross_attention': (cfg.cross_kv, cfg.kv_size),
  }


def _run(
  module: nn.Module, kernels: Any, args: Any, kwargs: Any
) -> tuple[Array, Array]:
  """What the heads of an attention module say, [B, L, X], and its output [B, L, D]."""
  said = []

  def keep(call, inputs, named, context):
    if context.module.name == 'out' and context.method_name == '__call__':
      said.append(inputs[0])
    return call(*inputs, **named)

  with nn.intercept_methods(keep):
    output = module.apply({'params': kernels}, *args, **kwargs)
  return said[0], output
