"""T5X's Trainer with what a long run needs.

It checks a restored checkpoint against the model before the first step, shows progress
with the time to go, watches the loss (loss_watch.py), stops to be saved when the
machine is taken away, also while it evaluates by decoding (`evaluator`), and ends when
another run has taken its folder (run_lock.py).
"""

import concurrent.futures
import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
import tqdm
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from t5x import trainer

from gqa_t5x import command_line
from gqa_t5x.errors import BadInput
from gqa_t5x.training import loss_watch, models, restore, run_lock

# Seconds between redraws: few where they would fill a log file.
_INTERVAL = (
  {} if sys.stderr.isatty() or 'TQDM_MININTERVAL' in os.environ else {'mininterval': 10}
)


class Notice:
  """Listens for SIGTERM, which a machine gets that is taken away (pre-emption).

  On several hosts, all agree on the step to stop at: with `jax.distributed`, JAX's
  pre-emption service takes the signal and tells the other hosts. On one host alone,
  this class takes it; a second SIGTERM ends the process.

  Attributes:
    close: function that gives the signal back.
  """

  def __init__(self):
    self._received = threading.Event()
    self.close = lambda: None
    if not jax.distributed.is_initialized():
      self.close = command_line.on_sigterm(self._received.set)

  def received(self) -> bool:
    """Returns whether SIGTERM has come; never with `jax.distributed`."""
    return self._received.is_set()

  def reached(self, step: int) -> bool:
    """Returns whether to stop before the next step; all hosts ask before each."""
    return self.received() or multihost_utils.reached_preemption_sync_point(step)


class _EndOfEvaluation(Exception):
  """SIGTERM came."""


