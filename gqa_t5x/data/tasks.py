"""All seqio tasks: importing this file registers them and builds nothing.

Those of the papers are in benchmarks.py, which this file imports. Here are those of the
offline corpus: `pydocs_span_corruption`, `pydocs_reversal` and `pydocs_summarize`
(24,700 pairs) on the docstrings of the standard library and of dependencies, and
`pydocs_stdlib_...` (1,800 pairs to summarize) on those of the standard library alone.

Each goes with the vocabulary of the same corpus, `vocabulary.pydocs_vocabulary`. The
corpus is built by the first dataset or the first token, whichever comes first. C4 is
in the package t5: `import t5.data.mixtures`, task `c4_v220_span_corruption`.
"""

import functools
from collections.abc import Callable, Sequence

import seqio
import tensorflow as tf
from t5.data import preprocessors as t5_preprocessors

import gqa_t5x.data.benchmarks  # noqa: F401 (registers the papers' tasks)
from gqa_t5x.data import metrics, preprocessors
from gqa_t5x.data.corpus import CORPORA, LINE_BREAK, SHARDS, Corpus
from gqa_t5x.data.vocabulary import CorpusVocabulary

# Shorter ones are a name or a remark: no summary, or nothing to sum up.
_MIN_SUMMARY_BYTES = 20
_MIN_BODY_BYTES = 80
_TARGETS = functools.partial(
  t5_preprocessors.rekey, key_map={'inputs': None, 'targets': 'text'}
)


class _CorpusSource(seqio.TextLineDataSource):
  """Reads an offline corpus line by line; builds it before the first line."""

  def __init__(self, vocabulary: CorpusVocabulary):
    self._vocabulary = vocabulary
    super().__init__({split: vocabulary.corpus.files(split) for split in SHARDS})

  def list_shards(self, split: str) -> list[str]:
    """Returns the split's files, in order; seqio asks before it reads."""
    # Built here: in the tracing of a `tf.data` function its errors would be buried.
    self._vocabulary.load_model()
    return super().list_shards(split)


@seqio.map_over_dataset
def line_to_text(line: tf.Tensor) -> dict[str, tf.Tensor]:
  """Makes a line of a corpus file an example, `{"text": ...}`, with its line breaks."""
  return {'text': tf.strings.regex_replace(line, LINE_BREAK, '\n')}


def add_span_corruption(name: str, corpus: Corpus) -> seqio.Task:
  """Registers T5's span corruption (as `c4_v220_span_corruption`) on a corpus.

  The task has the corpus's vocabulary, and splits train, validation and test.
  """
  return _add(name, corpus, before=[_TARGETS], after=[preprocessors.span_corruption])


def add_reversal(name: str, corpus: Corpus) -> seqio.Task:
  """Registers writing the beginning of a text backwards: it needs cross-attention."""
  return _add(name, corpus, before=[_TARGETS], after=[preprocessors.reversal])


def split_summary(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Turns docstrings into pairs of body and summary, and drops those that have none.

  By convention (PEP 257) a docstring begins with a summary of one line, which ends in
  a period and is followed by an empty line. From `{"text": docstring}` to `{"summary":
  the line, "article": what follows the empty line}`.
  """

  def split(example):
    parts = tf.strings.split(example['text'], '\n\n', maxsplit=1)
    parts = tf.strings.strip(tf.concat([parts, ['', '']], axis=0))
    return {'summary': parts[0], 'article': parts[1]}

  def is_pair(pair):
    summary, article = pair['summary'], pair['article']
    return (
      tf.strings.regex_full_match(summary, r'[^\n]*\.')
      & (tf.strings.length(summary) >= _MIN_SUMMARY_BYTES)
      & (tf.strings.length(article) >= _MIN_BODY_BYTES)
    )

  return dataset.map(split, num_parallel_calls=tf.data.AUTOTUNE).filter(is_pair)


def add_summarize(name: str, corpus: Corpus) -> seqio.Task:
  """Registers summarization on a corpus: the body of a docstring to its first line.

  Inputs are "summarize: " and the body, cut at its end; the metric is ROUGE. The splits
  are those of span corruption: a model is not tested on what it was pre-trained on.
  """
  summarize = functools.partial(
    t5_preprocessors.summarize, article_key='article', summary_key='summary'
  )
  before = [split_summary, summarize]
  return _add(name, corpus, before, metric_fns=[metrics.rouge])


def _add(
  name: str,
  corpus: Corpus,
  before: Sequence[Callable],
  after: Sequence[Callable] = (),
  metric_fns: Sequence[Callable] = (),
) -> seqio.Task:
  """Registers a task on a corpus, preprocessed before and after it is tokenized."""
  vocabulary = CorpusVocabulary(corpus)
  feature = functools.partial(seqio.Feature, vocabulary=vocabulary, add_eos=True)
  return seqio.TaskRegistry.add(
    name,
    source=_CorpusSource(vocabulary),
    preprocessors=[
      line_to_text,
      *before,
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      *after,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'inputs': feature(required=not after), 'targets': feature()},
    metric_fns=metric_fns,
  )


for _corpus in CORPORA.values():
  add_span_corruption(f'{_corpus.name}_span_corruption', _corpus)
  add_reversal(f'{_corpus.name}_reversal', _corpus)
  add_summarize(f'{_corpus.name}_summarize', _corpus)
