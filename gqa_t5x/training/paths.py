"""Paths and steps as T5X needs them: absolute paths, steps since pre-training began."""

from collections.abc import Sequence

from etils import epath

from gqa_t5x.checkpoints import folders
from gqa_t5x.errors import BadInput


def absolute(path: str | Sequence[str]) -> str | Sequence[str]:
  """Returns a path from gin or the command line as an absolute one.

  T5X's Orbax checkpoints refuse relative paths.

  Args:
    path: local (relative to the working directory, `~` allowed) or `gs://...`; or an
      empty list, T5X's way to say "no checkpoint".

  Returns:
    The absolute path; an empty list stays one.

  Raises:
    BadInput: if the path is an empty string.
  """
  if path == '':
    raise BadInput('A path in the gin configuration is empty; give a folder.')
  if not isinstance(path, str) or '://' in path:
    return path
  return str(epath.Path(path).expanduser().absolute())


def step_after(checkpoint: str, num_steps: int) -> int:
  """Returns the last step of a run that trains a checkpoint for some steps more.

  It depends on the checkpoint's name alone: a run that is started again ends at the
  same step. No file is opened.

  Args:
    checkpoint: path of the folder checkpoint_<step>, local or gs://.
    num_steps: steps to train for.

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
