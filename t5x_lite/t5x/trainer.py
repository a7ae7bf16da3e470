"""Runs training and evaluation steps and writes their metrics."""

import abc
import enum
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu import asynclib, metric_writers

from t5x import metrics as metrics_lib
from t5x import models, partitioning, utils
from t5x import train_state as train_state_lib

BatchType = Mapping[str, np.ndarray]


@jax.jit
def merge_metrics(a, b):
  """Merges two mappings of metrics."""
  return jax.tree.map(lambda x, y: x.merge(y), a, b, is_leaf=metrics_lib.is_metric_obj)


class PreemptionError(Exception):
  """The machine goes away: training must save a checkpoint and stop."""


class MetricsManager:
  """Writes metrics to TensorBoard and the log, off the main thread."""

  def __init__(self, name: str, summary_dir: str | None = None):
    """Opens the writer of `summary_dir/name` (or of the log alone)."""
    self.summary_dir = os.path.join(summary_dir, name) if summary_dir else None
    self._writer = metric_writers.create_default_writer(
      summary_dir, collection=name, asynchronous=True
    )
    self._lock = threading.Lock()
    self._pool = asynclib.Pool(thread_name_prefix='MetricsManager', max_workers=1)
    self._start = None

  @property
  def summary_writer(self):
    return self._writer

  def write_scalar(self, key: str, val: Any, step: int) -> None:
    self.write_scalars(step, {key: val})

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    with self._lock:
      self._writer.write_scalars(int(utils.get_local_data(step)), scalars)

  def start_duration_timer(self, block_on: Any = ()) -> None:
    """Starts the clock once these arrays are ready."""
    jax.block_until_ready(block_on)
    self._start = time.time()

  def write_metrics_summary(self, metrics: Any, step: int, num_steps: int):
    """Writes metrics in the background; returns a future of name -> value."""
    step, start = int(utils.get_local_data(step)), self._start
    if start is None:
      raise ValueError('call start_duration_timer() first')

    def write():
      host = jax.tree.map(utils.get_local_data, jax.block_until_ready(metrics))
      host = metrics_lib.set_time_metrics_duration(host, time.time() - start)
      host = metrics_lib.set_step_metrics_num_steps(host, num_steps)
      values = {k: v.compute_value() for k, v in host.items()}
      with self._lock:
        metric_writers.write_values(self._writer, step, values)
      return values

    return self._pool(write)()

  def close(self) -> None:
    """Waits for what is still being written."""
    try:
      self._pool.close()
    finally:
      if self._writer is not None:
        self._writer.close()
        self._writer = None


