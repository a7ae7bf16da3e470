r"""Writes a model's predictions or scores for a seqio task as JSON lines.

Example:
  python -m t5x.infer --gin_file=gin/runs/infer.gin \
    --gin.CHECKPOINT_PATH=\'/tmp/run/checkpoint_100\' \
    --gin.INFER_OUTPUT_DIR=\'/tmp/out\'

The gin files bind the arguments of `infer` (`import __main__ as infer_script`, then
`infer_script.infer: model = ...`). The lines go to
output_dir/<task>-<mode>.jsonl-00000-of-00001, one example each.
"""

import functools
import json
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from t5x import gin_utils, utils

_MODES = {
  'predict': 'predict_batch',
  'score': 'score_batch',
  'predict_with_aux': 'predict_batch_with_aux',
}


def _plain(value: Any) -> Any:
  """Turns bytes and arrays into what JSON knows."""
  if isinstance(value, bytes):
    return value.decode('utf-8')
  return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def write_inferences_to_file(
  path: str,
  inferences: tuple[Sequence[Any], Mapping[str, Any]],
  task_ds: tf.data.Dataset,
  mode: str,
  vocabulary: seqio.Vocabulary | None = None,
) -> None:
  """Writes one JSON object a line: the `_pretokenized` inputs, prediction or score.

  Args:
    path: of the file.
    inferences: predictions (token ids) or scores, and auxiliary outputs by name.
    task_ds: the examples, in the same order.
    mode: predict, score or predict_with_aux.
    vocabulary: turns token ids into text.
  """
  outputs, aux = inferences
  with tf.io.gfile.GFile(path, 'w') as f:
    for i, example in enumerate(task_ds.as_numpy_iterator()):
      texts = {k: _plain(v) for k, v in example.items() if k.endswith('_pretokenized')}
      line = {'inputs': texts}
      if mode == 'score':
        line['score'] = outputs[i]
      else:
        text = vocabulary.decode_tf(tf.constant(outputs[i])).numpy()
        line['prediction'] = _plain(text)
      if aux:
        line['aux'] = {k: _plain(v[i]) for k, v in aux.items()}
      f.write(json.dumps(line, cls=seqio.TensorAndNumpyEncoder) + '\n')


def _infer_task(task, ds, converter, a, infer_fn, path: str) -> None:
  """Runs one task in chunks, so that memory does not grow with the data."""
  cfg = a.dataset_cfg
  zipped = tf.data.Dataset.zip((ds, converter(ds, cfg.task_feature_lengths)))
  parts = []
  for i, batch in zipped.padded_batch(a.checkpoint_period * cfg.batch_size).enumerate():
    examples = tf.data.Dataset.from_tensor_slices(batch)
    rng = jax.random.fold_in(jax.random.PRNGKey(0), int(i))
    result = infer_fn(examples.map(lambda _, x: x).enumerate(), rng=rng)
    pairs, aux = result if isinstance(result, tuple) else (result, {})
    part = f'{path}.tmp-{int(i):05}'
    inferences = ([output for _, output in pairs], aux)
    vocabulary = task.output_features['targets'].vocabulary
    a.write_fn(part, inferences, examples.map(lambda x, _: x), a.mode, vocabulary)
    parts.append(part)
    logging.info('%s: chunk %d, %d examples.', task.name, int(i), len(pairs))
  if not parts:
    raise ValueError(f'the task {task.name} has no examples in split {cfg.split!r}')
  with tf.io.gfile.GFile(f'{path}.tmp', 'wb') as merged:
    for part in parts:
      with tf.io.gfile.GFile(part, 'rb') as f:
        merged.write(f.read())
      tf.io.gfile.remove(part)
  tf.io.gfile.rename(f'{path}.tmp', path, overwrite=True)
  with tf.io.gfile.GFile(f'{path}.COMPLETED', 'w') as f:
    f.write('')


