"""Statistics of what attention modules read, from a forward pass of the model.

The pass is watched from outside (flax's intercept_methods): the model has no code for
it. Sums over a batch are made on the device, and added up and divided on the host.

Letters: B batch, L length, M the same for a second token, D and E width.
"""

from collections.abc import Callable, Mapping
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
SumsOf = Callable[..., dict[str, Array]]

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

  def sums_of(watched, args, kwargs, output, segments):
    if isinstance(watched, Encoder):
      return _key_and_value_sums(output, segments['encoder'])
    if not isinstance(watched, GroupedQueryAttention):
      return {}
    stack, _, name = watched.path
    if (stack, name) == KINDS['cross_attention']:
      return {_QUERY: outer(args[0], args[0], segments[stack])}
    if stack == 'encoder' and not include_encoder:
      return {}
    return _key_and_value_sums(args[1], segments[stack])

  return watch(module, values, batch, sums_of)


def watch(
  module: nn.Module, values: Any, batch: Mapping[str, Array], sums_of: SumsOf
) -> dict[str, Array]:
  """Runs a batch through a `network.Transformer`, and asks each module for sums.

  Args:
    values, batch: as of `sum_inputs`.
    sums_of: (module, its arguments, its named arguments, its output, stack -> segments
      int [B, L], 0 of padding) -> name -> array.

  Returns:
    "decoder/layers_0/self_attention/NAME" -> array; and the number of real tokens,
    "encoder" and "decoder".
  """
  segments = {
    'encoder': _segments(batch, 'encoder', 'encoder_input_tokens'),
    'decoder': _segments(batch, 'decoder', 'decoder_target_tokens'),
  }

  def intercept(call, args, kwargs, context):
    output, watched = call(*args, **kwargs), context.module
    if context.method_name == '__call__':
      for name, total in sums_of(watched, args, kwargs, output, segments).items():
        # sow, not a dict of ours: it gets out of jax.checkpoint (REMAT_POLICY), too.
        watched.sow(_COLLECTION, name, total, lambda _, new: new, lambda: None)
    return output

  features = {k: v for k, v in batch.items() if k != 'decoder_loss_weights'}
  with nn.intercept_methods(intercept):
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
  centred_BLD = _centre(x_BLD, ids_BL)
  return {
    _KEY: outer(centred_BLD, centred_BLD, ids_BL),
    _VALUE: outer(x_BLD, x_BLD, ids_BL),
  }


def _centre(x_BLD: Array, ids_BL: Array) -> Array:
  """Subtracts from each token the mean of its sequence, float32."""
  x_BLD = x_BLD.astype(jnp.float32)
  same_BLM = (ids_BL[:, :, None] == ids_BL[:, None, :]).astype(jnp.float32)
  total_BLD = jnp.einsum('BLM,BMD->BLD', same_BLM, x_BLD, precision='highest')
  return x_BLD - total_BLD / jnp.sum(same_BLM, axis=-1, keepdims=True)


def outer(x_BLD: Array, y_BLE: Array, ids_BL: Array) -> Array:
  """Sums x^T y over the tokens whose id is not 0: float32 [D, E]."""
  x_BLD = x_BLD.astype(jnp.float32) * (ids_BL > 0)[..., None]
  return jnp.einsum(
    'BLD,BLE->DE', x_BLD, y_BLE.astype(jnp.float32), precision='highest'
  )


def add_sums(totals: dict[str, np.ndarray], sums: Mapping[str, Array]) -> None:
  """Adds the sums of a batch to the totals, float64, in place."""
  for name, value in sums.items():
    value = np.asarray(value)
    if name in totals:
      totals[name] += value
    else:
      totals[name] = value.astype(np.float64)


def means(totals: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
  """Divides the totals by the tokens that they are over.

  Args:
    totals: what `add_sums` made; emptied on the way, to save memory.

  Returns:
    "decoder/layers_0/self_attention" -> name -> its mean, float32.
  """
  tokens = {stack: max(int(totals.pop(stack)), 1) for stack in ('encoder', 'decoder')}
  divided: dict[str, dict[str, np.ndarray]] = {}
  for path in list(totals):
    module, _, name = path.rpartition('/')
    mean = totals.pop(path) / tokens[path.partition('/')[0]]
    divided.setdefault(module, {})[name] = mean.astype(np.float32)
  return divided


def mean_statistics(totals: dict[str, np.ndarray]) -> dict[str, InputStatistics]:
  """Makes statistics of the totals of `sum_inputs`, which are emptied.

  Returns:
    "decoder/layers_0/self_attention" -> its statistics, float32. What modules share is
    one array.
  """
  modules = means(totals)
  encoded = modules.pop('encoder')
  statistics = {}
  for module, own in modules.items():
    shared = encoded if _QUERY in own else own
    query = own.get(_QUERY, shared[_VALUE])
    statistics[module] = InputStatistics(query, key=shared[_KEY], value=shared[_VALUE])
  return statistics
