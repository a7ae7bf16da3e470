"""Preprocessing where the package t5 has none that fits, or checks too little."""

from collections.abc import Mapping

import seqio
import tensorflow as tf
from t5.data import preprocessors as t5_preprocessors

from gqa_t5x.errors import BadInput
from gqa_t5x.inference import tokenizer

# AutoGraph would look for loops over tensors in T5's code for seconds; there are none.
_no_autograph = tf.autograph.experimental.do_not_convert
_span_corruption = _no_autograph(t5_preprocessors.span_corruption)
_prefix_lm = _no_autograph(t5_preprocessors.prefix_lm)
_NOISE_DENSITY, _SPAN_LENGTH = 0.15, 3.0  # T5's
# A piece of a SentencePiece vocabulary has at most 16 characters (its default, and
# T5's), an English one four or five: n tokens need far less than 16 n characters.
_CHARS_PER_TOKEN = 16


def wikipedia_domain(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Keeps TriviaQA's Wikipedia domain: 61,888 training and 7,993 validation questions.

  TFDS mixes the files of both domains and of the verified questions: `trivia_qa/rc` has
  a question up to four times. The first is kept, in order. Only questions of the Web
  domain have search results.
  """
  dataset = dataset.filter(lambda e: tf.equal(tf.size(e['search_results']['rank']), 0))

  def compare(seen, example):
    digest = tf.strings.to_hash_bucket_fast(example['question_id'], 2**63 - 1)
    is_new = tf.reduce_all(seen != digest)
    return tf.concat([seen, [digest]], 0), (example, is_new)

  dataset = dataset.scan(tf.zeros([0], tf.int64), compare)
  return dataset.filter(lambda _, is_new: is_new).map(lambda example, _: example)


@seqio.map_over_dataset
def trivia_qa(example: Mapping) -> dict[str, tf.Tensor]:
  """Makes a question and its Wikipedia pages one input, uncut.

  The package t5's own preprocessors repeat a question for each page and answer, drop
  those whose answer is not found, and cut around the answer: unusable for evaluation.

  Returns:
    `inputs`: "question: ... context: ...", where the context is title and text of all
    pages in the order given, so that what is cut off is the end of the evidence;
    `targets`: the answer's value; `answers`: all its aliases, for the metric.
  """
  pages = example['entity_pages']
  titles_and_texts = tf.stack([pages['title'], pages['wiki_context']], axis=1)
  context = tf.strings.reduce_join(tf.reshape(titles_and_texts, [-1]), separator=' ')
  inputs = ['question:', example['question'], 'context:', context]
  return {
    'inputs': tf.strings.join(inputs, separator=' '),
    'targets': example['answer']['value'],
    'answers': example['answer']['aliases'],
  }


@seqio.map_over_dataset
def mediasum(example: Mapping) -> dict[str, tf.Tensor]:
  """Returns `summary`, and `dialogue`: lines "SPEAKER: utterance" in reading order."""
  turns = example['turns']
  lines = tf.strings.join([turns['speaker'], turns['utt']], separator=': ')
  return {
    'dialogue': tf.strings.reduce_join(lines, separator='\n'),
    'summary': example['summary'],
  }


def cut_characters(
  dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None = None
) -> tf.data.Dataset:
  """Cuts `inputs` to 16 characters a token, before they are tokenized and kept.

  A page of Wikipedia or a paper may have a hundred times what is used of it, and seqio
  keeps the text of each example in memory and in the log of predictions. Summaries and
  answers are compared whole, and so not cut.

  Args:
    dataset: of `inputs` and other features.
    sequence_length: tokens of each feature; seqio passes it. None cuts nothing.
  """
  tokens = (sequence_length or {}).get('inputs')
  if tokens is None:
    return dataset

  def cut(example):
    length = tokens * _CHARS_PER_TOKEN
    inputs = tf.strings.substr(example['inputs'], 0, length, unit='UTF8_CHAR')
    return {**example, 'inputs': inputs}

  return dataset.map(cut, num_parallel_calls=tf.data.AUTOTUNE)


def _num_sentinels(vocabulary: seqio.Vocabulary) -> int:
  """How many of the last ids are T5's sentinels, added ones or the vocabulary's own."""
  if vocabulary.extra_ids:
    return vocabulary.extra_ids
  if isinstance(vocabulary, seqio.ByteVocabulary):
    return 256  # ByT5's are its bytes, from the last one down.
  pieces = getattr(vocabulary, 'tokenizer', None)
  if not hasattr(pieces, 'IdToPiece'):
    return 0
  return tokenizer.count_extra_ids(pieces.IdToPiece, vocabulary.vocab_size)


def span_corruption(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int],
  output_features: Mapping[str, seqio.Feature],
) -> tf.data.Dataset:
  """T5's span corruption, as in `c4_v220_span_corruption`.

  Raises:
    BadInput: the targets are too short, or the vocabulary has too few sentinels, in
      place of which T5's function takes ordinary pieces.
  """
  tokens, targets = t5_preprocessors.random_spans_helper(
    inputs_length=sequence_length['inputs'],
    noise_density=_NOISE_DENSITY,
    mean_noise_span_length=_SPAN_LENGTH,
    extra_tokens_per_span_inputs=1,
    extra_tokens_per_span_targets=1,
  )
  if sequence_length['targets'] < targets:
    raise BadInput(
      f'TASK_FEATURE_LENGTHS: span corruption of {sequence_length["inputs"]} inputs has'
      f' {targets} targets, more than {sequence_length["targets"]}; give as many'
    )
  spans = round(round(tokens * _NOISE_DENSITY) / _SPAN_LENGTH)
  sentinels = _num_sentinels(output_features['targets'].vocabulary)
  if sentinels < spans:
    raise BadInput(
      f'VOCABULARY has {sentinels} sentinels (extra_ids), and span corruption of'
      f' {sequence_length["inputs"]} inputs needs {spans}. Give fewer inputs in'
      ' TASK_FEATURE_LENGTHS, or a vocabulary that has as many'
    )
  return _span_corruption(dataset, sequence_length, output_features)


def prefix_lm(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int],
  output_features: Mapping[str, seqio.Feature],
) -> tf.data.Dataset:
  """T5's prefix language modelling, as in `c4_v220_prefix_lm`: a text is cut in two.

  Raises:
    BadInput: the targets are shorter than the inputs, so that texts would lose tokens.
  """
  if sequence_length['targets'] < sequence_length['inputs']:
    raise BadInput(
      f'TASK_FEATURE_LENGTHS: a prefix LM cuts texts of {sequence_length["inputs"]}'
      f' tokens (inputs) anywhere, and targets has only {sequence_length["targets"]};'
      ' give both the same'
    )
  return _prefix_lm(dataset, sequence_length, output_features)


def reversal(
  dataset: tf.data.Dataset, sequence_length: Mapping[str, int]
) -> tf.data.Dataset:
  """Makes the beginning of a text the inputs, and its tokens in reverse the targets.

  From `targets`, the tokens of a text, to both, one shorter than either length: the end
  marker follows.
  """
  length = min(sequence_length['inputs'], sequence_length['targets']) - 1

  def reverse(example):
    tokens = example['targets'][:length]
    return {**example, 'inputs': tokens, 'targets': tokens[::-1]}

  return dataset.map(reverse, num_parallel_calls=tf.data.AUTOTUNE)
