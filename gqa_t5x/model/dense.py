"""The linear map of all layers: T5X's parameters, and a form that is fast to decode."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import param_with_axes
from jax import Array, lax

TRANSPOSED = 'transposed'  # The collection of kernels `[out, in]`.


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
    `generate.prepare` makes those for decoding.
    """
    if self.has_variable(TRANSPOSED, 'kernel'):
      kernel_FD = self.get_variable(TRANSPOSED, 'kernel')
      y_FR = self._dot(kernel_FD, x.reshape(-1, x.shape[-1]).T)
      # Without the barrier the compiler would undo the transposition.
      return lax.optimization_barrier(y_FR).T.reshape(*x.shape[:-1], self.features)
    kernel = param_with_axes(
      'kernel',
      self.kernel_init,
      (x.shape[-1], self.features),
      jnp.float32,
      axes=self.kernel_axes,
    )
    return self._dot(x, kernel)

  def _dot(self, x: Array, y: Array) -> Array:
    if x.dtype == y.dtype and jnp.promote_types(x.dtype, self.dtype) == self.dtype:
      # Of bfloat16 parameters a wider copy would be written and read at every step.
      return jnp.dot(x, y, preferred_element_type=self.dtype)
    return jnp.dot(x.astype(self.dtype), y.astype(self.dtype))
