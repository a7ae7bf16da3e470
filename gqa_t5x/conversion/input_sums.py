"""Statistics of what attention modules read, from a forward pass of the model.

The pass is watched from outside (flax's intercept_methods): the model has no code for
it. Sums over a batch are made on the device, and added up and divided on the host.

Letters: B batch, L length, M the same for a second token, D and E width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from gqa_t5x.checkpoints.tree import KINDS
from gqa_t5x.conversion.input_statistics import InputStatistics
from gqa_t5x.model.attention import GroupedQueryAttention
from gqa_t5x.model.network import Encoder

Array = jax.Array

_COLLECTION = 'input_sums'
# Other names than those of attention's own submodules.
_QUERY, _KEY, _VALUE = 'query_sum', 'key_sum', 'value_sum'


def sum_inputs(
  module: nn.Module, values: Any, batch: Mapping[str, Array], include_encoder: bool
) -> dict[str, Array]:
  """Sums x^T x over the real tokens of a batch, for each attention module.

  Args:
    module: a `network.Transformer`, whose parameters are the `values`.
    batch: model features, packed or not; token 0 is padding.
    include_encoder: whether the encoder's modules are looked at, too.

  Returns:
    Float32 [D, D] by name:
      decoder/layers_0/self_attention/value_sum: inputs of values, and of queries;
      decoder/layers_0/self_attention/key_sum: the same less their sequence's mean;
      decoder/layers_0/encoder_decoder_attention/query_sum: inputs of queries;
      encoder/value_sum, encoder/key_sum: the encoder's output, which the values and
        keys of every cross-attention are made of.
    And the number of real tokens, "encoder" and "decoder".
  """
  segments = {
    'encoder': _segments(batch, 'encoder', 'encoder_input_tokens'),
    'decoder': _segments(batch, 'decoder', 'decoder_target_tokens'),
  }

  def watch(call, args, kwargs, context):
    output, watched = call(*args, **kwargs), context.module
    if context.method_name == '__call__':
      for name, total in _sums_of(watched, args, output).items():
        # sow, not a dict of ours: it gets out of jax.checkpoint (REMAT_POLICY), too.
        watched.sow(_COLLECTION, name, total, lambda _, new: new, lambda: None)
    return output

  def _sums_of(watched, args, output):
    if isinstance(watched, Encoder):
      return _key_and_value_sums(output, segments['encoder'])
    if not isinstance(watched, GroupedQueryAttention):
      return {}
    stack, _, name = watched.path
    if (stack, name) == KINDS['cross_attention']:
      return {_QUERY: _outer(args[0], segments[stack])}
    if stack == 'encoder' and not include_encoder:
      return {}
    return _key_and_value_sums(args[1], segments[stack])

  features = {k: v for k, v in batch.items() if k != 'decoder_loss_weights'}
  with nn.intercept_methods(watch):
    _, state = module.apply(
      {'params': values}, **features, enable_dropout=False, mutable=[_COLLECTION]
    )
  sums = traverse_util.flatten_dict(state[_COLLECTION], sep='/')
  return sums | {stack: jnp.sum(ids > 0) for stack, ids in segments.items()}


def _segments(batch: Mapping[str, Array], stack: str, tokens: str) -> Array:
  """Which sequence of its row a token belongs to: int [B, L]; 0 is padding."""
  ids = batch.get(f'{stack}_segment_ids', 1)
  return jnp.where(batch[tokens] > 0, ids, 0)


def _key_and_value_sums(x_BLD: Array, ids_BL: Array) -> dict[str, Array]:
  return {_KEY: _outer(_centre(x_BLD, ids_BL), ids_BL), _VALUE: _outer(x_BLD, ids_BL)}


def _centre(x_BLD: Array, ids_BL: Array) -> Array:
  """Subtracts from each token the mean of its sequence, float32."""
  x_BLD = x_BLD.astype(jnp.float32)
  same_BLM = (ids_BL[:, :, None] == ids_BL[:, None, :]).astype(jnp.float32)
  total_BLD = jnp.einsum('BLM,BMD->BLD', same_BLM, x_BLD, precision='highest')
  return x_BLD - total_BLD / jnp.sum(same_BLM, axis=-1, keepdims=True)


def _outer(x_BLD: Array, ids_BL: Array) -> Array:
  """Sums x^T x over the real tokens: float32 [D, D]."""
  x_BLD = x_BLD.astype(jnp.float32) * (ids_BL > 0)[..., None]
  return jnp.einsum('BLD,BLE->DE', x_BLD, x_BLD, precision='highest')


def add_sums(totals: dict[str, np.ndarray], sums: Mapping[str, Array]) -> None:
  """Adds the sums of a batch to the totals, float64, in place."""
  for name, value in sums.items():
    value = np.asarray(value)
    if name in totals:
      totals[name] += value
    else:
      totals[name] = value.astype(np.float64)


def mean_statistics(totals: dict[str, np.ndarray]) -> dict[str, InputStatistics]:
  """Divides the totals by the tokens that they are over.

  Args:
    totals: what `add_sums` made; emptied on the way, to save memory.

  Returns:
    "decoder/layers_0/self_attention" -> its statistics, float32. What modules share is
    one array.
  """
  tokens = {stack: max(int(totals.pop(stack)), 1) for stack in ('encoder', 'decoder')}
  means: dict[str, dict[str, np.ndarray]] = {}
  for path in list(totals):
    module, _, name = path.rpartition('/')
    count = tokens[path.partition('/')[0]]
    means.setdefault(module, {})[name] = (totals.pop(path) / count).astype(np.float32)
  encoded = means.pop('encoder')
  statistics = {}
  for module, own in means.items():
    shared = encoded if _QUERY in own else own
    query = own.get(_QUERY, shared[_VALUE])
    statistics[module] = InputStatistics(query, key=shared[_KEY], value=shared[_VALUE])
  return statistics
