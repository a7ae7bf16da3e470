"""Int8 for decoding: of what a step reads, half the bytes of bfloat16.

Symmetric: x is kept as whole numbers from -127 to 127, and a float32 scale that
multiplies them. A kernel `[in, out]` has a scale for each output column; the embedding,
where it makes the logits, for each token; keys and values for each position and head.
A product takes the numbers as they are, and its result is multiplied by the scale.

In the tree of parameters the scale of `kernel` is beside it, as `kernel_scale`.

Source: Dettmers et al. 2022 (arXiv 2208.07339), section 2, "absmax quantization".
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

WEIGHTS, CACHE, BOTH = 'weights', 'cache', 'weights_and_cache'
QUANTIZATIONS = (WEIGHTS, CACHE, BOTH)
SCALE = '_scale'  # What a parameter's name ends with that is one.
_MOST = 127


class Int8(NamedTuple):
  """Numbers in int8, and the scale that multiplies them."""

  codes: Array
  scale: Array  # float32; 1 along the axis that shares one

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape


def check(name: str | None) -> None:
  """Raises ValueError for an unknown quantization; None is float."""
  if name is not None and name not in QUANTIZATIONS:
    known = ', '.join(QUANTIZATIONS)
    raise ValueError(f'quantize={name!r} is unknown; choose None or one of {known}.')


def of_weights(name: str | None) -> bool:
  return name in (WEIGHTS, BOTH)


def of_cache(name: str | None) -> bool:
  return name in (CACHE, BOTH)


def to_int8(x: Array, axis: int) -> Int8:
  """Rounds to the nearest, of two to the even one; numbers along `axis` share a scale.

  Zeros alone have the scale 0. What is not finite makes the scale so.
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) * (1 / _MOST)
  codes = jnp.round(x / jnp.where(scale > 0, scale, 1))
  return Int8(jnp.clip(codes, -_MOST, _MOST).astype(jnp.int8), scale)


def to_float(codes: Array, scale: Array | None) -> Array:
  """Returns a kernel `[in, out]` in float32, or as it is if it has no scale."""
  return codes if scale is None else codes.astype(jnp.float32) * scale


def scaled(x: Array, scale: Array | None) -> Array:
  """Multiplies columns by their scales, if there are any, and keeps the dtype."""
  return x if scale is None else (x * scale).astype(x.dtype)


# --- Trees of parameters, of a `network.Transformer` ----------------------------------


def params_to_int8(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the parameters with int8 kernels, one made after the other.

  The embedding is one where it makes the logits. Else, as norms and position biases, it
  stays as it is: a step reads little of it.
  """

  def change(name, x, axis):
    codes, scale = _to_int8(x, axis)
    return {name: codes, name + SCALE: scale}

  return _change(params, change)


@jax.jit(static_argnums=1)
def _to_int8(x: Array, axis: int) -> tuple[Array, Array]:
  codes, scale = to_int8(x, axis)
  return codes, jnp.squeeze(scale, axis)


def axes_to_int8(names: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the logical axes of what `params_to_int8` makes of parameters with these.

  Leaves are PartitionSpecs of both dimensions.
  """

  def change(name, spec, axis):
    return {name: spec, name + SCALE: PartitionSpec(spec[1 - axis])}

  return _change(names, change)


def are_int8(params: Mapping[str, Any]) -> bool:
  """Whether parameters are those of `params_to_int8`."""
  return 'kernel' + SCALE in params['decoder']['layers_0']['mlp']['wo']


def prepared(params: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
  """Returns the parameters as a quantization wants them for decoding."""
  if not of_weights(name) or are_int8(params):
    return params
  return params_to_int8(params)


def _change(
  params: Mapping[str, Any], change: Callable[[str, Any, int], dict[str, Any]]
) -> dict[str, Any]:
  """Changes each parameter that has scales: from (name, leaf, axis of a scale)."""
  axes = {'kernel': 0}
  if 'logits_dense' not in params['decoder']:
    axes['embedding'] = 1

  def visit(node):
    changed = {}
    for name, child in node.items():
      if isinstance(child, Mapping):
        changed[name] = visit(child)
      elif name in axes:
        changed |= change(name, child, axes[name])
      else:
        changed[name] = child
    return changed

  return visit(params)
