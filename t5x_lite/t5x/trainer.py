"""Runs training and evaluation steps and writes their metrics."""

import functools
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
from t5x import models, partitioning
from t5x import train_state as train_state_lib

BatchType = Mapping[str, np.ndarray]


@jax.jit
def merge_metrics(a, b):
  """Merges two mappings of metrics."""
  return jax.tree.map(lambda x, y: x.merge(y), a, b, is_leaf=metrics_lib.is_metric_obj)


class PreemptionError(Exception):
  """The machine goes away: training must save a checkpoint and stop."""


class MetricsManager:
  """Writes metrics to TensorBoard (`summary_dir/name`) and the log, off the thread."""

  def __init__(self, name: str, summary_dir: str | None = None):
    self.summary_writer = metric_writers.create_default_writer(
      summary_dir,
      just_logging=jax.process_index() > 0,
      collection=name,
      asynchronous=True,
    )
    self._lock = threading.Lock()
    self._pool = asynclib.Pool(thread_name_prefix='MetricsManager', max_workers=1)

  def write_scalar(self, key: str, val: Any, step: int) -> None:
    with self._lock:
      self.summary_writer.write_scalars(int(step), {key: val})

  def start_duration_timer(self, block_on: Any = ()) -> None:
    """Starts the clock once these arrays are ready."""
    jax.block_until_ready(block_on)
    self._start = time.time()

  def write_metrics_summary(self, metrics: Any, step: int, num_steps: int):
    """Writes metrics in the background; returns a future of name -> value."""
    step, start = int(step), self._start

    def write():
      host = jax.device_get(metrics)  # waits for the steps
      host = metrics_lib.fill_in(host, num_steps, time.time() - start)
      values = {k: v.compute_value() for k, v in host.items()}
      with self._lock:
        metric_writers.write_values(self.summary_writer, step, values)
      return values

    return self._pool(write)()

  def close(self) -> None:
    """Waits for what is still being written."""
    try:
      self._pool.close()
    finally:
      self.summary_writer.close()