class BaseTrainer(abc.ABC):
  """Holds the state and loops over steps; subclasses define the steps."""

  def __init__(
    self,
    model: models.BaseModel,
    train_state: train_state_lib.TrainState,
    partitioner: partitioning.PjitPartitioner,
    eval_names: Sequence[str],
    summary_dir: str | None,
    train_state_axes: Any,
    rng: jax.Array,
  ):
    """Keeps its arguments and opens the metric writers.

    Args:
      model: has `loss_fn` and `eval_fn`.
      train_state: on the devices.
      partitioner: partitions the steps.
      eval_names: names of the datasets that `eval` will get.
      summary_dir: of the TensorBoard folders `train` and `training_eval/<name>`.
      train_state_axes: layout of the state.
      rng: of dropout, together with the step.
    """
    self._model = model
    self._train_state = train_state
    self._train_state_axes = train_state_axes
    self._partitioner = partitioner
    self._base_rng = rng
    self._compiled_train_step = None
    self._compiled_eval_steps: dict[str, Callable[..., Any]] = {}
    self._mutex = threading.RLock()
    self._started = time.time()
    self.stop_training = False
    self.train_metrics_manager = MetricsManager('train', summary_dir)
    self.eval_metrics_managers = {
      name: MetricsManager(f'training_eval/{name[:113]}', summary_dir)
      for name in eval_names
    }

  def close(self) -> None:
    """Waits until all metrics are written."""
    for manager in (self.train_metrics_manager, *self.eval_metrics_managers.values()):
      manager.close()

  def _get_step_rng(self, step) -> jax.Array:
    return jax.random.fold_in(self._base_rng, step)

  @property
  def train_state(self) -> train_state_lib.TrainState:
    with self._mutex:
      return self._train_state

  @train_state.setter
  def train_state(self, train_state: train_state_lib.TrainState) -> None:
    with self._mutex:
      self._train_state = train_state

  def train(
    self, batch_iter: Iterator[BatchType], num_steps: int, start_step: int | None = None
  ):
    """Trains for some steps.

    Args:
      batch_iter: yields batches.
      num_steps: how many.
      start_step: the state's step, if known (saves a transfer).

    Returns:
      A future of name -> metric value over these steps.
    """
    step_fn = self._compiled_train_step or self._partitioned_train_step
    metrics = None
    with self._mutex:
      state = self._train_state
      start = int(
        utils.get_local_data(state.step) if start_step is None else start_step
      )
      self.train_metrics_manager.start_duration_timer(block_on=state)
      for step in range(start, start + num_steps):
        logging.log_every_n_seconds(logging.INFO, 'Training: step %d', 10, step)
        with jax.profiler.StepTraceAnnotation('train', step_num=step):
          state, update = step_fn(state, next(batch_iter))
          # The old state's memory is gone: a failing next step must find the new one.
          self._train_state = state
          metrics = merge_metrics(metrics, update) if metrics else update
    if metrics is not None:
      metrics['timing/uptime'] = clu.metrics.LastValue.from_model_output(
        jnp.asarray([time.time() - self._started])
      )
    return self.train_metrics_manager.write_metrics_summary(
      metrics, start + num_steps, num_steps
    )

  def _compile(self, fn, batch: BatchType, manager: MetricsManager):
    start = time.time()
    compiled = self._partitioner.compile(fn, self.train_state, batch)
    step = self.train_state.step
    manager.write_scalar('timing/compilation_seconds', time.time() - start, step)
    return compiled

  def compile_train(self, batch: BatchType) -> None:
    """Compiles the training step ahead of its first use."""
    self._compiled_train_step = self._compile(
      self._partitioned_train_step, batch, self.train_metrics_manager
    )

  def compile_eval(self, batches: Mapping[str, BatchType]) -> None:
    """Compiles the evaluation step, once per shape of batch."""
    done = {}
    for name, batch in batches.items():
      key = str(sorted((k, v.shape, v.dtype) for k, v in batch.items()))
      if key not in done:
        manager = self.eval_metrics_managers[name]
        done[key] = self._compile(self._partitioned_eval_step, batch, manager)
      self._compiled_eval_steps[name] = done[key]

  def eval(self, batch_iters: Mapping[str, Iterator[BatchType]]):
    """Evaluates with teacher forcing.

    Args:
      batch_iters: dataset name to batches.

    Returns:
      Dataset name to name -> metric value.

    Raises:
      ValueError: if a dataset yields no batch.
    """
    state, summaries = self.train_state, {}
    for name, batches in batch_iters.items():
      logging.info('Evaluating: %s.', name)
      step_fn = self._compiled_eval_steps.get(name, self._partitioned_eval_step)
      manager = self.eval_metrics_managers[name]
      manager.start_duration_timer(block_on=state)
      updates = [step_fn(state, batch) for batch in batches]
      if not updates:
        raise ValueError(f'the evaluation dataset {name} yields no batch')
      metrics = functools.reduce(merge_metrics, updates)
      summary = manager.write_metrics_summary(metrics, state.step, len(updates))
      summaries[name] = summary.result()
    return summaries

  @property
  @abc.abstractmethod
  def _partitioned_train_step(self):
    """`(train_state, batch) -> (train_state, metrics)`."""

  @property
  @abc.abstractmethod
  def _partitioned_eval_step(self):
    """`(train_state, batch) -> metrics`."""


