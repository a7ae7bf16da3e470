"""A seqio task of a few short words: no files, no network, no corpus to build."""

import numpy as np
import seqio
import tensorflow as tf

NAME = 'tiny_words'
SIZES = {'train': 64, 'validation': 8}
WORDS = ('red', 'green', 'blue', 'cyan', 'pink', 'grey', 'teal', 'gold')


def vocabulary(extra_ids: int = 0) -> seqio.Vocabulary:
  """Bytes: 259 ids, padded to 384 in the model."""
  return seqio.ByteVocabulary(extra_ids=extra_ids)


def _words(split: str, shuffle_files: bool, seed: int | None = None):
  """Asks for the last word of three."""
  del shuffle_files, seed
  rng = np.random.default_rng(SIZES[split])
  texts = [' '.join(rng.choice(WORDS, 3)) for _ in range(SIZES[split])]
  targets = [text.split()[-1] for text in texts]
  return tf.data.Dataset.from_tensor_slices({'inputs': texts, 'targets': targets})


def exact_match(targets, predictions):
  """The share of targets that were decoded exactly."""
  hits = [t == p for t, p in zip(targets, predictions, strict=True)]
  return {'exact_match': float(np.mean(hits)), 'examples': len(targets)}


if NAME not in seqio.TaskRegistry.names():
  seqio.TaskRegistry.add(
    NAME,
    source=seqio.FunctionDataSource(
      _words, splits=tuple(SIZES), num_input_examples=SIZES
    ),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={k: seqio.Feature(vocabulary()) for k in ('inputs', 'targets')},
    metric_fns=[exact_match],
  )
