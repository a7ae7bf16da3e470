"""The seqio tasks; importing this file registers them and builds nothing.

| task | texts |
|---|---|
| `pydocs_span_corruption` | docstrings of the standard library and of dependencies |
| `pydocs_stdlib_span_corruption` | those of the standard library alone: small, quick |

Each goes with the vocabulary of the same corpus, `vocabulary.pydocs_vocabulary`. The
corpus is built by the first dataset or the first token, whichever comes first. C4 is
in the package t5: `import t5.data.mixtures`, task `c4_v220_span_corruption`.
"""

import functools

import seqio
import tensorflow as tf
from t5.data import preprocessors

from gqa_t5x.data.corpus import CORPORA, LINE_BREAK, SHARDS, Corpus
from gqa_t5x.data.vocabulary import CorpusVocabulary


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
      preprocessors.span_corruption,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'inputs': feature(required=False), 'targets': feature()},
    metric_fns=[],
  )


for _corpus in CORPORA.values():
  add_span_corruption(f'{_corpus.name}_span_corruption', _corpus)
