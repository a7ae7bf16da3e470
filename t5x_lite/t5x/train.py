r"""Trains a model that gin files describe.

Example:
  python -m t5x.train --gin_file=gin/local/pretrain_mha.gin \
    --gin.MODEL_DIR=\'runs/mha\' --gin.TRAIN_STEPS=100

The gin files bind the arguments of `train` (`import __main__ as train_script`, then
`train_script.train: model = ...`). A run continues from the last checkpoint in its
model_dir; without one it starts from RestoreCheckpointConfig.path; without that, from
scratch. So the same command, run again, resumes. model_dir receives checkpoint_<step>/,
config.gin, model-info.txt and TensorBoard's train/, training_eval/, inference_eval/.
"""

from t5x import quiet  # noqa: F401 (before any other import of TensorFlow)

# isort: split
import contextlib
import time
import types

import jax
import jax.experimental.multihost_utils
import seqio
import tensorflow as tf
from absl import logging

from t5x import checkpoints, data, gin_utils, trainer, utils
from t5x import eval as eval_lib


def _random_keys(seed: int | None) -> jax.Array:
  """Returns the keys of initialisation and of dropout."""
  if seed is None:
    # The device's own generator: fast, but its numbers change with the layout.
    jax.config.update('jax_default_prng_impl', 'unsafe_rbg')
    seed = data.time_as_seed()
  return jax.random.split(jax.random.PRNGKey(seed))


def _smallest_period(total_steps: int, **periods: int | None) -> int:
  """Returns the smallest period, which must divide the others."""
  given = {name: period for name, period in periods.items() if period}
  smallest = min(given.values(), default=total_steps or 1)
  if any(period % smallest for period in given.values()):
    listed = ', '.join(f'{name}={period}' for name, period in given.items())
    raise ValueError(f'{listed}: each must be a multiple of the smallest, {smallest}')
  return smallest


