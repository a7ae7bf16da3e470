r"""Trains a model that gin files describe.

Example:
  python -m t5x.train --gin_file=gin/local/pretrain_mha.gin \
    --gin.MODEL_DIR=\'/tmp/run\' --gin.TRAIN_STEPS=100

The gin files bind the arguments of `train` (`import __main__ as train_script`, then
`train_script.train: model = ...`). A run continues from the last checkpoint in its
model_dir; without one it starts from RestoreCheckpointConfig.path; without that, from
scratch. So the same command, run again, resumes. model_dir receives checkpoint_<step>/,
config.gin, model-info.txt and TensorBoard's train/, training_eval/, inference_eval/.
"""

import os
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from t5x import eval as eval_lib
from t5x import gin_utils, models, utils
from t5x import trainer as trainer_lib

TRAIN_METRIC_KEY = 'train'
_Actions = Mapping[str, Sequence[trainer_lib.BaseAction]]


def _random_keys(seed: int | None, use_hardware_rng: bool) -> jax.Array:
  """Returns the keys of initialisation and of dropout."""
  if use_hardware_rng or seed is None:
    # The device's own generator: fast, but its numbers change with the layout.
    jax.config.update('jax_default_prng_impl', 'unsafe_rbg')
  return jax.random.split(
    jax.random.PRNGKey(int(time.time()) if seed is None else seed)
  )


def _restore_configs(save, restore, model_dir: str):
  """Returns where to look for a checkpoint: model_dir, then the configured path."""
  resume = utils.RestoreCheckpointConfig(
    path=model_dir,
    dtype=save.dtype if save else 'float32',
    restore_dataset=bool(save and save.save_dataset),
  )
  if restore is None or not restore.path:
    return [resume]
  if not isinstance(restore.path, str) or restore.mode == 'all':
    raise ValueError(
      f'training starts from one checkpoint, but RestoreCheckpointConfig.path is '
      f'{restore.path!r} and mode is {restore.mode!r}; give one path, and mode '
      "'specific' or 'latest'"
    )
  return [resume, restore]


def _steps_per_epoch(total_steps: int, **periods: int) -> int:
  """Returns the smallest period, which must divide the others."""
  steps = min((p for p in periods.values() if p), default=total_steps)
  if any(p % steps for p in periods.values()):
    listed = ', '.join(f'{k}={v}' for k, v in periods.items() if v)
    raise ValueError(f'{listed}: each must be a multiple of the smallest, {steps}')
  return steps


