"""T5X's Trainer with what a long uptraining run needs around it.

It checks a restored checkpoint against the model before the first step and the
first save, and shows progress with the time to go.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import tqdm
from t5x import trainer

from gqa_t5x import models

# Seconds between redraws: few where they would fill a log file.
_INTERVAL = (
  {} if sys.stderr.isatty() or 'TQDM_MININTERVAL' in os.environ else {'mininterval': 10}
)


class Trainer(trainer.Trainer):
  """T5X's Trainer.

  Args are T5X's, and:
    total_steps: the last step of the run, for the progress bar and to refuse a
      checkpoint of a later step; None for neither.

  Raises:
    ValueError: if restored parameters or optimizer moments do not fit the model, or
      are of a later step than the last of the run.
  """

  def __init__(
    self,
    model: Any,
    train_state: Any,
    partitioner: Any,
    eval_names: Any,
    summary_dir: str | None,
    train_state_axes: Any,
    rng: jax.Array,
    learning_rate_fn: Any,
    num_microbatches: int | None,
    total_steps: int | None = None,
    **kwargs,
  ):
    _check_train_state(model, train_state, total_steps)
    super().__init__(
      model=model,
      train_state=train_state,
      partitioner=partitioner,
      eval_names=eval_names,
      summary_dir=summary_dir,
      train_state_axes=train_state_axes,
      rng=rng,
      learning_rate_fn=learning_rate_fn,
      num_microbatches=num_microbatches,
      **kwargs,
    )
    self._total_steps = total_steps
    self._bar = None

  def train(self, batch_iter: Iterator[Any], num_steps: int, start_step=None) -> Any:
    """Trains for `num_steps`; see T5X's method."""
    if self._total_steps is None or jax.process_index():
      return super().train(batch_iter, num_steps, start_step)
    if self._bar is None:
      first_step = int(self.train_state.step if start_step is None else start_step)
      self._bar = tqdm.tqdm(
        total=self._total_steps,
        initial=first_step,
        desc='train',
        unit='step',
        **_INTERVAL,
      )
    return super().train(_counted(batch_iter, self._bar), num_steps, start_step)

  def close(self) -> None:
    """Ends the progress bar and stops the metric threads."""
    if self._bar is not None:
      self._bar.close()
    super().close()


def _counted(batch_iter: Iterator[Any], bar: tqdm.tqdm) -> Iterator[Any]:
  for batch in batch_iter:
    bar.update()  # Before the yield: after the last batch nobody asks for more.
    yield batch


def _check_train_state(model: Any, train_state: Any, total_steps: int | None) -> None:
  models.check_params(model, train_state.params)
  expected = jax.eval_shape(model.optimizer_def.init_state, train_state.params)
  models.check_same_shapes(
    expected.param_states,
    train_state.param_states,
    'optimizer moments of the checkpoint',
  )
  step = int(train_state.step)
  if total_steps is not None and total_steps < step:
    raise ValueError(
      f'TRAIN_STEPS={total_steps} is below the step of the checkpoint, {step}.'
      ' TRAIN_STEPS counts from the first step of pre-training: raise it.'
    )
