"""Inference for users: a file of inputs in, a file of predictions with scores out.

`gin/infer_text.gin` gives `task` and `write` to `t5x.infer`. The inputs are read once,
checked, and kept as a TFRecord file next to the results. Its name has a digest of the
input, the settings and the checkpoint: only the same command goes on with its results.
"""

import hashlib
import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from jax.experimental import multihost_utils

from gqa_t5x import files
from gqa_t5x.data.own import records
from gqa_t5x.errors import BadInput, first_line

_NAME = 80  # most characters of the file's name in those of the results


def task(
  path: str,
  vocabulary: seqio.Vocabulary,
  output_dir: str,
  checkpoint: str,
  shard: str = '',
  key: str = 'inputs',
  prefix: str = '',
  unreadable: str = 'refuse',
) -> str:
  """Registers the lines of a file as a seqio task, split `infer`; returns its name.

  Args:
    path: the file, local or gs://: its name tells what it is (`records`), and any name
      that is not known there is of text, an input a line.
    vocabulary: the model's.
    output_dir: gets the TFRecord file.
    checkpoint: the path of the checkpoint that infers; part of the digest alone.
    shard: of a job (resume.shard), which has a TFRecord file of its own, of all lines.
    key: of all but text: where the input is.
    prefix: text that goes before each input, such as 'summarize: '.
    unreadable: 'refuse' the file if a line is unreadable, or 'skip' the line.

  Raises:
    BadInput: for a file that is missing or has no input, an unknown `unreadable`, and
      unreadable lines that are not to be skipped.
  """
  records.check_unreadable(unreadable)
  _check_input_file(path)
  settings = json.dumps([checkpoint, key, prefix])
  word = re.sub(r'\W', '_', pathlib.PurePath(path).stem, flags=re.ASCII)[:_NAME]
  name = f'text_{word}_{_digest(path, settings)}'
  record = os.path.join(output_dir, f'{name}{shard}.tfrecord')
  if jax.process_index() == 0 and not tf.io.gfile.exists(record):
    _write_record(path, record, key, unreadable)
  multihost_utils.sync_global_devices('inputs are read')
  if name not in seqio.TaskRegistry.names():
    _register(name, record, vocabulary, prefix)
  return name


def _check_input_file(path: str) -> None:
  try:
    is_file = tf.io.gfile.exists(path) and not tf.io.gfile.isdir(path)
  except (tf.errors.OpError, OSError) as error:
    raise BadInput(f'INPUT_FILE={path} cannot be read: {first_line(error)}') from error
  if not is_file:
    there = 'it is a folder' if tf.io.gfile.exists(path) else 'there is no such file'
    raise BadInput(f'INPUT_FILE={path}: {there}.')
  if path.lower().endswith('.json'):
    raise BadInput(
      f'INPUT_FILE={path}: is it text, or JSON? Name it .txt, or .jsonl if each line is'
      ' a JSON object.'
    )


def _digest(path: str, settings: str) -> str:
  digest = hashlib.sha256(settings.encode())
  with tf.io.gfile.GFile(path, 'rb') as file:
    while block := file.read(2**20):
      digest.update(block)
  return digest.hexdigest()[:10]


def _write_record(path: str, record: str, key: str, unreadable: str) -> None:
  """Writes the readable lines as examples; raises BadInput for those refused."""
  count = 0
  with files.whole(record) as temporary:
    with tf.io.TFRecordWriter(os.fspath(temporary)) as writer:
      for number, (text,) in records.readable(
        path, [key], 'line', unreadable, 'INPUT_FILE'
      ):
        count += 1
        writer.write(_example(number, text).SerializeToString())
    if not count:
      raise BadInput(f'INPUT_FILE={path} has no line to infer on.')


def _example(number: int, text: str) -> tf.train.Example:
  line = tf.train.Feature(int64_list=tf.train.Int64List(value=[number]))
  inputs = tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
  features = tf.train.Features(feature={'line': line, 'inputs': inputs})
  return tf.train.Example(features=features)


def _register(
  name: str, record: str, vocabulary: seqio.Vocabulary, prefix: str
) -> None:
  @seqio.map_over_dataset
  def with_prefix(example):
    inputs = example['inputs']
    return example | {'inputs': tf.strings.join([prefix, inputs]), 'targets': ''}

  feature = seqio.Feature(vocabulary, add_eos=True)
  seqio.TaskRegistry.add(
    name,
    source=seqio.TFExampleDataSource(
      {'infer': record},
      feature_description={
        'inputs': tf.io.FixedLenFeature([], tf.string),
        'line': tf.io.FixedLenFeature([], tf.int64),
      },
    ),
    preprocessors=[
      with_prefix,
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,  # Cut inputs, too, have an end marker.
    ],
    output_features={'inputs': feature, 'targets': feature},
  )


def write(
  path: str,
  inferences: tuple[Any, Any],
  task_ds: tf.data.Dataset,
  mode: str,
  vocabulary: seqio.Vocabulary,
) -> None:
  """Writes predictions as JSON lines: line, input, prediction, score.

  With several decodes of an input, prediction and score are lists.

  Args:
    path: of the file to write.
    inferences: tokens of each example, and their `scores`: log-probabilities.
    task_ds: the examples, before they were turned into features.
    mode: must be predict_with_aux, which alone has scores; BadInput for another.
    vocabulary: of the predictions.

  Raises:
    BadInput: a score is no number: the checkpoint has values that are not finite.
  """
  if mode != 'predict_with_aux':
    raise BadInput(f'mode={mode!r}; scores need predict_with_aux.')
  outputs, scores = inferences[0], inferences[1]['scores']
  with tf.io.gfile.GFile(path, 'w') as file:
    for i, example in enumerate(task_ds.as_numpy_iterator()):
      row = {
        'line': int(example['line']),
        'input': example['inputs_pretokenized'].decode(),
        'prediction': _decode(outputs[i], vocabulary),
        'score': tf.nest.map_structure(float, scores[i]),
      }
      if not np.all(np.isfinite(row['score'])):
        raise BadInput(
          f'The score of line {row["line"]} is {row["score"]}: the checkpoint has'
          ' values that are not finite, or the dtype is too narrow for them.'
        )
      file.write(json.dumps(row, ensure_ascii=False) + '\n')


def _decode(tokens: Any, vocabulary: seqio.Vocabulary) -> str | list[str]:
  if len(tokens) and not isinstance(tokens[0], int):
    return [_decode(list(map(int, row)), vocabulary) for row in tokens]
  return vocabulary.decode_tf(tf.constant(tokens, tf.int32)).numpy().decode()