class Trainer(trainer.Trainer):
  """T5X's Trainer.

  Attributes:
    current: of this process, until it is closed.

  Args are T5X's, and:
    total_steps: the last step of the run, for the progress bar and to refuse a
      checkpoint of a later step; None for neither.
    loss_normalizing_factor: the model's: a number or None. With one of T5X's names the
      loss of a token is unknown, and is not watched.
    save_period: steps between checkpoints, each of which needs room on a local disk;
      None if none is saved.
    initial_checkpoint: what a run begins from that has none of its own, for messages;
      an empty list from scratch.

  Raises:
    BadInput: restored parameters or optimizer moments do not fit the model, are not
      finite, or are of a later step than the last of the run.
  """

  current: 'Trainer | None' = None

  def __init__(
    self,
    *,
    model: Any,
    train_state: Any,
    summary_dir: str | None,
    total_steps: int | None = None,
    loss_normalizing_factor: float | str | None = None,
    save_period: int | None = None,
    initial_checkpoint: str | Sequence[str] = (),
    **kwargs,
  ):
    _check_train_state(model, train_state, total_steps)
    restored = _saved(summary_dir, int(train_state.step)) or initial_checkpoint
    restore.check_finite(_arrays(train_state), str(restored or 'The first state'))
    super().__init__(
      model=model, train_state=train_state, summary_dir=summary_dir, **kwargs
    )
    self._total_steps, self._model_dir = total_steps, summary_dir
    self._bar, self._newest = None, None
    self._notice, self._saves = Notice(), bool(save_period)
    self._loss_normalizing_factor = loss_normalizing_factor
    self._watch = loss_watch.Watch()
    self._found = dict.fromkeys(loss_watch.SCALARS, 0)
    Trainer.current = self

  def train(self, batch_iter: Iterator[Any], num_steps: int, start_step=None) -> Any:
    """Trains for `num_steps`; see T5X's method.

    Raises:
      PreemptionError: the machine is taken away; T5X saves `train_state`, which is that
        of the step reached.
      SystemExit: the same, if this step is saved already.
      InUse: another run has taken the folder; nothing more is saved.
      OSError: the next checkpoint would not fit on the disk.
      BadInput: the state is not finite any more; it is not saved.
    """
    try:
      return self._train(batch_iter, num_steps, start_step)
    except (BadInput, OSError):
      self.close()  # Threads that end after this one would have the last word.
      raise

  def _train(self, batch_iter: Iterator[Any], num_steps: int, start_step: Any) -> Any:
    self._check_room()
    if start_step is None:
      start_step = int(self.train_state.step)
    self._begin_bar(start_step)
    batches = self._until_preempted(batch_iter, start_step)
    try:
      summary = super().train(batches, num_steps, start_step)
    except trainer.PreemptionError:
      if self._newest is not None:  # T5X sets train_state after the last step alone.
        self.train_state = self._newest
      _check_finite(self.train_state)
      raise
    _check_finite(self.train_state)
    if not jax.process_index() and not isinstance(self._loss_normalizing_factor, str):
      # In the thread that wrote the metrics: training does not wait for them.
      step = start_step + num_steps
      summary.add_done_callback(lambda done: self._look(step, done))
    return summary

  def eval(self, batch_iters: Mapping[str, Iterator[Any]]) -> Any:
    """Evaluates; see T5X's method.

    SIGTERM ends it as `ended_by_sigterm` says, without numbers.
    """
    with self.ended_by_sigterm() as batches_of:
      return super().eval({n: batches_of(x) for n, x in batch_iters.items()})
    return {name: {} for name in batch_iters}  # T5X refuses an empty mapping.

  @contextlib.contextmanager
  def ended_by_sigterm(self) -> Iterator[Callable[[Iterable], Iterator]]:
    """Ends an evaluation, its body, before its next batch when SIGTERM comes.

    That is on one host. If the step is not saved, the block ends early, and training
    saves the step before its next one, and stops.

    Yields:
      What the body's batches go through.

    Raises:
      SystemExit: SIGTERM came, and the step is saved.
    """

    def until_received(batches):
      for batch in batches:
        if self._notice.received():
          raise _EndOfEvaluation
        yield batch

    try:
      yield until_received
    except _EndOfEvaluation:
      step = int(self.train_state.step)
      if _saved(self._model_dir, step):
        self._stop(step)

  def compile_train(self, batch: Any) -> None:
    """Compiles the training step, and has it remember its result; see T5X's method."""
    super().compile_train(batch)
    step = self._compiled_train_step

    def remembered(train_state, batch):
      self._newest, metrics = step(train_state, batch)
      return self._newest, metrics

    self._compiled_train_step = remembered

  def _check_room(self) -> None:
    if not self._saves or jax.process_index() or '://' in self._model_dir:
      return
    needed = sum(x.nbytes for x in jax.tree.leaves(self.train_state))
    free = shutil.disk_usage(self._model_dir).free
    if needed > free:
      raise OSError(
        f'MODEL_DIR={self._model_dir} has no room for a checkpoint: {needed:,} bytes'
        f' are needed, {free:,} are free. Free some, or keep fewer (KEEP_CHECKPOINTS);'
        ' then run the same command again.'
      )

  def _begin_bar(self, start_step: int) -> None:
    if self._total_steps is None or self._bar is not None or jax.process_index():
      return
    progress = {'total': self._total_steps, 'initial': start_step}
    self._bar = tqdm.tqdm(desc='train', unit='step', **progress, **_INTERVAL)

  def _until_preempted(self, batch_iter: Iterator[Any], step: int) -> Iterator[Any]:
    """Yields batches until the run has to stop; each one drawn is trained on."""
    while True:
      run_lock.check()
      if self._notice.reached(step):
        self._stop(step)
      batch = next(batch_iter)
      if self._bar is not None:
        self._bar.update()  # Before the yield: after the last nobody asks for more.
      yield batch
      step += 1

  def _stop(self, step: int) -> None:
    """Raises what ends training before `step`."""
    if self._bar is not None:
      self._bar.close()
    again = 'the same command, run again, goes on from there'
    if step == self._total_steps:
      again = 'this was the last; python -m t5x.eval evaluates it'
    if multihost_utils.broadcast_one_to_all(
      np.int32(bool(_saved(self._model_dir, step)))
    ):
      self.close()
      raise SystemExit(f'SIGTERM at step {step}, which is saved: {again}.')
    raise trainer.PreemptionError(f'SIGTERM at step {step}: saved, if it can; {again}.')

  def _look(self, step: int, summary: Any) -> None:
    """Logs spikes and divergence in the period that ends at `step`; writes counts."""
    if summary.exception():
      return  # T5X raises it.
    values = {name: metric.value for name, metric in summary.result().items()}
    loss = loss_watch.nats_per_token(values, self._loss_normalizing_factor)
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
      self.train_metrics_manager.write_scalar(loss_watch.SCALARS[kind], number, step)

  def lower_train_step(self, batch: Any) -> Any:
    """Returns a training step, lowered; the state and the batch may be shapes."""
    return self._partitioned_train_step.lower(self.train_state, batch)

  def close(self) -> None:
    """Ends the progress bar, and stops the metric threads."""
    Trainer.current = None
    self._notice.close()
    if self._bar is not None:
      self._bar.close()
    super().close()


