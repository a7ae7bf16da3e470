"""Tasks on users' own files, for gin/tasks/text_files.gin and gin/tasks/pairs.gin.

A task's name has a digest of the texts and of what else a position in the data depends
on, so it is the same in each process and on each machine. Vocabulary, metric and test
files are not part of it; as of the benchmarks, the last call counts.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence

import seqio
import tensorflow as tf
from t5.data import preprocessors as t5_preprocessors

from gqa_t5x import files
from gqa_t5x.data import metrics, preprocessors
from gqa_t5x.data.own import record_cache, records
from gqa_t5x.errors import BadInput

Files = str | Sequence[str]

OBJECTIVES = {
  'span_corruption': preprocessors.span_corruption,
  'prefix_lm': preprocessors.prefix_lm,
}
# The score by which the best checkpoint is chosen -> the metric that has it.
METRICS = {
  **dict.fromkeys(('rouge1', 'rouge2', 'rougeLsum'), metrics.rouge),
  'bleu': metrics.bleu,
  **dict.fromkeys(('f1', 'em'), metrics.squad),
  'exact_match': metrics.exact_match,
}
_CACHE = seqio.CacheDatasetPlaceholder()
_TEXT_KINDS = ('txt', 'jsonl', 'json', 'parquet')
_PAIR_KINDS = ('jsonl', 'json', 'tsv', 'parquet')

# Task -> what it is registered with.
_registered: dict[str, tuple] = {}


def text_files(
  files: Files,
  vocabulary: seqio.Vocabulary,
  key: str,
  document: str,
  objective: str,
  validation_files: Files | None,
  validation_share: float,
  unreadable: str,
  cache_dir: str | None,
) -> str:
  """Registers pre-training on texts, splits train and validation; returns the name.

  Args:
    files: glob patterns, local or gs://, of files as in `records`.
    vocabulary: the model's; with sentinels.
    key: where the text is in JSON lines and Parquet.
    document: what a text is in .txt files, one of `records.DOCUMENTS`.
    objective: a key of `OBJECTIVES`.
    validation_files: patterns; None for a share of the texts, by hash.
    validation_share: of the texts, 0 to 1; not used if there are validation files.
    unreadable: 'refuse' files with unreadable lines, or 'skip' these lines.
    cache_dir: where what was read is kept, local or gs://; None for the default.

  Raises:
    BadInput: for one of these that cannot be used; see also `record_cache`.
  """
  _choose('DOCUMENT', document, records.DOCUMENTS)
  _choose('OBJECTIVE', objective, OBJECTIVES)
  common = {'kinds': _TEXT_KINDS, 'features': ('text',), 'keys': (key,)}
  common |= {'document': document, 'unreadable': unreadable, 'cache_dir': cache_dir}
  prepared = _train_and_validation(
    ('TEXT_FILES', files), validation_files, validation_share, common
  )
  rekey = functools.partial(
    t5_preprocessors.rekey, key_map={'inputs': None, 'targets': 'text'}
  )
  return _register(
    'text_files', prepared, ('text',), vocabulary, [objective],
    [rekey, seqio.preprocessors.tokenize, _CACHE, OBJECTIVES[objective]],
  )  # fmt: skip


def pairs(
  train_files: Files,
  vocabulary: seqio.Vocabulary,
  input_key: str | int,
  target_key: str | int,
  input_prefix: str,
  metric: str | None,
  validation_files: Files | None,
  validation_share: float,
  test_files: Files | None,
  unreadable: str,
  cache_dir: str | None,
) -> str:
  """Registers inputs and their targets, splits train, validation, test.

  Args:
    train_files: as `files` of `text_files`; and so are the arguments not named here.
    input_key: where the input is: a key of JSON lines, the name of a column, or of
      .tsv its number, counted from 1.
    target_key: where the target is.
    input_prefix: text that goes before each input, such as 'summarize: '.
    metric: a key of `METRICS`, or None.
    validation_share: of the pairs, by a hash of the input.
    test_files: patterns, or None.

  Returns:
    The name of the task.
  """
  if metric is not None:
    _choose('METRIC', metric, METRICS)
  common = {'kinds': _PAIR_KINDS, 'features': ('inputs', 'targets')}
  common |= {'keys': (input_key, target_key), 'document': 'line'}
  common |= {'unreadable': unreadable, 'cache_dir': cache_dir}
  if len({type(key) for key in common['keys']}) > 1:
    raise BadInput(
      f'INPUT_KEY={input_key!r} and TARGET_KEY={target_key!r}: give two names, or the'
      ' numbers of two columns.'
    )
  prepared = _train_and_validation(
    ('TRAIN_FILES', train_files), validation_files, validation_share, common
  )
  named = len(prepared)
  if test_files is not None:
    prepared.append(_prepare('TEST_FILES', test_files, ((1.0, 'test'),), **common))

  @seqio.map_over_dataset
  def with_prefix(pair):
    return pair | {'inputs': tf.strings.join([input_prefix, pair['inputs']])}

  return _register(
    'pairs', prepared, common['features'], vocabulary, [input_prefix],
    [with_prefix, _CACHE, preprocessors.cut_characters, seqio.preprocessors.tokenize],
    metric_fns=[] if metric is None else [METRICS[metric]], named=named,
  )  # fmt: skip


def _choose(setting: str, value: str, known: Sequence[str]) -> None:
  if value not in known:
    raise BadInput(f'{setting}={value!r}; choose one of {", ".join(known)}.')


def _train_and_validation(
  train: tuple[str, Files],
  validation_files: Files | None,
  share: float,
  common: dict,
) -> list[record_cache.Prepared]:
  """Reads both splits; without validation files they are shares of the train files."""
  if validation_files is not None:
    return [
      _prepare(*train, ((1.0, 'train'),), **common),
      _prepare('VALIDATION_FILES', validation_files, ((1.0, 'validation'),), **common),
    ]
  if not isinstance(share, int | float) or not 0 <= share < 1:
    raise BadInput(f'VALIDATION_SHARE={share!r} must be at least 0, and below 1.')
  splits = ((float(share), 'validation'), (1.0, 'train'))
  return [_prepare(*train, splits if share else splits[1:], **common)]


def _prepare(
  setting: str,
  patterns: Files,
  splits: tuple[tuple[float, str], ...],
  kinds: Sequence[str],
  cache_dir: str | None,
  **settings,
) -> record_cache.Prepared:
  found, stamps = record_cache.find(patterns, setting, kinds)
  folder = None if cache_dir is None else files.absolute(cache_dir)
  return record_cache.prepare(
    record_cache.Request(
      setting, found, stamps, splits=splits, folder=folder, **settings
    )
  )


def _register(
  kind: str,
  prepared: Sequence[record_cache.Prepared],
  features: Sequence[str],
  vocabulary: seqio.Vocabulary,
  settings: Sequence[str],
  preprocessors: Sequence[Callable],
  metric_fns: Sequence[Callable] = (),
  named: int | None = None,
) -> str:
  """Registers a task on TFRecords, unless it is; the first `named` make its name."""
  digests = [part.digest for part in prepared]
  content = json.dumps([kind, *settings, *digests[:named]])
  name = f'{kind}_{hashlib.sha256(content.encode()).hexdigest()[:10]}'
  patterns = {split: p for part in prepared for split, p in part.patterns.items()}
  made_of = (patterns, digests, vocabulary, list(metric_fns))
  if name in seqio.TaskRegistry.names():
    if _registered[name] == made_of:
      return name
    seqio.TaskRegistry.remove(name)
  _registered[name] = made_of
  feature = functools.partial(seqio.Feature, vocabulary=vocabulary, add_eos=True)
  seqio.TaskRegistry.add(
    name,
    source=seqio.TFExampleDataSource(
      patterns, dict.fromkeys(features, tf.io.FixedLenFeature([], tf.string))
    ),
    # Inputs that are too long are cut, and keep their end marker.
    preprocessors=[*preprocessors, seqio.preprocessors.append_eos_after_trim],
    output_features={'inputs': feature(required=False), 'targets': feature()},
    metric_fns=metric_fns,
  )
  return name
