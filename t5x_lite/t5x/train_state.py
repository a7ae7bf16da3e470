"""Step, parameters and optimizer state in one tree, and its form in a checkpoint."""

from collections.abc import Mapping
from typing import Any, Optional

import flax
import jax.numpy as jnp
from flax.core import FrozenDict, freeze, unfreeze
from flax.linen.partitioning import get_axis_names
from flax.serialization import from_state_dict, to_state_dict

from t5x import adafactor


def _split_variables(model_variables: Mapping[str, Any]) -> tuple[FrozenDict, Any]:
  """Returns parameters and their axis metadata; rejects any other collection."""
  variables = freeze(model_variables)
  other = set(variables) - {'params', 'params_axes'}
  if other:
    raise ValueError(
      f'the module creates the collections {sorted(other)}; the stand-in trains '
      'parameters only (use T5X for mutable collections)'
    )
  return variables['params'], variables.get('params_axes')


class FlaxOptimTrainState(flax.struct.PyTreeNode):
  """What training carries from step to step.

  Attributes:
    params: the module's parameters.
    optimizer_state: step and per-parameter optimizer states.
    optimizer_def: the optimizer (static).
    params_axes: axis metadata of the parameters (static in effect: no arrays).
  """

  params: Any
  optimizer_state: adafactor.OptimizerState
  optimizer_def: Any = flax.struct.field(pytree_node=False, default=None)
  params_axes: Optional[FrozenDict] = None  # noqa: UP045 (flax reads annotations)

  @classmethod
  def create(cls, optimizer_def, model_variables) -> 'FlaxOptimTrainState':
    """Makes the first state from `module.init`'s variables."""
    params, params_axes = _split_variables(model_variables)
    return cls(params, optimizer_def.init_state(params), optimizer_def, params_axes)

  @property
  def step(self):
    return self.optimizer_state.step

  @property
  def param_states(self):
    return self.optimizer_state.param_states

  def state_dict(self) -> dict[str, Any]:
    """A checkpoint's tree: `target`, `state/step`, `state/param_states`."""
    state = to_state_dict(self.optimizer_state)
    return to_state_dict({'target': unfreeze(self.params), 'state': state})

  def restore_state(self, state_dict: Mapping[str, Any]) -> 'FlaxOptimTrainState':
    """The inverse of `state_dict`."""
    state = from_state_dict(self.optimizer_state, state_dict['state'])
    params = from_state_dict(self.params, state_dict['target'])
    return self.replace(params=params, optimizer_state=state)

  def replace_step(self, step):
    return self.replace(optimizer_state=self.optimizer_state.replace(step=step))

  def apply_gradient(self, grads, learning_rate) -> 'FlaxOptimTrainState':
    """Takes one optimizer step."""
    hp = self.optimizer_def.update_hyper_params(learning_rate=learning_rate)
    params, state = self.optimizer_def.apply_gradient(
      hp, self.params, self.optimizer_state, grads
    )
    return self.replace(params=params, optimizer_state=state)

  def as_logical_axes(self) -> 'FlaxOptimTrainState':
    """Logical axis names (or None for replicated) in place of arrays."""
    axes = get_axis_names(self.params_axes)
    states = self.optimizer_def.derive_logical_axes(self.optimizer_state, axes)
    return self.replace(params=axes, optimizer_state=states, params_axes=None)


class InferenceState(flax.struct.PyTreeNode):
  """Step and parameters alone, for evaluation and inference."""

  step: Any
  params: Any
  params_axes: Optional[FrozenDict] = None  # noqa: UP045

  @classmethod
  def create(cls, model_variables) -> 'InferenceState':
    return cls(jnp.array(0), *_split_variables(model_variables))

  def state_dict(self) -> dict[str, Any]:
    """The part of a checkpoint's tree without the optimizer's moments."""
    target = to_state_dict(unfreeze(self.params))
    return {'target': target, 'state': {'step': self.step}}

  def restore_state(self, state_dict: Mapping[str, Any]) -> 'InferenceState':
    """The inverse of `state_dict`."""
    params = from_state_dict(self.params, state_dict['target'])
    return self.replace(params=params, step=state_dict['state']['step'])

  def as_logical_axes(self) -> 'InferenceState':
    axes = get_axis_names(self.params_axes)
    return self.replace(step=None, params=axes, params_axes=None)


TrainState = FlaxOptimTrainState | InferenceState