def evaluator(
  evaluator_cls: Callable[..., seqio.Evaluator], **kwargs
) -> seqio.Evaluator:
  """Makes an evaluator by decoding, which SIGTERM ends as it ends `Trainer.eval`.

  It may take an hour, in which a machine that is taken away would be gone.

  Args:
    evaluator_cls: seqio's.
    **kwargs: its arguments, which T5X gives.
  """
  made = evaluator_cls(**kwargs)
  evaluate = made.evaluate

  def until_stopped(**kwargs) -> tuple[Any, Any]:
    with Trainer.current.ended_by_sigterm() as batches_of:
      return evaluate(
        **{
          name: _through(batches_of, value) if callable(value) else value
          for name, value in kwargs.items()
        }
      )
    no_metrics = concurrent.futures.Future()
    no_metrics.set_result({})
    return no_metrics, {}

  made.evaluate = until_stopped
  return made


def _through(batches_of: Callable, infer: Callable) -> Callable:
  """Returns T5X's function of a dataset, whose batches go through `batches_of`."""
  return lambda dataset: infer(_Dataset(dataset, batches_of))


class _Dataset:
  """A `tf.data.Dataset` that is read through a function, and so is what is made of it.

  What TensorFlow runs may be ahead of the reader by any number of batches.
  """

  def __init__(self, dataset: tf.data.Dataset, batches_of: Callable):
    self._dataset, self._batches_of = dataset, batches_of

  def __len__(self) -> int:
    return len(self._dataset)

  def __getattr__(self, name: str) -> Any:
    value = getattr(self._dataset, name)

    def call(*args, **kwargs):
      plain = (x._dataset if isinstance(x, _Dataset) else x for x in args)
      result = value(*plain, **kwargs)
      is_dataset = isinstance(result, tf.data.Dataset)
      return _Dataset(result, self._batches_of) if is_dataset else result

    return call if callable(value) else value

  def as_numpy_iterator(self) -> Iterator[Any]:
    return self._batches_of(self._dataset.as_numpy_iterator())


def _saved(model_dir: str | None, step: int) -> epath.Path | None:
  """The finished checkpoint of a step, if there is one."""
  path = epath.Path(model_dir or '') / f'checkpoint_{step}'
  return path if model_dir and path.exists() else None


def _arrays(state: Any) -> dict[str, Any]:
  return {'target': state.params, 'moments': state.param_states}


def _check_finite(state: Any) -> None:
  """Raises BadInput if parameters or optimizer moments (not shapes) are not finite."""
  if bad := restore.not_finite(_arrays(state)):
    raise BadInput(
      f'At step {int(state.step)}, {len(bad)} arrays of the state are not finite,'
      f' {bad[-1]} among them: training has diverged. They are not saved; go on from an'
      ' earlier checkpoint, or with a smaller learning rate or a longer warm-up.'
    )


def _check_train_state(model: Any, train_state: Any, total_steps: int | None) -> None:
  models.check_trainable(model)
  models.check_params(model, train_state.params)
  expected = jax.eval_shape(model.optimizer_def.init_state, train_state.params)
  what = 'optimizer moments of the checkpoint'
  models.check_same_shapes(expected.param_states, train_state.param_states, what)
  step = int(train_state.step)
  if total_steps is not None and total_steps < step:
    raise BadInput(
      f'TRAIN_STEPS={total_steps} is below the step of the checkpoint, {step}.'
      ' TRAIN_STEPS counts from the first step of pre-training: raise it.'
    )
