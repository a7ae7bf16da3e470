"""The linear map of all layers: T5X's parameters, and a form that is fast to decode."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import param_with_axes
from jax import Array, lax

from gqa_t5x.model import axes, quantize

KERNEL_SCALE = 'kernel' + quantize.SCALE
TRANSPOSED = 'transposed'  # The collection of kernels `[out, in]`.
# How those of a `PerHead` are made, by its name.
PER_HEAD = {'key_up': 'RNH->NRH', 'value_up': 'RNH->NHR'}


class Dense(nn.Module):
  """A linear map without bias; parameters are float32, arithmetic is `dtype`."""

  features: int
  kernel_axes: tuple[str, str]  # Of the `[in, out]` kernel, logical.
  dtype: Any = jnp.float32
  kernel_init: Callable[..., Array] = nn.initializers.variance_scaling(
    1.0, 'fan_in', 'truncated_normal'
  )

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[..., in]` to `[..., features]`.

    A kernel in the collection `transposed` takes the place of the parameter: on a CPU
    `generate.prepare` makes those for decoding. The parameter may be int8, with
    `kernel_scale` beside it (quantize.py).
    """
    if self.has_variable(TRANSPOSED, 'kernel'):
      kernel_FD = self.get_variable(TRANSPOSED, 'kernel')
      y_FX = _product(jnp.dot, kernel_FD, x.reshape(-1, x.shape[-1]).T, self.dtype)
      # Without the barrier the compiler would undo the transposition.
      return lax.optimization_barrier(y_FX).T.reshape(*x.shape[:-1], self.features)
    kernel = param_with_axes(
      'kernel',
      self.kernel_init,
      (x.shape[-1], self.features),
      jnp.float32,
      axes=self.kernel_axes,
    )
    y = _product(jnp.dot, x, kernel, self.dtype)
    return quantize.scaled(y, self.get_variable('params', KERNEL_SCALE))


class PerHead(nn.Module):
  """A linear map of each head by itself, between H numbers and R; else as `Dense`."""

  shape_RNH: tuple[int, int, int]  # The kernel is `[R, N*H]`.
  dtype: Any
  kernel_init: Callable[..., Array]

  @nn.compact
  def __call__(self, einsum: str, x_BTNX: Array) -> Array:
    """Maps heads by 'BTNH,RNH->BTNR', or by 'BTNR,RNH->BTNH'.

    In the collection `transposed` the kernel is `[N, out, in]`.
    """
    R, N, H = self.shape_RNH
    scale = None
    if self.has_variable(TRANSPOSED, 'kernel'):
      kernel = self.get_variable(TRANSPOSED, 'kernel')
      before, after = einsum[:4], einsum[-4:]
      einsum = f'{before},N{after[-1]}{before[-1]}->{after}'
    else:
      kernel_axes = axes.HEAD_DIM, axes.JOINED_HEADS
      kernel = param_with_axes(
        'kernel', self.kernel_init, (R, N * H), jnp.float32, axes=kernel_axes
      ).reshape(R, N, H)
      scale = self.get_variable('params', KERNEL_SCALE)
    scale_NH = None if scale is None else scale.reshape(N, H)
    product = functools.partial(jnp.einsum, einsum)
    if einsum.startswith('BTNH'):  # Columns of the kernel are of that side.
      return _product(product, quantize.scaled(x_BTNX, scale_NH), kernel, self.dtype)
    return quantize.scaled(_product(product, x_BTNX, kernel, self.dtype), scale_NH)


def _product(product: Callable[..., Array], x: Array, y: Array, dtype: Any) -> Array:
  if y.dtype == jnp.int8:  # Whole numbers that small are the same in any dtype.
    y = y.astype(x.dtype)
  if x.dtype == y.dtype and jnp.promote_types(x.dtype, dtype) == dtype:
    # Of bfloat16 parameters a wider copy would be written and read at every step.
    return product(x, y, preferred_element_type=dtype)
  return product(x.astype(dtype), y.astype(dtype))