class Trainer(BaseTrainer):
  """Trains with a learning rate schedule, optionally in microbatches."""

  def __init__(
    self,
    model: models.BaseModel,
    train_state: train_state_lib.TrainState,
    partitioner: partitioning.PjitPartitioner,
    eval_names: Sequence[str],
    summary_dir: str | None,
    train_state_axes: Any,
    rng: jax.Array,
    learning_rate_fn: Callable[[jnp.ndarray], jnp.ndarray],
    num_microbatches: int | None = None,
    weight_metrics_computer: Any = None,
  ):
    """Keeps its arguments.

    Args are those of `BaseTrainer`, and:
      learning_rate_fn: step to learning rate.
      num_microbatches: parts of a batch whose gradients are added up; None or 1: one.
      weight_metrics_computer: must be None here.
    """
    if weight_metrics_computer is not None:
      raise ValueError('weight_metrics_computer needs the real T5X')
    self._learning_rate_fn = learning_rate_fn
    self._num_microbatches = num_microbatches
    super().__init__(
      model, train_state, partitioner, eval_names, summary_dir, train_state_axes, rng
    )

  def _gradients(self, params, batch: BatchType, rng):
    """Returns the summed gradients and metrics of a batch."""
    grad_fn = jax.value_and_grad(self._model.loss_fn, has_aux=True)
    n = self._num_microbatches or 1
    if n == 1:
      (_, metrics), grads = grad_fn(params, batch, rng)
      return grads, metrics
    size = next(iter(batch.values())).shape[0]
    if size % n:
      raise ValueError(
        f'batch size {size} is not divisible by num_microbatches={n}; choose a divisor'
      )
    spec = self._partitioner.data_partition_spec

    # As in T5X, every microbatch draws the same dropout masks.
    rng = rng if rng is None else jax.random.split(rng)[1]

    def step(total, part):
      part = jax.tree.map(
        lambda x: partitioning.with_sharding_constraint(x, spec), part
      )
      (_, metrics), grads = grad_fn(params, part, rng)
      return jax.tree.map(jnp.add, total, grads), metrics

    parts = jax.tree.map(lambda x: x.reshape(n, size // n, *x.shape[1:]), batch)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    grads, stacked = jax.lax.scan(step, zeros, parts)
    each = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(n)]
    return grads, functools.reduce(merge_metrics, each)

  @functools.cached_property
  def _partitioned_train_step(self):
    def train_step(state: train_state_lib.TrainState, batch: BatchType):
      rate = self._learning_rate_fn(state.step)
      rng = self._get_step_rng(state.step)
      grads, metrics = self._gradients(state.params, batch, rng)
      metrics = dict(metrics)
      for name, kind in (
        ('learning_rate', clu.metrics.Average),
        ('learning_rate/current', clu.metrics.LastValue),
      ):
        metrics[name] = kind.from_model_output(jnp.asarray([rate]))
      return state.apply_gradient(grads, learning_rate=rate), metrics

    return self._partitioner.partition(
      train_step,
      in_axis_resources=(self._train_state_axes, self._partitioner.data_partition_spec),
      out_axis_resources=(self._train_state_axes, None),
      donate_argnums=(0,),
    )

  @functools.cached_property
  def _partitioned_eval_step(self):
    return self._partitioner.partition(
      lambda state, batch: self._model.eval_fn(state.params, batch)[1],
      in_axis_resources=(self._train_state_axes, self._partitioner.data_partition_spec),
      out_axis_resources=None,
    )


@enum.unique
class ActionMode(enum.Enum):
  """When an action runs."""

  TRAIN = 1
  TRAIN_EVAL = 2
  INFER_EVAL = 3


class BaseAction(abc.ABC):
  """Looks at metrics, and may stop the training."""

  @abc.abstractmethod
  def run(self, train_state, metrics_by_task: Mapping[str, Mapping[str, Any]]) -> bool:
    """Returns whether training should stop."""
