"""Preprocessing of the benchmarks where the package t5 has none that fits."""

from collections.abc import Mapping

import seqio
import tensorflow as tf

# No piece of a SentencePiece vocabulary is longer (its trainer's default, T5's, too), a
# token of English is four or five: n tokens come from far less than 16 n characters.
CHARS_PER_TOKEN = 16


def wikipedia_domain(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Keeps TriviaQA's Wikipedia domain: 61,888 training and 7,993 validation questions.

  TFDS mixes the files of both domains and of the verified questions: a question is
  there up to four times. Only questions of the Web domain have search results.

  Args:
    dataset: of `trivia_qa/rc`.

  Returns:
    The same examples, each question once.
  """
  dataset = dataset.filter(lambda e: tf.equal(tf.size(e['search_results']['rank']), 0))
  return unique(dataset, 'question_id')


def unique(dataset: tf.data.Dataset, key: str) -> tf.data.Dataset:
  """Keeps the first of all examples that have the same text in one feature.

  Args:
    dataset: of dictionaries, finite: to be called before it is repeated.
    key: names the feature, one string an example.

  Returns:
    The dataset without the later ones, in order.
  """

  def compare(seen, example):
    digest = tf.strings.to_hash_bucket_fast(example[key], 2**63 - 1)
    is_new = tf.reduce_all(seen != digest)
    return tf.concat([seen, [digest]], 0), (example, is_new)

  dataset = dataset.scan(tf.zeros([0], tf.int64), compare)
  return dataset.filter(lambda _, is_new: is_new).map(lambda example, _: example)


@seqio.map_over_dataset
def trivia_qa(example: Mapping) -> dict[str, tf.Tensor]:
  """Makes a question and its Wikipedia pages one input, uncut.

  The package t5's own preprocessors repeat a question for each page and answer, drop
  those whose answer is not found, and cut around the answer: unusable for evaluation.

  Args:
    example: of `trivia_qa/rc`.

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
  """Writes out a dialogue in reading order, one turn a line.

  Args:
    example: of `mediasum.MediasumJson`.

  Returns:
    `dialogue`: lines "SPEAKER: utterance"; `summary`.
  """
  turns = example['turns']
  lines = tf.strings.join([turns['speaker'], turns['utt']], separator=': ')
  return {
    'dialogue': tf.strings.reduce_join(lines, separator='\n'),
    'summary': example['summary'],
  }


def cut_characters(
  dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None = None
) -> tf.data.Dataset:
  """Cuts what no vocabulary would fit into the input, before it is tokenized and kept.

  A page of Wikipedia or a paper may have a hundred times what is used of it, and seqio
  keeps the text of each example in memory and in the log of predictions.

  Args:
    dataset: of `inputs` and other features.
    sequence_length: tokens of each feature; seqio passes it. None cuts nothing.

  Returns:
    The dataset with `inputs` of at most `CHARS_PER_TOKEN` characters a token, all else
    as it was: summaries and answers are compared whole.
  """
  tokens = (sequence_length or {}).get('inputs')
  if tokens is None:
    return dataset

  def cut(example):
    length = tokens * CHARS_PER_TOKEN
    inputs = tf.strings.substr(example['inputs'], 0, length, unit='UTF8_CHAR')
    return {**example, 'inputs': inputs}

  return dataset.map(cut, num_parallel_calls=tf.data.AUTOTUNE)
