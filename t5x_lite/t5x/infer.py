r"""Writes a model's predictions or scores for a seqio task as JSON lines.

Example:
  python -m t5x.infer --gin_file=gin/runs/infer.gin \
    --gin.CHECKPOINT_PATH=\'runs/mha/checkpoint_100\' \
    --gin.INFER_OUTPUT_DIR=\'runs/predictions\'

The gin files bind the arguments of `infer` (`import __main__ as infer_script`, then
`infer_script.infer: model = ...`). The lines go to
output_dir/<task>-<mode>.jsonl-00000-of-00001, one example each.
"""

from t5x import quiet  # noqa: F401 (before any other import of TensorFlow)

# isort: split
import functools
import json
import os
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import seqio
import tensorflow as tf
from absl import logging

from t5x import data, gin_utils, models, partitioning, utils

_MODES = {
  'predict': 'predict_batch',
  'score': 'score_batch',
  'predict_with_aux': 'predict_batch_with_aux',
}


def _plain(value: Any) -> Any:
  """Turns bytes and arrays into what JSON knows."""
  if isinstance(value, bytes):
    return value.decode('utf-8')
  return value.tolist() if hasattr(value, 'tolist') else value


def write_inferences_to_file(
  path: str,
  inferences: tuple[Any, Any],
  task_ds: tf.data.Dataset,
  mode: str,
  vocabulary,
) -> None:
  """Writes one JSON object an example of `task_ds`, which no converter has changed.

  `inferences` are the outputs in order, and name -> auxiliary outputs.
  """
  outputs, aux = inferences
  with tf.io.gfile.GFile(path, 'w') as f:
    for i, example in enumerate(task_ds.as_numpy_iterator()):
      kept = {k: _plain(v) for k, v in example.items() if k.endswith('_pretokenized')}
      line = {'inputs': kept}
      if mode == 'score':
        line['score'] = outputs[i]
      else:
        text = vocabulary.decode_tf(tf.constant(outputs[i])).numpy()
        line['prediction'] = _plain(text)
      if aux:
        line['aux'] = {k: v[i] for k, v in aux.items()}
      f.write(json.dumps(line, cls=seqio.TensorAndNumpyEncoder) + '\n')


def _infer_to_file(ds, infer_fn, chunk: int, write, path: str) -> None:
  """Writes a file, unless it is there, by a part for each `chunk` examples.

  `ds` has pairs of examples before and after the feature converter.
  """
  if tf.io.gfile.exists(path):
    logging.info('%s is complete; skipped.', path)
    return
  folder, name = os.path.split(path)
  folder, paths = os.path.join(folder, f'tmp-{name}'), []
  tf.io.gfile.makedirs(folder)
  for i, batch in ds.padded_batch(chunk).enumerate():
    paths.append(os.path.join(folder, f'{name}-chunk{int(i):05}'))
    if tf.io.gfile.exists(paths[-1]):
      logging.info('%s is there; skipped.', paths[-1])
      continue
    examples = tf.data.Dataset.from_tensor_slices(batch)
    rng = jax.random.fold_in(jax.random.PRNGKey(0), int(i))
    result = infer_fn(examples.map(lambda _, x: x).enumerate(), rng=rng)
    pairs, aux = result if isinstance(result, tuple) else (result, {})
    logging.info('Chunk %d: %d examples.', int(i), len(pairs))
    outputs = [output for _, output in pairs]
    write(f'{paths[-1]}.tmp', (outputs, aux), examples.map(lambda x, _: x))
    tf.io.gfile.rename(f'{paths[-1]}.tmp', paths[-1], overwrite=True)
  _merge(paths, path)
  tf.io.gfile.rmtree(folder)


def _merge(paths: list[str], path: str) -> None:
  """Joins files under a temporary name, and renames it when it is complete."""
  if not paths:
    raise ValueError(f'there are no examples for {path}; check the split')
  with tf.io.gfile.GFile(f'{path}.tmp', 'wb') as merged:
    for part in paths:
      with tf.io.gfile.GFile(part, 'rb') as f:
        shutil.copyfileobj(f, merged)
  tf.io.gfile.rename(f'{path}.tmp', path, overwrite=True)


def infer(
  *,
  mode: str,
  model: models.EncoderDecoderModel,
  dataset_cfg: utils.DatasetConfig,
  restore_checkpoint_cfg: utils.RestoreCheckpointConfig,
  partitioner: partitioning.PjitPartitioner,
  output_dir: str,
  checkpoint_period: int,
  shard_id: int = 0,
  num_shards: int = 1,
  write_fn=write_inferences_to_file,
  checkpoint_ds_iter: bool = False,
) -> None:
  """Infers on every task of a mixture whose file is not there yet.

  Args are T5X's, but for:
    checkpoint_period: batches that are held in memory, and then written to a file; a
      run that was stopped goes on with the next of these.
    checkpoint_ds_iter: not used; what is written already is read again, and skipped.
  """
  cfg, lengths = dataset_cfg, dataset_cfg.task_feature_lengths
  if mode not in _MODES:
    raise ValueError(f'mode={mode!r}; choose one of {sorted(_MODES)}')
  provider = data.get_task(cfg)
  data.verify_matching_vocabs(cfg, model)
  if shard_id == 0:
    gin_utils.summarize_gin_config(output_dir, summary_writer=None, step=0)
  converter = model.FEATURE_CONVERTER_CLS(pack=False)

  def get_dataset(source):
    return source.get_dataset(
      sequence_length=lengths,
      split=cfg.split,
      shuffle=False,
      shard_info=seqio.ShardInfo(shard_id, num_shards),
      use_cached=cfg.use_cached,
      seed=cfg.seed,
    )

  specs = converter(get_dataset(provider), lengths).element_spec
  shapes = {k: (cfg.batch_size, *s.shape) for k, s in specs.items()}
  types = {k: jnp.dtype(s.dtype.as_numpy_dtype) for k, s in specs.items()}
  state, axes = utils.restore_for_inference(
    model, partitioner, shapes, types, restore_checkpoint_cfg, output_dir
  )
  step = getattr(model, _MODES[mode])
  infer_fn = functools.partial(
    utils.get_infer_fn(step, cfg.batch_size, axes, partitioner), train_state=state
  )
  write = functools.partial(write_fn, mode=mode, vocabulary=model.output_vocabulary)
  for task in seqio.get_subtasks(provider):
    name = f'{task.name}-{mode}.jsonl-{shard_id:05}-of-{num_shards:05}'
    ds = get_dataset(task)
    ds = tf.data.Dataset.zip((ds, converter(ds, lengths)))
    chunk = checkpoint_period * cfg.batch_size
    _infer_to_file(ds, infer_fn, chunk, write, os.path.join(output_dir, name))


if __name__ == '__main__':
  gin_utils.run_command(infer)