class Trainer:
  """Trains with a learning rate schedule, optionally in microbatches."""

  def __init__(
    self,
    model: models.EncoderDecoderModel,
    train_state: train_state_lib.FlaxOptimTrainState,
    partitioner: partitioning.PjitPartitioner,
    eval_names: Sequence[str],
    summary_dir: str | None,
    train_state_axes: Any,
    rng: jax.Array,
    learning_rate_fn: Callable[[jnp.ndarray], jnp.ndarray],
    num_microbatches: int | None = None,
  ):
    """Opens metric writers in `summary_dir`: `train` and `training_eval/<name>`."""
    self.train_state, self._train_state_axes = train_state, train_state_axes
    self._model, self._partitioner, self._base_rng = model, partitioner, rng
    self._learning_rate_fn = learning_rate_fn
    self._num_microbatches = num_microbatches or 1
    self._compiled_train_step = None
    self._compiled_eval_steps: dict[str, Callable[..., Any]] = {}
    self._started = time.time()
    self.train_metrics_manager = MetricsManager('train', summary_dir)
    self.eval_metrics_managers = {
      name: MetricsManager(f'training_eval/{name[:113]}', summary_dir)
      for name in eval_names
    }

  def close(self) -> None:
    """Waits until all metrics are written."""
    for manager in (self.train_metrics_manager, *self.eval_metrics_managers.values()):
      manager.close()

  def train(
    self, batch_iter: Iterator[BatchType], num_steps: int, start_step: int | None = None
  ):
    """Trains for some steps; returns a future of name -> metric value over them."""
    step_fn = self._compiled_train_step or self._partitioned_train_step
    metrics = None
    start = int(self.train_state.step if start_step is None else start_step)
    self.train_metrics_manager.start_duration_timer(block_on=self.train_state)
    for step in range(start, start + num_steps):
      logging.log_every_n_seconds(logging.INFO, 'Training: step %d', 10, step)
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        # The old state's memory is gone after this: the new one is kept at once.
        batch = self._partitioner.batch_of_all_hosts(next(batch_iter))
        self.train_state, update = step_fn(self.train_state, batch)
        metrics = merge_metrics(metrics, update) if metrics else update
    metrics['timing/uptime'] = _last(time.time() - self._started)
    return self.train_metrics_manager.write_metrics_summary(
      metrics, start + num_steps, num_steps
    )

  def _compile(self, fn, batch: BatchType, manager: MetricsManager):
    start = time.time()
    compiled = fn.lower(self.train_state, batch).compile()
    seconds = time.time() - start
    manager.write_scalar('timing/compilation_seconds', seconds, self.train_state.step)
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
    """Evaluates datasets by name, none empty; returns name -> metric -> value."""
    state, summaries = self.train_state, {}
    for name, batches in batch_iters.items():
      logging.info('Evaluating: %s.', name)
      step_fn = self._compiled_eval_steps.get(name, self._partitioned_eval_step)
      manager = self.eval_metrics_managers[name]
      manager.start_duration_timer(block_on=state)
      to_devices = self._partitioner.batch_of_all_hosts
      updates = [step_fn(state, to_devices(batch)) for batch in batches]
      if not updates:
        raise ValueError(f'the evaluation dataset {name} yields no batch')
      metrics = functools.reduce(merge_metrics, updates)
      summary = manager.write_metrics_summary(metrics, state.step, len(updates))
      summaries[name] = summary.result()
    return summaries

  def _gradients(self, params, batch: BatchType, rng):
    """Returns the summed gradients and metrics of a batch."""
    grad_fn = jax.value_and_grad(self._model.loss_fn, has_aux=True)
    n = self._num_microbatches
    if n == 1:
      (_, metrics), grads = grad_fn(params, batch, rng)
      return grads, metrics
    size = next(iter(batch.values())).shape[0]
    if size % n:
      raise ValueError(
        f'batch size {size} is not divisible by num_microbatches={n}; choose a divisor'
      )
    # As in T5X, every microbatch draws the same dropout masks.
    rng = jax.random.split(rng)[1]

    def step(total, part):
      rows = self._partitioner.data_partition_spec
      part = {
        k: partitioning.with_sharding_constraint(x, rows) for k, x in part.items()
      }
      (_, metrics), grads = grad_fn(params, part, rng)
      return jax.tree.map(jnp.add, total, grads), metrics

    parts = jax.tree.map(lambda x: x.reshape(n, size // n, *x.shape[1:]), batch)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    grads, stacked = jax.lax.scan(step, zeros, parts)
    each = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(n)]
    return grads, functools.reduce(merge_metrics, each)

  @functools.cached_property
  def _partitioned_train_step(self):
    def train_step(state: train_state_lib.FlaxOptimTrainState, batch: BatchType):
      rate = self._learning_rate_fn(state.step)
      rng = jax.random.fold_in(self._base_rng, state.step)
      grads, metrics = self._gradients(state.params, batch, rng)
      average = clu.metrics.Average.from_model_output(jnp.asarray([rate]))
      rates = {'learning_rate': average, 'learning_rate/current': _last(rate)}
      return state.apply_gradient(grads, learning_rate=rate), {**metrics, **rates}

    axes, data = self._train_state_axes, self._partitioner.data_partition_spec
    return self._partitioner.partition(
      train_step, (axes, data), (axes, None), donate_argnums=(0,)
    )

  @functools.cached_property
  def _partitioned_eval_step(self):
    def eval_step(state: train_state_lib.FlaxOptimTrainState, batch: BatchType):
      return self._model.eval_fn(state.params, batch)[1]

    axes, data = self._train_state_axes, self._partitioner.data_partition_spec
    return self._partitioner.partition(eval_step, (axes, data), None)


def _last(value) -> clu.metrics.LastValue:
  return clu.metrics.LastValue.from_model_output(jnp.asarray([value]))