class _Run:
  """One run: the arguments of `train` (`a`), what is made of them, and the loop."""

  def __init__(self, a: types.SimpleNamespace):
    self.a, self.save_cfg = a, a.checkpoint_cfg.save
    tf.io.gfile.makedirs(a.model_dir)
    evaluates = a.train_eval_dataset_cfg or a.infer_eval_dataset_cfg
    self.eval_period = a.eval_period if evaluates else None
    self.save_period = self.save_cfg.period if self.save_cfg else None
    self.epoch = _smallest_period(
      a.total_steps, eval_period=self.eval_period, checkpoint_period=self.save_period
    )
    init_rng, dropout_rng = _random_keys(a.random_seed)
    self._load_data()
    start = time.time()
    state = self._initial_state(init_rng)
    seconds = time.time() - start
    self.step = self.first = int(state.step)
    if a.total_steps < self.first:
      raise ValueError(
        f"total_steps={a.total_steps} is below the checkpoint's step {self.first}; "
        'raise it (TRAIN_STEPS counts from step 0), or use another checkpoint or '
        'model_dir'
      )
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
    self.evaluator = None
    if cfg := a.infer_eval_dataset_cfg:
      evaluator = eval_lib.InferenceEvaluator(
        cfg, a.inference_evaluator_cls, a.model, a.partitioner, a.model_dir
      )
      self.evaluator = evaluator if evaluator.eval_tasks else None

  def _load_data(self) -> None:
    a, self.eval_datasets, self.eval_is_compiled = self.a, {}, False
    cfg, eval_cfg = a.train_dataset_cfg, a.train_eval_dataset_cfg
    converter = a.model.FEATURE_CONVERTER_CLS
    layout = a.partitioner.get_data_layout(cfg.batch_size)
    shard = layout.shard_id, layout.num_shards
    data.verify_matching_vocabs(cfg, a.model)
    self.train_iter = data.prepare_train_iter(a.get_dataset_fn(cfg, *shard, converter))
    self.batch = data.batch_shapes(self.train_iter.element_spec, cfg.batch_size)
    if eval_cfg:
      a.partitioner.check_batch_size(eval_cfg.batch_size)
      data.verify_matching_vocabs(eval_cfg, a.model)
      self.eval_datasets = data.get_training_eval_datasets(
        eval_cfg, *shard, a.eval_steps, converter
      )

  def _initial_state(self, init_rng: jax.Array):
    """Resumes, or restores the configured checkpoint, or initialises."""
    a, save, restore = self.a, self.save_cfg, self.a.checkpoint_cfg.restore
    initializer = utils.TrainStateInitializer(
      optimizer_def=a.model.optimizer_def,
      init_fn=a.model.get_initial_variables,
      input_shapes={k: x.shape for k, x in self.batch.items()},
      input_types={k: x.dtype for k, x in self.batch.items()},
      partitioner=a.partitioner,
    )
    initializer.log_model_info(a.model_dir)
    self.axes = initializer.train_state_axes
    save_dataset = bool(save and save.save_dataset)
    resume = utils.RestoreCheckpointConfig(
      a.model_dir,
      dtype=save.dtype if save else 'float32',
      restore_dataset=save_dataset,
    )
    cfg = next((c for c in (resume, restore) if c and c.find()), None)
    if cfg is None:
      state = initializer.from_scratch(init_rng)
    else:
      state = initializer.from_checkpoint(cfg.find(), cfg.dtype)
      if cfg.restore_dataset:
        checkpoints.restore_dataset(cfg.find(), self.train_iter)
    self.manager = save and checkpoints.OrbaxCheckpointManagerInterface(
      a.model_dir,
      dataset_iterator=self.train_iter if save_dataset else None,
      save_dtype=save.dtype,
      keep=save.keep,
    )
    self.first_batch = self.train_iter.peek_async()  # after the iterator's restore
    return jax.block_until_ready(state)

  def _write(self, name: str, value: float) -> None:
    self.trainer.train_metrics_manager.write_scalar(f'timing/{name}', value, self.step)

  def save(self) -> None:
    """Saves a checkpoint of this step, unless there is one."""
    if not self.save_period or self.step in self.manager.all_steps():
      return
    start = time.time()
    logging.info('Saving a checkpoint of step %d.', self.step)
    self.manager.save(self.trainer.train_state)
    if self.step != self.first:
      self.manager.wait_until_finished()
      self._write('checkpoint_seconds', time.time() - start)

  def evaluate(self) -> None:
    """Evaluates with teacher forcing, and by decoding or scoring, where configured."""
    datasets = self.eval_datasets.items()
    if datasets and not self.eval_is_compiled:
      size = self.a.train_eval_dataset_cfg.batch_size
      self.trainer.compile_eval(
        {name: data.batch_shapes(ds.element_spec, size) for name, ds in datasets}
      )
      self.eval_is_compiled = True
    if datasets:
      self.trainer.eval({name: ds.as_numpy_iterator() for name, ds in datasets})
    if self.evaluator is not None:
      start = time.time()
      self.evaluator.evaluate(self.trainer.train_state, self.axes)
      self._write('evaluate_seconds', time.time() - start)

  def _train_until(self, end: int) -> None:
    try:
      while self.step < end:
        steps = min(end - self.step, self.a.stats_period or self.epoch)
        self.trainer.train(self.train_iter, steps, start_step=self.step)
        self.step += steps
    except trainer.PreemptionError:
      self.step = int(self.trainer.train_state.step)
      self.save()
      raise

  def loop(self) -> None:
    """Trains, saves and evaluates until the last step."""
    total = self.a.total_steps
    for end in [*range(self.first + self.epoch, total, self.epoch), total]:
      self._train_until(end)
      done, final = self.step - self.first, self.step == total
      if self.save_period and (final or done % self.save_period == 0):
        self.save()
      if self.eval_period and (final or done % self.eval_period == 0):
        self.evaluate()

  def run(self):
    """Returns the last step and the last state."""
    try:
      self._run()
    except Exception:
      # A checkpoint that is being saved would say, as the last line, that it cannot.
      with contextlib.suppress(Exception):
        self.manager.wait_until_finished()
      raise
    for part in (self.manager, self.trainer, self.evaluator):
      if part is not None:
        part.close()
    jax.experimental.multihost_utils.sync_global_devices('complete')
    return self.step, self.trainer.train_state

  def _run(self) -> None:
    if self.a.run_eval_before_training:
      self.evaluate()
    self.save()
    if self.step < self.a.total_steps:
      self.trainer.compile_train(self.batch)
      start = time.time()
      self.first_batch.result()
      self._write('train_iter_warmup', time.time() - start)
      self.loop()


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
  stats_period: int | None = None,
  random_seed: int | None,
  summarize_config_fn,
  inference_evaluator_cls=seqio.Evaluator,
  get_dataset_fn=data.get_dataset,
  run_eval_before_training: bool = False,
):
  """Trains a model, with checkpoints and evaluations on the way.

  Arguments are T5X's, but for:
    total_steps: the step to stop at, counted from step 0.
    stats_period: steps between metrics; by default the smallest period.
    random_seed: of initialisation and dropout; None takes the time.

  Returns:
    The last step and the last state.

  Raises:
    ValueError: if a checkpoint, period, step, batch size, split or vocabulary is wrong.
  """
  return _Run(types.SimpleNamespace(**locals())).run()


if __name__ == '__main__':
  gin_utils.run_command(train, several_processes=True)
