r"""Writes a model's predictions or scores for a seqio task as JSON lines.

Example:
  python -m t5x.infer --gin_file=gin/runs/infer.gin \
    --gin.CHECKPOINT_PATH=\'runs/mha/checkpoint_100\' \
    --gin.INFER_OUTPUT_DIR=\'runs/predictions\'

The gin files bind the arguments of `infer` (`import __main__ as infer_script`, then
`infer_script.infer: model = ...`). The lines go to
output_dir/<task>-<mode>.jsonl-00000-of-00001, one example each.
"""

import functools
import json
import os
from collections.abc import Iterator
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


def _infer_lines(ds, infer_fn, chunk: int, mode: str, vocabulary) -> Iterator[str]:
  """Yields one JSON object an example; holds `chunk` examples at a time.

  `ds` has pairs of examples before and after the feature converter; `infer_fn` is that
  of `utils.get_infer_fn`.
  """
  for i, batch in ds.padded_batch(chunk).enumerate():
    examples = tf.data.Dataset.from_tensor_slices(batch)
    rng = jax.random.fold_in(jax.random.PRNGKey(0), int(i))
    result = infer_fn(examples.map(lambda _, x: x).enumerate(), rng=rng)
    pairs, aux = result if isinstance(result, tuple) else (result, {})
    logging.info('Chunk %d: %d examples.', int(i), len(pairs))
    texts = examples.map(lambda x, _: x).as_numpy_iterator()
    for (index, output), example in zip(pairs, texts, strict=True):
      kept = {k: _plain(v) for k, v in example.items() if k.endswith('_pretokenized')}
      line = {'inputs': kept}
      if mode == 'score':
        line['score'] = output
      else:
        text = vocabulary.decode_tf(tf.constant(output)).numpy()
        line['prediction'] = _plain(text)
      if aux:
        line['aux'] = {k: v[index] for k, v in aux.items()}
      yield json.dumps(line, cls=seqio.TensorAndNumpyEncoder)


def _write_lines(path: str, lines: Iterator[str]) -> None:
  """Writes a file under a temporary name, and renames it when it is complete.

  Raises:
    ValueError: if there are no lines.
  """
  count = 0
  with tf.io.gfile.GFile(f'{path}.tmp', 'w') as f:
    for count, line in enumerate(lines, start=1):  # noqa: B007
      f.write(line + '\n')
  if not count:
    raise ValueError(f'there are no examples for {path}; check the split')
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
) -> None:
  """Infers on every task of a mixture whose file is not there yet.

  Args are T5X's, but for:
    checkpoint_period: batches that are held in memory; a run resumes by whole tasks.

  Raises:
    ValueError: if the mode is unknown, or there is no checkpoint or no data.
  """
  cfg, lengths = dataset_cfg, dataset_cfg.task_feature_lengths
  if mode not in _MODES:
    raise ValueError(f'mode={mode!r}; choose one of {sorted(_MODES)}')
  provider = data.get_task(cfg)
  data.verify_matching_vocabs(cfg, model)
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
  vocabulary = model.output_vocabulary
  for task in seqio.get_subtasks(provider):
    name = f'{task.name}-{mode}.jsonl-{shard_id:05}-of-{num_shards:05}'
    path = os.path.join(output_dir, name)
    if tf.io.gfile.exists(path):
      logging.info('%s is complete; skipped.', path)
      continue
    ds = get_dataset(task)
    ds = tf.data.Dataset.zip((ds, converter(ds, lengths)))
    chunk = checkpoint_period * cfg.batch_size
    _write_lines(path, _infer_lines(ds, infer_fn, chunk, mode, vocabulary))


if __name__ == '__main__':
  gin_utils.run_command(infer)
