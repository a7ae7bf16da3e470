"""The papers' benchmarks as seqio tasks; importing this file or `tasks` registers them.

docs/data.md has a table of them. Nothing is read before a dataset is asked for. Then
the data must be in the folder of TFDS (`python -m gqa_t5x.data.prepare`), which T5X's
flag --tfds_data_dir names, or gin: see `task`. C4 is a task of the package t5.

Texts stay as TFDS has them, after a prefix in T5's style; the "|||||" between the
articles of Multi-News stays, too.

`wmt14_en_de_shazeer` is translation as in Shazeer (2019): no prefix, and in gin the
vocabulary of wmt_vocabulary.py. Without gin the task has T5's.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import t5.data
import tensorflow_datasets as tfds
from t5.data import preprocessors as t5_preprocessors

from gqa_t5x import files
from gqa_t5x.data import mediasum, metrics, preprocessors
from gqa_t5x.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """What a task is made of, apart from vocabulary and folder.

  `preprocessors` turn examples of TFDS into texts `inputs` and `targets`. `features`
  are those to read, if not all. `postprocess` gives the target of the metric for an
  example, if that is not `targets`.
  """

  tfds_name: str
  preprocessors: Sequence[Callable]
  metric: Callable
  features: Mapping[str, Any] | None = None
  postprocess: Callable | None = None


def _summarize(article: str, summary: str) -> Callable:
  return functools.partial(
    t5_preprocessors.summarize, article_key=article, summary_key=summary
  )


_PAPER = [_summarize('article', 'abstract')]
_TRANSLATE = functools.partial(
  t5_preprocessors.translate, source_language='en', target_language='de'
)
_NO_PREFIX = functools.partial(
  t5_preprocessors.rekey, key_map={'inputs': 'en', 'targets': 'de'}
)
BENCHMARKS = {
  'cnn_dailymail': Benchmark(
    'cnn_dailymail:3.4.0', [_summarize('article', 'highlights')], metrics.rouge
  ),
  'arxiv': Benchmark('scientific_papers/arxiv:1.1.1', _PAPER, metrics.rouge),
  'pubmed': Benchmark('scientific_papers/pubmed:1.1.1', _PAPER, metrics.rouge),
  'mediasum': Benchmark(
    f'{mediasum.MediasumJson.name}:{mediasum.MediasumJson.VERSION}',
    [preprocessors.mediasum, _summarize('dialogue', 'summary')],
    metrics.rouge,
  ),
  'multi_news': Benchmark(
    'multi_news:2.1.0', [_summarize('document', 'summary')], metrics.rouge
  ),
  'wmt14_en_de': Benchmark('wmt14_translate/de-en:1.0.0', [_TRANSLATE], metrics.bleu),
  'wmt14_en_de_shazeer': Benchmark(
    'wmt14_translate/de-en:1.0.0', [_NO_PREFIX], metrics.bleu
  ),
  'trivia_qa': Benchmark(
    'trivia_qa/rc:1.1.0',
    [preprocessors.wikipedia_domain, preprocessors.trivia_qa],
    metrics.trivia_qa,
    # Not the texts of the search results, which nobody reads.
    features={
      'question': True,
      'question_id': True,
      'entity_pages': {'title', 'wiki_context'},
      'search_results': {'rank'},
      'answer': {'value', 'aliases'},
    },
    postprocess=t5.data.postprocessors.qa,
  ),
}


class PreparedSource(seqio.TfdsDataSource):
  """A TFDS data set that says what to do if it is not there yet."""

  def __init__(self, task_name: str, data_dir: str | None):
    self._task_name = task_name
    benchmark = BENCHMARKS[task_name]
    features = benchmark.features
    super().__init__(
      benchmark.tfds_name,
      tfds_data_dir=data_dir,
      splits=('train', 'validation', 'test'),
      decoders=tfds.decode.PartialDecoding(features) if features else None,
    )

  def list_shards(self, split: str) -> Sequence[str]:
    """Returns the split's files; T5X asks for them before it reads.

    Raises:
      BadInput: the data set is not prepared.
    """
    info = self.tfds_dataset.info
    if split not in info.splits:
      folder = self.tfds_dataset.builder.data_dir
      raise BadInput(
        f'task {self._task_name}: there is no {split} split in {folder}. Prepare the '
        f'data once by: python -m gqa_t5x.data.prepare {self._task_name} '
        '--data_dir=FOLDER, and give that folder to T5X: --tfds_data_dir=FOLDER, or in '
        'gin: DATA_DIR'
      )
    return super().list_shards(split)

  def num_input_examples(self, split: str) -> int | None:
    """Returns the split's size, or None where TFDS has none, as for mock data."""
    known = split in self.tfds_dataset.info.splits
    return super().num_input_examples(split) if known else None


# Task -> the vocabulary and the folder that it is registered with.
_registered: dict[str, tuple] = {}


def task(
  name: str, vocabulary: seqio.Vocabulary | None = None, data_dir: str | None = None
) -> str:
  """Registers a benchmark with a vocabulary and a folder; returns its name.

  The name is the same whatever these are, and so are the folders of the metrics. The
  last call counts. gin/tasks/benchmark.gin calls it with the macros TASK, VOCABULARY
  (the model's) and DATA_DIR.

  Args:
    name: a key of `BENCHMARKS`.
    vocabulary: of inputs and targets; None for T5's.
    data_dir: TFDS's folder, which for MediaSum holds its JSON files, too; None for
      TFDS's default. T5X's flag --tfds_data_dir overrides it.

  Raises:
    BadInput: there is no benchmark of that name.
  """
  if name not in BENCHMARKS:
    raise BadInput(
      f'no benchmark is named {name!r}; choose one of {", ".join(BENCHMARKS)}'
    )
  if vocabulary is None:
    vocabulary = t5.data.get_default_vocabulary()
  if data_dir is not None:
    data_dir = files.absolute(data_dir, any_name=True)
  if name in seqio.TaskRegistry.names():
    if _registered[name] == (vocabulary, data_dir):
      return name
    seqio.TaskRegistry.remove(name)
  _registered[name] = (vocabulary, data_dir)
  benchmark = BENCHMARKS[name]
  seqio.TaskRegistry.add(
    name,
    source=PreparedSource(name, data_dir),
    preprocessors=[
      *benchmark.preprocessors,
      seqio.CacheDatasetPlaceholder(),
      preprocessors.cut_characters,
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features=dict.fromkeys(
      ('inputs', 'targets'), seqio.Feature(vocabulary, add_eos=True)
    ),
    postprocess_fn=benchmark.postprocess,
    metric_fns=[benchmark.metric],
  )
  return name


for _name in BENCHMARKS:
  task(_name)
