"""All seqio tasks: importing this file registers them and builds nothing.

Those of the papers are in benchmarks.py, which this file imports. Here are those of the
offline corpus:

| task | texts |
|---|---|
| `pydocs_span_corruption` | docstrings of the standard library and of dependencies |
| `pydocs_stdlib_span_corruption` | those of the standard library alone: small, quick |
| `pydocs_summarize` | from the body of a docstring to its first line; 24,700 pairs |
| `pydocs_stdlib_summarize` | 1,800 pairs of the standard library alone |

Each goes with the vocabulary of the same corpus, `vocabulary.pydocs_vocabulary`. The
corpus is built by the first dataset or the first token, whichever comes first. C4 is
in the package t5: `import t5.data.mixtures`, task `c4_v220_span_corruption`.
"""

import functools

import seqio
import tensorflow as tf
from t5.data import preprocessors

from gqa_t5x.data import (
  benchmarks,  # noqa: F401 (registers the papers' tasks)
  metrics,
)
from gqa_t5x.data.corpus import CORPORA, LINE_BREAK, SHARDS, Corpus
from gqa_t5x.data.vocabulary import CorpusVocabulary

# Shorter ones are a name or a remark: no summary, or nothing to sum up.
MIN_SUMMARY_BYTES = 20
MIN_BODY_BYTES = 80
# AutoGraph would look for loops over tensors in T5's code for seconds; there are none.
_span_corruption = tf.autograph.experimental.do_not_convert(
  preprocessors.span_corruption
)


class CorpusSource(seqio.TextLineDataSource):
  """Reads an offline corpus line by line; builds it before the first line."""

  def __init__(self, vocabulary: CorpusVocabulary):
    """Computes the files' paths; reads and writes nothing.

    Args:
      vocabulary: the corpus's vocabulary, which is built with it. Left to the tracing
        of a `tf.data` function, its errors would be buried in a long trace.
    """
    self._vocabulary = vocabulary
    super().__init__({split: vocabulary.corpus.files(split) for split in SHARDS})

  def list_shards(self, split: str) -> list[str]:
    """Returns the split's files, in order; seqio asks before it reads."""
    self._vocabulary.load_model()
    return super().list_shards(split)


@seqio.map_over_dataset
def line_to_text(line: tf.Tensor) -> dict[str, tf.Tensor]:
  """Makes a line of a corpus file an example, `{"text": ...}`, with its line breaks."""
  return {'text': tf.strings.regex_replace(line, LINE_BREAK, '\n')}


def add_span_corruption(name: str, corpus: Corpus) -> seqio.Task:
  """Registers T5's span corruption (as `c4_v220_span_corruption`) on a corpus.

  Args:
    name: the task's name.
    corpus: where the texts come from; its vocabulary is the task's.

  Returns:
    The task, with splits train, validation and test and features inputs and targets.

  Raises:
    ValueError: a task of that name is registered already.
  """
  vocabulary = CorpusVocabulary(corpus)
  feature = functools.partial(seqio.Feature, vocabulary=vocabulary, add_eos=True)
  return seqio.TaskRegistry.add(
    name,
    source=CorpusSource(vocabulary),
    preprocessors=[
      line_to_text,
      functools.partial(
        preprocessors.rekey, key_map={'inputs': None, 'targets': 'text'}
      ),
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      _span_corruption,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'inputs': feature(required=False), 'targets': feature()},
    metric_fns=[],
  )


def split_summary(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Turns docstrings into pairs of body and summary, and drops those that have none.

  By convention (PEP 257) a docstring begins with a summary of one line, which ends in
  a period and is followed by an empty line.

  Args:
    dataset: of `{"text": docstring}`.

  Returns:
    A dataset of `{"article": what follows the empty line, "summary": the line}`.
  """

  def split(example):
    parts = tf.strings.split(example['text'], '\n\n', maxsplit=1)
    parts = tf.strings.strip(tf.concat([parts, ['', '']], axis=0))
    return {'summary': parts[0], 'article': parts[1]}

  def is_pair(pair):
    summary, article = pair['summary'], pair['article']
    return (
      tf.strings.regex_full_match(summary, r'[^\n]*\.')
      & (tf.strings.length(summary) >= MIN_SUMMARY_BYTES)
      & (tf.strings.length(article) >= MIN_BODY_BYTES)
    )

  return dataset.map(split, num_parallel_calls=tf.data.AUTOTUNE).filter(is_pair)


def add_summarize(name: str, corpus: Corpus) -> seqio.Task:
  """Registers summarization on a corpus: the body of a docstring to its first line.

  Args:
    name: the task's name.
    corpus: where the docstrings come from; its vocabulary is the task's.

  Returns:
    The task, with splits train, validation and test, features inputs ("summarize: "
    and the body, cut at its end) and targets, and ROUGE as its metric. The splits are
    those of span corruption: what a model is tested on, it was not pre-trained on.

  Raises:
    ValueError: a task of that name is registered already.
  """
  vocabulary = CorpusVocabulary(corpus)
  return seqio.TaskRegistry.add(
    name,
    source=CorpusSource(vocabulary),
    preprocessors=[
      line_to_text,
      split_summary,
      functools.partial(
        preprocessors.summarize, article_key='article', summary_key='summary'
      ),
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={
      feature: seqio.Feature(vocabulary, add_eos=True)
      for feature in ('inputs', 'targets')
    },
    metric_fns=[metrics.rouge],
  )


for _corpus in CORPORA.values():
  add_span_corruption(f'{_corpus.name}_span_corruption', _corpus)
  add_summarize(f'{_corpus.name}_summarize', _corpus)