class _Run:
  """One run: what `train` was given (`a`), what is made of it, and the loop."""

  def __init__(self, a: types.SimpleNamespace):
    self.a, self.save_cfg = a, a.checkpoint_cfg.save
    tf.io.gfile.makedirs(a.model_dir)
    evaluates = a.train_eval_dataset_cfg or a.infer_eval_dataset_cfg
    self.eval_period = a.eval_period if evaluates else 0
    self.save_period = (self.save_cfg and self.save_cfg.period) or 0
    self.epoch = _steps_per_epoch(
      a.total_steps,
      eval_period=self.eval_period,
      checkpoint_period=self.save_period,
      gc_period=a.gc_period,
    )
    self.summary, self.compiled_eval = None, False
    init_rng, dropout_rng = _random_keys(a.random_seed, a.use_hardware_rng)
    self._load_data()
    start = time.time()
    initializer, state = self._initial_state(init_rng)
    self.axes = initializer.train_state_axes
    seconds = time.time() - start
    log_file = os.path.join(a.model_dir, 'model-info.txt')
    shapes = initializer.global_train_state_shape
    utils.log_model_info(log_file, shapes, a.partitioner)
    self._set_steps(int(utils.get_local_data(state.step)))
    self.trainer = a.trainer_cls(
      model=a.model,
      train_state=state,
      partitioner=a.partitioner,
      train_state_axes=self.axes,
      eval_names=self.eval_datasets.keys(),
      summary_dir=a.model_dir,
      rng=dropout_rng,
    )
    writer = self.trainer.train_metrics_manager.summary_writer
    a.summarize_config_fn(a.model_dir, writer, self.step)
    self._write('init_or_restore_seconds', seconds)
    self._make_evaluator()

  def _verify(self, cfg) -> None:
    fn, model = self.a.verify_matching_vocabs_fn, self.a.model
    if fn is not None and isinstance(model, models.BaseTransformerModel):
      fn(cfg, model)

  def _load_data(self) -> None:
    a, self.eval_datasets = self.a, {}
    layout = a.partitioner.get_data_layout(a.train_dataset_cfg.batch_size)
    shard, converter = (
      (layout.shard_id, layout.num_shards),
      a.model.FEATURE_CONVERTER_CLS,
    )
    self._verify(a.train_dataset_cfg)
    ds = a.get_dataset_fn(a.train_dataset_cfg, *shard, converter)
    self.train_iter = utils.prepare_train_iter(ds, partitioner=a.partitioner)
    self.batch = {
      k: np.ones((layout.batch_size, *s.shape[1:]), s.dtype)
      for k, s in self.train_iter.element_spec.items()
    }
    if a.train_eval_dataset_cfg:
      self._verify(a.train_eval_dataset_cfg)
      self.eval_datasets = a.train_eval_get_dataset_fn(
        a.train_eval_dataset_cfg, *shard, a.eval_steps, converter
      )

  def _initial_state(self, init_rng: jax.Array):
    a = self.a
    initializer = a.train_state_initializer_cls(
      optimizer_def=a.model.optimizer_def,
      init_fn=a.model.get_initial_variables,
      input_shapes={k: x.shape for k, x in self.batch.items()},
      input_types={k: x.dtype for k, x in self.batch.items()},
      partitioner=a.partitioner,
    )
    cfg, paths = utils.get_first_valid_restore_config_and_paths(
      _restore_configs(self.save_cfg, a.checkpoint_cfg.restore, a.model_dir)
    )
    state, self.manager = utils.create_checkpoint_manager_and_restore(
      initializer,
      a.partitioner,
      cfg,
      paths[0] if paths else None,
      init_rng,
      save_checkpoint_cfg=self.save_cfg,
      model_dir=a.model_dir,
      ds_iter=self.train_iter,
      use_orbax=a.use_orbax,
    )
    self.first_batch = self.train_iter.peek_async()  # after the iterator's restore
    state = initializer.from_scratch(init_rng) if state is None else state
    return initializer, jax.block_until_ready(state)

  def _set_steps(self, first: int) -> None:
    a, self.step, self.first = self.a, first, first
    self.total = first + a.relative_steps if a.relative_steps else a.total_steps
    if self.total < first:
      raise ValueError(
        f"total_steps={self.total} is below the checkpoint's step {first}; raise it "
        '(TRAIN_STEPS counts from step 0), or use another checkpoint or model_dir'
      )
    self.epoch = self.epoch or self.total or 1

  def _make_evaluator(self) -> None:
    a, self.evaluator = self.a, None
    if a.infer_eval_dataset_cfg is not None:
      evaluator = eval_lib.InferenceEvaluator(
        a.infer_eval_dataset_cfg,
        a.inference_evaluator_cls,
        a.model,
        a.partitioner,
        log_dir=a.model_dir,
        verify_matching_vocabs_fn=a.verify_matching_vocabs_fn,
      )
      self.evaluator = evaluator if evaluator.eval_tasks else None

  def _write(self, name: str, value: float) -> None:
    self.trainer.train_metrics_manager.write_scalar(f'timing/{name}', value, self.step)

  def _act(self, mode: str, metrics: Mapping[str, Any]) -> None:
    state = self.trainer.train_state
    stops = [x.run(state, metrics) for x in (self.a.actions or {}).get(mode, ())]
    self.trainer.stop_training |= any(stops)

  def save(self) -> None:
    """Saves a checkpoint of this step, unless there is one."""
    if not self.save_period or self.step in self.manager.all_steps():
      return
    if self.summary is not None:
      self.summary.result()
    start = time.time()
    logging.info('Saving a checkpoint of step %d.', self.step)
    self.manager.save(self.trainer.train_state, self.save_cfg.state_transformation_fns)
    if self.step != self.first:
      self.manager.wait_until_finished()
      self._write('checkpoint_seconds', time.time() - start)

  def evaluate(self) -> None:
    """Evaluates with teacher forcing, and by decoding or scoring, where configured."""
    datasets = self.eval_datasets.items()
    if datasets and not self.compiled_eval:
      zeros = {k: utils.get_zeros_batch_like_dataset(d) for k, d in datasets}
      self.trainer.compile_eval(zeros)
      self.compiled_eval = True
    if datasets:
      metrics = self.trainer.eval({k: d.as_numpy_iterator() for k, d in datasets})
      self._act('TRAIN_EVAL', metrics)
    if self.evaluator is not None:
      start = time.time()
      metrics = self.evaluator.evaluate(self.trainer.train_state, self.axes)
      if not self.a.concurrent_metrics:
        self._act('INFER_EVAL', metrics.result() or {})
      self._write('evaluate_seconds', time.time() - start)

  def _train_until(self, end: int) -> None:
    while self.step < end and not self.trainer.stop_training:
      steps = min(end - self.step, self.a.stats_period or self.epoch)
      self.summary = self.trainer.train(self.train_iter, steps, start_step=self.step)
      self.step += steps
      if not self.a.concurrent_metrics:
        self._act('TRAIN', {TRAIN_METRIC_KEY: self.summary.result()})

  def loop(self) -> None:
    """Trains, saves and evaluates until the last step."""
    end = self.first
    while self.step < self.total and not self.trainer.stop_training:
      end = min(end + self.epoch, self.total)
      try:
        self._train_until(end)
      except trainer_lib.PreemptionError:
        self.step = int(utils.get_local_data(self.trainer.train_state.step))
        self.summary = None
        self.save()
        raise
      done, final = self.step - self.first, self.step == self.total
      stop = self.trainer.stop_training
      if self.save_period and (final or stop or done % self.save_period == 0):
        self.save()
      if self.eval_period and (final or done % self.eval_period == 0):
        self.evaluate()

  def run(self):
    """Does it all; returns the last step and the last state."""
    if self.a.run_eval_before_training:
      self.evaluate()
    self.save()
    if self.step < self.total:
      self.trainer.compile_train(self.batch)
      start = time.time()
      self.first_batch.result()
      self._write('train_iter_warmup', time.time() - start)
      self.loop()
    for part in (self.manager, self.trainer, self.evaluator):
      if part is not None:
        part.close()
    return self.step, self.trainer.train_state


