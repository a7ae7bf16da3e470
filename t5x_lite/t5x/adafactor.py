"""Adafactor with T5X's arguments and state layout; the mathematics is optax's."""

import enum
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import struct

from t5x.optimizers import OptimizerDef, OptimizerState


class FactorDim(enum.Enum):
  """What Adafactor does with a dimension of a parameter of rank 3 or more."""

  NONE = None
  BATCH = 1
  ROW = 2
  COLUMN = 3


def standard_logical_factor_rules() -> dict[str, FactorDim]:
  """The factorisation per logical axis that T5X's configurations pass."""
  columns = 'vocab mlp heads kv joined_kv q_wi_fused o_wo_fused multiquery_heads'
  return {
    **dict.fromkeys(columns.split(), FactorDim.COLUMN),
    **dict.fromkeys(('kv_fused', 'mlp_activations'), FactorDim.COLUMN),
    **dict.fromkeys(('relpos_buckets', 'layer_norm_scale'), FactorDim.NONE),
    **dict.fromkeys(('layers', 'stack'), FactorDim.BATCH),
    'embed': FactorDim.ROW,
  }


@struct.dataclass
class AdafactorParamState:
  """Second moments of one parameter, and its momentum; what is not in use is [1].

  A matrix with both sides at least `min_dim_size_to_factor` has `v_row` (its larger
  side averaged out) and `v_col`; anything else has `v`, of its own shape.
  """

  v_row: jnp.ndarray
  v_col: jnp.ndarray
  v: jnp.ndarray
  m: jnp.ndarray


class Adafactor(OptimizerDef):
  """Adafactor (https://arxiv.org/abs/1804.04235) for vectors and matrices."""

  def __init__(
    self,
    learning_rate: float | None = None,
    factored: bool = True,
    multiply_by_parameter_scale: bool = True,
    beta1: float | None = None,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    clipping_threshold: float | None = 1.0,
    weight_decay_rate: float | None = None,
    min_dim_size_to_factor: int = 128,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    logical_factor_rules: Mapping[str, FactorDim] | None = None,
  ):
    """Sets the hyper-parameters.

    Args:
      learning_rate: the step relative to a parameter's RMS; the trainer overrides it.
      factored: whether matrices keep row and column moments instead of all of them.
      multiply_by_parameter_scale: whether steps are relative to a parameter's RMS.
      beta1: momentum, or None for none.
      decay_rate: exponent c of the second moment's decay, 1 - t^-c.
      step_offset: subtracted from the step in that decay.
      clipping_threshold: largest RMS of an update before the learning rate, or None.
      weight_decay_rate: share of a parameter removed per step, or None.
      min_dim_size_to_factor: smallest side of a factored matrix.
      epsilon1: added to squared gradients.
      epsilon2: smallest RMS that a parameter counts with.
      logical_factor_rules: only checked to name every axis: T5X goes by shape for
        vectors and matrices, and there is nothing else here.
    """
    hyper_params = {k: v for k, v in locals().items() if k[0] != '_' and k != 'self'}
    self._rules = hyper_params.pop('logical_factor_rules')
    super().__init__(types.SimpleNamespace(**hyper_params))

  def set_param_axes(self, param_logical_axes):
    """Checks that the rules, if any, name every logical axis, as T5X demands.

    Raises:
      ValueError: if an axis has no rule.
    """
    names = {
      n for axes in jax.tree.leaves(param_logical_axes, is_leaf=_is_axes) for n in axes
    }
    unknown = sorted(names - set(self._rules)) if self._rules is not None else []
    if unknown:
      raise ValueError(
        f'Adafactor.logical_factor_rules lacks the axes {unknown}; add them, or leave '
        'the argument out (matrices are factored by shape)'
      )

  def _second_moments(self, hp) -> optax.GradientTransformation:
    return optax.scale_by_factored_rms(
      factored=hp.factored,
      decay_rate=hp.decay_rate,
      step_offset=hp.step_offset,
      min_dim_size_to_factor=hp.min_dim_size_to_factor,
      epsilon=hp.epsilon1,
    )

  def init_state(self, params) -> OptimizerState:
    """Returns zero moments.

    Raises:
      ValueError: if a parameter has more than two dimensions.
    """
    leaves, treedef = jax.tree.flatten(params)
    too_deep = [p.shape for p in leaves if p.ndim > 2]
    if too_deep:
      raise ValueError(
        f'parameters of shape {too_deep[:3]} have more than 2 dimensions; this '
        "stand-in's Adafactor takes vectors and matrices (T5X takes any, with rules)"
      )
    zeros = [jnp.zeros(p.shape, jnp.float32) for p in leaves]
    moments = self._second_moments(self.hyper_params).init(zeros)
    unused = jnp.zeros((1,), jnp.float32)
    ms = zeros if self.hyper_params.beta1 is not None else [unused] * len(leaves)
    states = map(AdafactorParamState, moments.v_row, moments.v_col, moments.v, ms)
    return OptimizerState(jnp.zeros((), jnp.int32), treedef.unflatten(list(states)))

  def apply_gradient(self, hyper_params, params, state: OptimizerState, grads):
    """Takes one step; see `OptimizerDef.apply_gradient`.

    Raises:
      ValueError: if no learning rate was given.
    """
    hp = hyper_params
    if hp.learning_rate is None:
      raise ValueError('Adafactor got no learning_rate; the trainer must pass one')
    leaves, treedef = jax.tree.flatten(params)
    old = treedef.flatten_up_to(state.param_states)
    f32 = [p.astype(jnp.float32) for p in leaves]
    u = [g.astype(jnp.float32) for g in treedef.flatten_up_to(grads)]
    moments = optax.FactoredState(
      state.step, [s.v_row for s in old], [s.v_col for s in old], [s.v for s in old]
    )
    u, moments = self._second_moments(hp).update(u, moments, f32)
    stateless = []
    if hp.clipping_threshold is not None:
      stateless.append(optax.clip_by_block_rms(hp.clipping_threshold))
    stateless.append(optax.scale(hp.learning_rate))
    if hp.multiply_by_parameter_scale:
      stateless.append(optax.scale_by_param_block_rms(hp.epsilon2))
    chain = optax.chain(*stateless)
    u, _ = chain.update(u, chain.init(f32), f32)
    ms = [s.m for s in old]
    if hp.beta1 is not None:
      ms = u = [hp.beta1 * m + (1.0 - hp.beta1) * x for m, x in zip(ms, u, strict=True)]
    decay = 1.0 - (hp.weight_decay_rate or 0.0)
    new = [
      (decay * p32 - x).astype(p.dtype)
      for p, p32, x in zip(leaves, f32, u, strict=True)
    ]
    states = map(AdafactorParamState, moments.v_row, moments.v_col, moments.v, ms)
    return treedef.unflatten(new), OptimizerState(
      state.step + 1, treedef.unflatten(list(states))
    )

  def derive_logical_axes(self, state: OptimizerState, param_logical_axes):
    """Full moments are laid out like their parameter, everything else replicated."""
    momentum = self.hyper_params.beta1 is not None

    def axes_of(axes, s):
      return AdafactorParamState(
        None, None, axes if s.v.shape != (1,) else None, axes if momentum else None
      )

    states = jax.tree.map(
      axes_of, param_logical_axes, state.param_states, is_leaf=_is_axes
    )
    return OptimizerState(None, states)


def _is_axes(x) -> bool:
  return isinstance(x, jax.sharding.PartitionSpec)