def infer(
  *,
  mode: str,
  model,
  dataset_cfg: utils.DatasetConfig,
  restore_checkpoint_cfg: utils.RestoreCheckpointConfig,
  partitioner,
  output_dir: str,
  checkpoint_period: int,
  shard_id: int = 0,
  num_shards: int = 1,
  write_fn=write_inferences_to_file,
  train_state_initializer_cls=utils.TrainStateInitializer,
  fallback_init_rng: int | None = None,
  summarize_config_fn=gin_utils.summarize_gin_config,
  verify_matching_vocabs_fn=utils.verify_matching_vocabs,
  file_extension: str = 'jsonl',
  keep_aux_as_numpy: bool = False,
  use_orbax: bool = True,
) -> None:
  """Infers on every task of a mixture that was not completed before.

  Args:
    mode: predict, score or predict_with_aux.
    model: what infers.
    dataset_cfg: the data.
    restore_checkpoint_cfg: its path is that of one checkpoint.
    partitioner: lays state and data out.
    output_dir: receives the files.
    checkpoint_period: batches per chunk that is held in memory.
    shard_id: which share of the data, of
    num_shards: many.
    write_fn: see `write_inferences_to_file`.
    train_state_initializer_cls: see `utils.TrainStateInitializer`.
    fallback_init_rng: seed of parameters that the checkpoint lacks, if allowed.
    summarize_config_fn: called as fn(model_dir=, summary_writer=None, step=0).
    verify_matching_vocabs_fn: checks the data against the model; None for no check.
    file_extension: of the files.
    keep_aux_as_numpy: whether auxiliary outputs stay arrays.
    use_orbax: must be True here.

  Raises:
    ValueError: if the mode is unknown, or there is no checkpoint or no data.
  """
  _infer(types.SimpleNamespace(**locals()))


def _infer(a: types.SimpleNamespace) -> None:
  """Does what `infer` was asked to do."""
  cfg, model = a.dataset_cfg, a.model
  if a.mode not in _MODES:
    raise ValueError(f'mode={a.mode!r}; choose one of {sorted(_MODES)}')
  if cfg.module:
    utils.import_module(cfg.module)
  if a.verify_matching_vocabs_fn is not None:
    a.verify_matching_vocabs_fn(cfg, model)
  if a.shard_id == 0:
    a.summarize_config_fn(model_dir=a.output_dir, summary_writer=None, step=0)
  provider = seqio.maybe_get_mixture_or_task(cfg.mixture_or_task_name)
  converter = model.FEATURE_CONVERTER_CLS(pack=False)

  def get_dataset(source):
    return source.get_dataset(
      sequence_length=cfg.task_feature_lengths,
      split=cfg.split,
      shuffle=False,
      num_epochs=1,
      shard_info=seqio.ShardInfo(index=a.shard_id, num_shards=a.num_shards),
      use_cached=cfg.use_cached,
      seed=cfg.seed,
    )

  specs = converter(get_dataset(provider), cfg.task_feature_lengths).element_spec
  shapes = {k: (cfg.batch_size, *s.shape) for k, s in specs.items()}
  dtypes = {k: jnp.dtype(s.dtype.as_numpy_dtype) for k, s in specs.items()}
  make = a.train_state_initializer_cls
  initializer = utils.inference_initializer(
    make, model, a.partitioner, shapes, dtypes, a.output_dir
  )
  seed, restore = a.fallback_init_rng, a.restore_checkpoint_cfg
  rng = None if seed is None else jax.random.PRNGKey(seed)
  state, _ = utils.create_checkpoint_manager_and_restore(
    initializer, a.partitioner, restore, restore.path, rng, use_orbax=a.use_orbax
  )
  if state is None:
    raise ValueError("RestoreCheckpointConfig.path is empty; give a checkpoint's path")
  step, axes = getattr(model, _MODES[a.mode]), initializer.train_state_axes
  fn = utils.get_infer_fn(
    step, cfg.batch_size, axes, a.partitioner, a.keep_aux_as_numpy
  )
  shard = f'{a.file_extension}-{a.shard_id:05}-of-{a.num_shards:05}'
  for task in seqio.get_subtasks(provider):
    path = os.path.join(a.output_dir, f'{task.name}-{a.mode}.{shard}')
    if tf.io.gfile.exists(f'{path}.COMPLETED'):
      logging.info('%s is complete; skipped.', path)
      continue
    infer_fn = functools.partial(fn, train_state=state)
    _infer_task(task, get_dataset(task), converter, a, infer_fn, path)


if __name__ == '__main__':
  gin_utils.run_command(infer)
