r"""Evaluates a checkpoint on the metrics of a seqio task or mixture.

Example:
  python -m t5x.eval --gin_file=gin/runs/eval.gin --gin.CHECKPOINT_PATH=\'runs/mha\'

The gin files bind the arguments of `evaluate` (`import __main__ as eval_script`, then
`eval_script.evaluate: model = ...`). Metrics go to output_dir/inference_eval, by
the loggers of seqio.Evaluator.
"""

from t5x import quiet  # noqa: F401 (before any other import of TensorFlow)

# isort: split
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import seqio
from absl import logging

from t5x import data, gin_utils, models, partitioning, utils
from t5x import train_state as train_state_lib


class InferenceEvaluator:
  """Evaluates a model by decoding or scoring, as the task's metrics ask."""

  def __init__(
    self,
    infer_eval_dataset_cfg: utils.DatasetConfig,
    inference_evaluator_cls: Callable[..., seqio.Evaluator],
    model: models.EncoderDecoderModel,
    partitioner: partitioning.PjitPartitioner,
    log_dir: str,
  ):
    """Loads the targets. Loggers write to `log_dir`/inference_eval."""
    cfg = infer_eval_dataset_cfg
    data.verify_matching_vocabs(cfg, model)
    self._model, self._partitioner = model, partitioner
    self._batch_size, self._fns = cfg.batch_size, None
    self._evaluator = inference_evaluator_cls(
      mixture_or_task_name=cfg.mixture_or_task_name,
      feature_converter=model.FEATURE_CONVERTER_CLS(pack=False),
      eval_split=cfg.split,
      use_cached=cfg.use_cached,
      seed=cfg.seed,
      sequence_length=cfg.task_feature_lengths,
      log_dir=os.path.join(log_dir, 'inference_eval'),
    )
    self.model_feature_shapes = self._evaluator.model_feature_shapes
    self.eval_tasks = self._evaluator.eval_tasks
    self.close = self._evaluator.close

  def evaluate(self, train_state: train_state_lib.TrainState, train_state_axes: Any):
    """Returns a future of task -> metrics; None but on the first process."""
    if self._fns is None:  # compiled once, used at every evaluation
      model = self._model
      steps = (model.predict_batch, model.predict_batch_with_aux, model.score_batch)
      rest = (self._batch_size, train_state_axes, self._partitioner)
      self._fns = [utils.get_infer_fn(step, *rest) for step in steps]
    bind, rng = functools.partial, jax.random.PRNGKey(0)
    predict, with_aux, score = (bind(f, train_state=train_state) for f in self._fns)
    metrics, _ = self._evaluator.evaluate(
      compute_metrics=jax.process_index() == 0,
      step=int(train_state.step),
      predict_fn=bind(predict, rng=rng),
      score_fn=score,
      predict_with_aux_fn=bind(with_aux, rng=rng),
    )
    return metrics


def evaluate(
  *,
  model: models.EncoderDecoderModel,
  dataset_cfg: utils.DatasetConfig,
  restore_checkpoint_cfg: utils.RestoreCheckpointConfig,
  partitioner: partitioning.PjitPartitioner,
  output_dir: str,
  inference_evaluator_cls: Callable[..., seqio.Evaluator] = seqio.Evaluator,
) -> None:
  """Evaluates one checkpoint; ValueError if there is none. Arguments are T5X's."""
  gin_utils.summarize_gin_config(output_dir, summary_writer=None, step=0)
  cfg = dataset_cfg
  evaluator = InferenceEvaluator(
    cfg, inference_evaluator_cls, model, partitioner, output_dir
  )
  if not evaluator.eval_tasks:
    name = cfg.mixture_or_task_name
    raise ValueError(f'{name} has no metrics, or no split {cfg.split!r}')
  features = evaluator.model_feature_shapes.items()
  shapes = {name: (cfg.batch_size, *shape) for name, shape in features}
  state, axes = utils.restore_for_inference(
    model, partitioner, shapes, None, restore_checkpoint_cfg, output_dir
  )
  logging.info('Metrics: %s', evaluator.evaluate(state, axes).result())
  evaluator.close()


if __name__ == '__main__':
  gin_utils.run_command(evaluate)
