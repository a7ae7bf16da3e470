"""Adafactor with T5X's arguments and state layout; the mathematics is optax's."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from optax import tree_utils

_MOMENTS = ('v_row', 'v_col', 'v')
_MIN_DIM_SIZE_TO_FACTOR = 128


@struct.dataclass
class OptimizerState:
  """Step count (scalar int32) and one state per parameter, in the parameters' tree."""

  step: jnp.ndarray
  param_states: Any


@struct.dataclass
class AdafactorParamState:
  """Second moments of one parameter, and its momentum; what is not in use is [1].

  A matrix with both sides at least `_MIN_DIM_SIZE_TO_FACTOR` has `v_row` (its larger
  side averaged out) and `v_col`; anything else has `v`, of its own shape.
  """

  v_row: jnp.ndarray
  v_col: jnp.ndarray
  v: jnp.ndarray
  m: jnp.ndarray


def _transformation(hp) -> optax.GradientTransformation:
  return optax.adafactor(
    hp.learning_rate,
    multiply_by_parameter_scale=hp.multiply_by_parameter_scale,
    momentum=hp.beta1,
    decay_rate=hp.decay_rate,
    decay_offset=hp.step_offset,
    clipping_threshold=hp.clipping_threshold,
    min_dim_size_to_factor=_MIN_DIM_SIZE_TO_FACTOR,
  )


class Adafactor:
  """Adafactor (https://arxiv.org/abs/1804.04235) for vectors and matrices.

  Arguments are T5X's. T5X, too, factors vectors and matrices by shape, without rules.
  """

  def __init__(
    self,
    learning_rate: float | None = None,
    multiply_by_parameter_scale: bool = True,
    beta1: float | None = None,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    clipping_threshold: float | None = 1.0,
  ):
    hyper_params = {k: v for k, v in locals().items() if k != 'self'}
    self.hyper_params = types.SimpleNamespace(**hyper_params)

  def update_hyper_params(self, **overrides):
    """Returns the hyper-parameters with some of them replaced."""
    return types.SimpleNamespace(**{**vars(self.hyper_params), **overrides})

  def init_state(self, params) -> OptimizerState:
    """Returns zero moments; ValueError for more than two dimensions."""
    leaves, treedef = jax.tree.flatten(params)
    too_deep = [p.shape for p in leaves if p.ndim > 2]
    if too_deep:
      raise ValueError(
        f'parameters of shape {too_deep[:3]} have more than 2 dimensions; this '
        "stand-in's Adafactor takes vectors and matrices (T5X takes any, with rules)"
      )
    zeros = [jnp.zeros(p.shape, jnp.float32) for p in leaves]
    return self._pack(_transformation(self.hyper_params).init(zeros), 0, treedef)

  def _pack(self, opt_state, step, treedef) -> OptimizerState:
    """Turns optax's state of a list of parameters into T5X's of a tree."""
    moments = [tree_utils.tree_get(opt_state, name) for name in _MOMENTS]
    m = tree_utils.tree_get(opt_state, 'ema')
    m = [jnp.zeros(1)] * treedef.num_leaves if m is None else m
    states = treedef.unflatten(list(map(AdafactorParamState, *moments, m)))
    return OptimizerState(jnp.asarray(step, jnp.int32), states)

  def apply_gradient(self, hyper_params, params, state: OptimizerState, grads):
    """Takes one step; returns the new parameters and state."""
    leaves, treedef = jax.tree.flatten(params)
    old = treedef.flatten_up_to(state.param_states)
    f32 = [p.astype(jnp.float32) for p in leaves]
    grads = [g.astype(jnp.float32) for g in treedef.flatten_up_to(grads)]
    optimizer = _transformation(hyper_params)
    moments = {name: [getattr(s, name) for s in old] for name in _MOMENTS}
    if hyper_params.beta1 is not None:
      moments['ema'] = [s.m for s in old]
    opt_state = tree_utils.tree_set(optimizer.init(f32), count=state.step, **moments)
    updates, opt_state = optimizer.update(grads, opt_state, f32)
    new = [
      (p + u).astype(x.dtype) for p, u, x in zip(f32, updates, leaves, strict=True)
    ]
    return treedef.unflatten(new), self._pack(opt_state, state.step + 1, treedef)

  def derive_logical_axes(self, state: OptimizerState, param_logical_axes):
    """Full moments are laid out like their parameter, everything else replicated."""

    def axes_of(axes, s):
      v, m = (axes if x.shape != (1,) else None for x in (s.v, s.m))
      return AdafactorParamState(None, None, v, m)

    states = jax.tree.map(
      axes_of,
      param_logical_axes,
      state.param_states,
      is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
    )
    return OptimizerState(None, states)
