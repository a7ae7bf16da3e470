r"""Evaluates checkpoints on the metrics of a seqio task or mixture.

Example:
  python -m t5x.eval --gin_file=gin/runs/eval.gin --gin.CHECKPOINT_PATH=\'/tmp/run\'

The gin files bind the arguments of `evaluate` (`import __main__ as eval_script`, then
`eval_script.evaluate: model = ...`). Metrics go to output_dir/inference_eval, by
the loggers of seqio.Evaluator.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import seqio
import tensorflow as tf
from absl import logging

from t5x import gin_utils, models, partitioning, utils
from t5x import train_state as train_state_lib


class InferenceEvaluator:
  """Evaluates a model by decoding or scoring, as the task's metrics ask."""

  def __init__(
    self,
    infer_eval_dataset_cfg: utils.DatasetConfig,
    inference_evaluator_cls: Callable[..., seqio.Evaluator],
    model: models.BaseModel,
    partitioner: partitioning.PjitPartitioner,
    log_dir: str | None = None,
    verify_matching_vocabs_fn: Callable[..., None]
    | None = utils.verify_matching_vocabs,
  ):
    """Loads the targets.

    Args:
      infer_eval_dataset_cfg: the data.
      inference_evaluator_cls: makes the seqio evaluator.
      model: what is evaluated.
      partitioner: lays state and data out.
      log_dir: the loggers write to its folder inference_eval; None for no loggers.
      verify_matching_vocabs_fn: checks the data against the model; None for no check.
    """
    cfg = infer_eval_dataset_cfg
    if cfg.module:
      utils.import_module(cfg.module)
    if verify_matching_vocabs_fn and isinstance(model, models.BaseTransformerModel):
      verify_matching_vocabs_fn(cfg, model)
    self._model, self._partitioner, self._batch_size = (
      model,
      partitioner,
      cfg.batch_size,
    )
    logs = {'log_dir': os.path.join(log_dir, 'inference_eval')} if log_dir else {}
    self._evaluator = inference_evaluator_cls(
      mixture_or_task_name=cfg.mixture_or_task_name,
      feature_converter=model.FEATURE_CONVERTER_CLS(pack=False),
      eval_split=cfg.split,
      use_cached=cfg.use_cached,
      seed=cfg.seed,
      sequence_length=cfg.task_feature_lengths,
      use_memory_cache=cfg.use_memory_cache,
      **(logs or {'logger_cls': ()}),
    )
    self._fns = None

  @property
  def model_feature_shapes(self):
    return self._evaluator.model_feature_shapes

  @property
  def eval_tasks(self):
    return self._evaluator.eval_tasks

  def close(self) -> None:
    self._evaluator.close()

  def evaluate(self, train_state: train_state_lib.TrainState, train_state_axes: Any):
    """Runs the model over the data; returns a future of task -> metrics."""
    if self._fns is None:
      self._fns = [
        utils.get_infer_fn(step, self._batch_size, train_state_axes, self._partitioner)
        for step in (
          self._model.predict_batch,
          self._model.predict_batch_with_aux,
          self._model.score_batch,
        )
      ]
    predict, predict_with_aux, score = (
      functools.partial(fn, train_state=train_state) for fn in self._fns
    )
    rng = jax.random.PRNGKey(0)
    metrics, _ = self._evaluator.evaluate(
      compute_metrics=True,
      step=int(utils.get_local_data(train_state.step)),
      predict_fn=functools.partial(predict, rng=rng),
      score_fn=score,
      predict_with_aux_fn=functools.partial(predict_with_aux, rng=rng),
    )
    return metrics


def _read_done(path: str) -> list[str]:
  """Returns the checkpoints that earlier runs evaluated."""
  if not tf.io.gfile.exists(path):
    return []
  with tf.io.gfile.GFile(path) as f:
    return f.read().split()


def evaluate(
  *,
  model: models.BaseTransformerModel,
  dataset_cfg: utils.DatasetConfig,
  restore_checkpoint_cfg: utils.RestoreCheckpointConfig,
  partitioner: partitioning.PjitPartitioner,
  output_dir: str,
  inference_evaluator_cls: Callable[..., seqio.Evaluator] = seqio.Evaluator,
  summarize_config_fn: Callable[..., None] = gin_utils.summarize_gin_config,
  train_state_initializer_cls: type = utils.TrainStateInitializer,
  fallback_init_rng: int | None = None,
  use_orbax: bool = True,
) -> None:
  """Evaluates one checkpoint, or (mode `all`) each that was not evaluated before.

  Args:
    model: what is evaluated.
    dataset_cfg: the data.
    restore_checkpoint_cfg: the checkpoints.
    partitioner: lays state and data out.
    output_dir: receives metrics, config.gin and model-info.txt.
    inference_evaluator_cls: makes the seqio evaluator.
    summarize_config_fn: called as fn(model_dir=, summary_writer=None, step=0).
    train_state_initializer_cls: see `utils.TrainStateInitializer`.
    fallback_init_rng: seed of parameters that the checkpoint lacks, if allowed.
    use_orbax: must be True here.

  Raises:
    ValueError: if there is no checkpoint or nothing to evaluate.
  """
  summarize_config_fn(model_dir=output_dir, summary_writer=None, step=0)
  name = dataset_cfg.mixture_or_task_name
  evaluator = InferenceEvaluator(
    dataset_cfg, inference_evaluator_cls, model, partitioner, log_dir=output_dir
  )
  if not evaluator.eval_tasks:
    raise ValueError(f'{name} has no metrics, or no split {dataset_cfg.split!r}')
  shapes = {
    k: (dataset_cfg.batch_size, *s) for k, s in evaluator.model_feature_shapes.items()
  }
  initializer = utils.inference_initializer(
    train_state_initializer_cls, model, partitioner, shapes, None, output_dir
  )
  cfg, paths = utils.get_first_valid_restore_config_and_paths([restore_checkpoint_cfg])
  if not paths:
    raise ValueError(f'no checkpoint to evaluate in {restore_checkpoint_cfg.path!r}')
  done_file = os.path.join(output_dir, f'eval.{name}.ckpt')
  done = _read_done(done_file)
  if cfg.mode == 'all':
    paths = [path for path in paths if path not in done]
  rng = None if fallback_init_rng is None else jax.random.PRNGKey(fallback_init_rng)
  for path in paths:
    state, _ = utils.create_checkpoint_manager_and_restore(
      initializer, partitioner, cfg, path, rng, use_orbax=use_orbax
    )
    metrics = evaluator.evaluate(state, initializer.train_state_axes).result()
    logging.info('Metrics of %s: %s', path, metrics)
    done = sorted({*done, path}, key=checkpoint_order)
    with tf.io.gfile.GFile(done_file, 'w') as f:
      f.write('\n'.join(done))
  evaluator.close()


def checkpoint_order(path: str) -> tuple[int, str]:
  """Sorts checkpoints by the number their name ends on."""
  digits = os.path.basename(path.rstrip('/')).rpartition('_')[2]
  return (int(digits) if digits.isdigit() else -1, path)


if __name__ == '__main__':
  gin_utils.run_command(evaluate)
