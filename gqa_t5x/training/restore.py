"""Checks a checkpoint against the model before T5X opens it, and once it is restored.

T5X silently drops layers that the model lacks, and its errors on a missing or partial
checkpoint neither name it nor say what to do. The gin files pass the path through here
before `utils.RestoreCheckpointConfig`: names and shapes are read. Whether all values
are finite is asked on the devices, where they are by then.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from t5x import checkpoints

from gqa_t5x.checkpoints import config, folders, tree
from gqa_t5x.errors import BadInput
from gqa_t5x.training import models


def checked_path(
  path: str | Sequence[str], model: Any, model_dir: str | None = None
) -> str | Sequence[str]:
  """Returns `path`, once the checkpoint that a run will restore fits its model.

  Args:
    path: one checkpoint; an empty list to start from scratch.
    model: the run's model.
    model_dir: where a training run saves; its latest checkpoint, if there is one, is
      restored instead of `path` (resume.py). None for evaluation and inference.

  Raises:
    BadInput: if the checkpoint is missing, partial, or does not fit the model.
  """
  if model_dir and folders.list_checkpoints(epath.Path(model_dir)):
    return path  # Not what is restored.
  if isinstance(path, str):
    check_fits(_checkpoint_folder(path), model)
  return path


def check_fits(path: epath.Path, model: Any) -> None:
  """Raises BadInput if a checkpoint is not of the model.

  That is if parameters are missing, unknown, or of another shape, or if its file of the
  configuration (checkpoints/config.py) has other values than the model.
  """
  params = tree.parameters(folders.open_checkpoint(path))
  models.check_params(model, params, str(path))
  theirs = config.read(path)
  if theirs is None:
    return
  ours = config_of(model)
  for name, value in dataclasses.asdict(theirs).items():
    if value != getattr(ours, name):
      remedy = _REMEDIES.get(name, _OF_NETWORK).format(name, value)
      raise BadInput(
        f'{path} was made with {name}={value!r}, and the model of this run has'
        f' {getattr(ours, name)!r}{remedy}.'
      )


class CheckpointManager(checkpoints.OrbaxCheckpointManagerInterface):
  """T5X's, for evaluation and inference: what it restores is finite."""

  def restore(self, *args, path: str, **kwargs) -> Any:
    """Restores a checkpoint; see T5X's method, and `check_finite`."""
    state = super().restore(*args, path=path, **kwargs)
    check_finite(state.params, path)
    return state


def check_finite(tree: Any, source: str) -> None:
  """Raises BadInput if restored arrays of a checkpoint are not finite, and names both.

  Args:
    tree: of arrays; what is no array, such as a shape, is passed over.
    source: the checkpoint.
  """
  if bad := not_finite(tree):
    more = f' and {len(bad) - 3} more' if len(bad) > 3 else ''
    raise BadInput(
      f'{source} has values that are not finite, in {", ".join(bad[:3])}{more}: it is'
      ' of a run that diverged, or damaged. Take an earlier one.'
    )


def not_finite(tree: Any) -> list[str]:
  """The names of those arrays of a tree, on any devices, that are not finite."""
  named = {
    jax.tree_util.keystr(path, simple=True, separator='/'): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
    if isinstance(x, jax.Array | np.ndarray)
  }
  are_finite = jax.device_get(_are_finite([*named.values()]))  # At once: one wait.
  return [name for name, ok in zip(named, are_finite, strict=True) if not ok]


@jax.jit
def _are_finite(arrays: list[jax.Array]) -> list[jax.Array]:
  return [jnp.isfinite(x).all() for x in arrays]


# What to do where a value of a checkpoint is not the model's.
_OF_NETWORK = '; give --gin.network.config.{}={}'
_REMEDIES = {
  'decoder_start_token_id': ', as T5X trains and decodes; it can only be converted',
  'eos_token_id': ", as its vocabulary says; choose the checkpoint's VOCABULARY",
  'mlp_activation': '; take the model from the checkpoint, by'
  ' --gin_file=gin/models/from_checkpoint.gin',
}


def config_of(model: Any) -> config.ModelConfig:
  """Returns what a checkpoint of the model has in its file of the configuration."""
  module = getattr(model.module, 'config', None)
  fields = dataclasses.asdict(config.ModelConfig())
  values = {name: getattr(module, name, value) for name, value in fields.items()}
  activation, *gate = getattr(module, 'mlp_activations', ('gelu', 'linear'))
  own = None if activation == ('gelu' if gate else 'relu') else activation
  values['mlp_activation'] = own
  eos_id = getattr(model.output_vocabulary, 'eos_id', None)
  return config.ModelConfig(**values | ({'eos_token_id': eos_id} if eos_id else {}))


def _checkpoint_folder(path: str) -> epath.Path:
  folder = folders.find_checkpoint(epath.Path(path))
  if not folders.step_is_known(folder):
    raise BadInput(
      f'{path} is a Hugging Face model, which T5X cannot restore; convert it first:'
      ' python -m gqa_t5x.convert --help'
    )
  if folder.parent == epath.Path(path):
    raise BadInput(f'{path} is a folder of checkpoints; give one of them: {folder}')
  return folder


def step_after(checkpoint: str, num_steps: int) -> int:
  """Returns the last step of a run that trains a checkpoint for `num_steps` more.

  It depends on the checkpoint's name, checkpoint_<step>, alone: a run that is started
  again ends at the same step. No file is opened.

  Raises:
    BadInput: if the name has no step, or there is nothing to train.
  """
  step = None
  if isinstance(checkpoint, str):
    step = folders.checkpoint_step(epath.Path(checkpoint))
  if step is None:
    raise BadInput(
      f'INITIAL_CHECKPOINT_PATH={checkpoint!r} does not end with checkpoint_<step>, so'
      ' its step is unknown; give the last step of the run: --gin.TRAIN_STEPS=...'
    )
  if num_steps < 1:
    raise BadInput(f'FINETUNE_STEPS={num_steps} must be at least 1.')
  return step + num_steps
