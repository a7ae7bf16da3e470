"""What an optimizer is to T5X: a definition with pure functions, and a state."""

import types
from typing import Any

import jax.numpy as jnp
from flax import struct


@struct.dataclass
class OptimizerState:
  """Step count (scalar int32) and one state per parameter, in the parameters' tree."""

  step: jnp.ndarray
  param_states: Any


class OptimizerDef:
  """Hyper-parameters and the functions that use them.

  Subclasses define `init_state(params)`, `apply_gradient(hyper_params, params, state,
  grads)`, which returns the new `(params, state)`, and `derive_logical_axes(state,
  param_logical_axes)`.
  """

  def __init__(self, hyper_params: Any):
    self.hyper_params = hyper_params

  def update_hyper_params(self, **overrides):
    """Returns the hyper-parameters with some of them replaced."""
    return types.SimpleNamespace(**{**vars(self.hyper_params), **overrides})