def train(
  *,
  model,
  train_dataset_cfg: utils.DatasetConfig,
  train_eval_dataset_cfg: utils.DatasetConfig | None,
  infer_eval_dataset_cfg: utils.DatasetConfig | None,
  checkpoint_cfg: utils.CheckpointConfig,
  partitioner,
  trainer_cls,
  model_dir: str,
  total_steps: int,
  eval_steps: int,
  eval_period: int,
  relative_steps: int | None = None,
  stats_period: int | None = None,
  random_seed: int | None,
  use_hardware_rng: bool = False,
  summarize_config_fn,
  inference_evaluator_cls=seqio.Evaluator,
  get_dataset_fn=utils.get_dataset,
  concurrent_metrics: bool = True,
  actions: _Actions | None = None,
  train_eval_get_dataset_fn=utils.get_training_eval_datasets,
  run_eval_before_training: bool = False,
  train_state_initializer_cls=utils.TrainStateInitializer,
  use_orbax: bool = True,
  verify_matching_vocabs_fn=utils.verify_matching_vocabs,
  gc_period: int = 0,
):
  """Trains a model, with checkpoints and evaluations on the way.

  Args:
    model: what is trained.
    train_dataset_cfg: the training data.
    train_eval_dataset_cfg: data to evaluate on with teacher forcing, or None.
    infer_eval_dataset_cfg: data to evaluate on by decoding or scoring, or None.
    checkpoint_cfg: what is restored and saved.
    partitioner: lays state and data out.
    trainer_cls: a Trainer, bound to its own arguments.
    model_dir: folder of the run.
    total_steps: the step to stop at, counted from step 0.
    eval_steps: batches per teacher-forced evaluation.
    eval_period: steps between evaluations.
    relative_steps: steps to take from the restored step on, instead of total_steps.
    stats_period: steps between metrics; by default the smallest period.
    random_seed: of initialisation and dropout; None takes the time.
    use_hardware_rng: whether the device's own random numbers are used.
    summarize_config_fn: called as fn(model_dir, summary_writer, step).
    inference_evaluator_cls: makes the evaluator of infer_eval_dataset_cfg.
    get_dataset_fn: see `utils.get_dataset`.
    concurrent_metrics: whether metrics are computed while training goes on (actions
      on TRAIN and INFER_EVAL then do not run).
    actions: TRAIN, TRAIN_EVAL or INFER_EVAL to actions.
    train_eval_get_dataset_fn: see `utils.get_training_eval_datasets`.
    run_eval_before_training: whether to evaluate first.
    train_state_initializer_cls: see `utils.TrainStateInitializer`.
    use_orbax: must be True here.
    verify_matching_vocabs_fn: checks a dataset against the model; None for no check.
    gc_period: must be a multiple of the other periods; without effect here.

  Returns:
    The last step and the last state.

  Raises:
    ValueError: if a checkpoint, period, step, batch size, split or vocabulary is wrong.
  """
  return _Run(types.SimpleNamespace(**locals())).run()


if __name__ == '__main__':
  gin_utils.run_command(train)
