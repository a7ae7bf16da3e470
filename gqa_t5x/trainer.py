"""T5X's Trainer with what a long uptraining run needs around it.

It checks a restored checkpoint against the model before the first step and the
first save, shows progress with the time to go, and watches the loss (stability.py).
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import tqdm
from absl import logging
from t5x import trainer

from gqa_t5x import models, stability

# Seconds between redraws: few where they would fill a log file.
_INTERVAL = (
  {} if sys.stderr.isatty() or 'TQDM_MININTERVAL' in os.environ else {'mininterval': 10}
)
# In TensorBoard's `train`: how many there were since the start.
_SCALARS = {'spike': 'stability/spikes', 'divergence': 'stability/divergences'}


class Trainer(trainer.Trainer):
  """T5X's Trainer.

  Args are T5X's, and:
    total_steps: the last step of the run, for the progress bar and to refuse a
      checkpoint of a later step; None for neither.
    loss_normalizing_factor: the model's. With one of T5X's names, instead of a number
      or None, nothing says what a token loses, and the loss is not watched.

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
    loss_normalizing_factor: float | str | None = None,
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
    self._loss_normalizing_factor = loss_normalizing_factor
    self._watch = stability.Watch()
    self._found = dict.fromkeys(_SCALARS, 0)

  def train(self, batch_iter: Iterator[Any], num_steps: int, start_step=None) -> Any:
    """Trains for `num_steps`; see T5X's method."""
    if jax.process_index():
      return super().train(batch_iter, num_steps, start_step)
    if start_step is None:
      start_step = int(self.train_state.step)
    if self._total_steps is not None and self._bar is None:
      self._bar = tqdm.tqdm(
        total=self._total_steps,
        initial=start_step,
        desc='train',
        unit='step',
        **_INTERVAL,
      )
    batches = batch_iter if self._bar is None else _counted(batch_iter, self._bar)
    summary = super().train(batches, num_steps, start_step)
    if not isinstance(self._loss_normalizing_factor, str):
      # In the thread that wrote the metrics: training does not wait for them.
      step = start_step + num_steps
      summary.add_done_callback(lambda done: self._look(step, done))
    return summary

  def _look(self, step: int, summary: Any) -> None:
    """Says and writes whether the loss of a period is out of the ordinary."""
    if summary.exception():
      return  # T5X raises it.
    values = {name: metric.value for name, metric in summary.result().items()}
    loss = stability.nats_per_token(values, self._loss_normalizing_factor)
    for event in self._watch.add(step, loss):
      self._found[event.kind] += 1
      logging.warning(
        '%s of the loss at step %d: %.3f nats per token; the median was %s',
        event.kind,
        event.step,
        event.loss,
        'not known yet' if event.median is None else f'{event.median:.3f}',
      )
    for kind, number in self._found.items():
      self.train_metrics_manager.write_scalar(_SCALARS[kind], number, step)

  def lower_train_step(self, batch: Any) -> Any:
    """Returns a training step, lowered; the state and the batch may be shapes."""
    return self._partitioned_train_step.lower(self.train_state, batch)

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
