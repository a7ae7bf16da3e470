"""Steps as T5X counts them: absolutely, from the first of pre-training."""

from etils import epath

from gqa_t5x.checkpoints import folders


def after(checkpoint: str, num_steps: int) -> int:
  """Returns the last step of a run that trains a checkpoint for some steps more.

  It depends on the checkpoint's name alone: a run that is started again ends at the
  same step. No file is opened.

  Args:
    checkpoint: path of the folder checkpoint_<step>, local or gs://.
    num_steps: steps to train for.

  Raises:
    ValueError: if the name has no step, or there is nothing to train.
  """
  step = None
  if isinstance(checkpoint, str):
    step = folders.checkpoint_step(epath.Path(checkpoint))
  if step is None:
    raise ValueError(
      f'INITIAL_CHECKPOINT_PATH={checkpoint!r} does not end with checkpoint_<step>, so'
      ' its step is unknown; give the last step of the run: --gin.TRAIN_STEPS=...'
    )
  if num_steps < 1:
    raise ValueError(f'FINETUNE_STEPS={num_steps} must be at least 1.')
  return step + num_steps
