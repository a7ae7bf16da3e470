"""Tasks on users' own files: what is in which split, and what a model gets of it."""

import collections
import pathlib
import re

import pytest
import seqio
import t5.data.mixtures  # noqa: F401
import tensorflow as tf

from gqa_t5x.data.own import own_tasks
from gqa_t5x.errors import BadInput
from helpers import tiny_task
from helpers.own_files import (
  PAIRS,
  TEXTS,
  pair_task,
  raw,
  text_task,
  write_pairs,
  write_texts,
)

LENGTHS = {'inputs': 32, 'targets': 32}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """Each test has a cache of its own."""
  monkeypatch.setenv('GQA_T5X_CACHE', str(tmp_path / 'cache'))
  monkeypatch.chdir(tmp_path)
  return tmp_path


def rows(dataset) -> list[tuple]:
  """Token ids of all examples, or of as many as are taken."""
  return [
    tuple(example[name].tobytes() for name in ('inputs', 'targets'))
    for example in dataset.as_numpy_iterator()
  ]


# --- Splits -------------------------------------------------------------------


def test_a_text_is_in_one_split_whatever_is_with_it():
  write_texts()
  name = text_task()
  train, validation = (raw(name, split) for split in ('train', 'validation'))
  # Binomial(300, 0.2), and hashes do not change.
  assert 40 < len(validation) < 80
  assert sorted(train + validation) == sorted((text,) for text in TEXTS)
  # Other texts, in other files and formats, with other white space.
  pathlib.Path('b').mkdir()
  some = [f' {text.upper()}  ' for text in TEXTS[100:]]
  pathlib.Path('b/x.txt').write_text('\n'.join(some[:50]))
  write_texts('b/y.jsonl', some[50:])
  name = text_task(['b/*.txt', str(pathlib.Path('b/y.jsonl').absolute())])
  again = {text.strip().lower() for (text,) in raw(name, 'validation')}
  assert again == {text for (text,) in validation} & set(TEXTS[100:])


def test_pairs_are_split_by_their_input():
  write_pairs(pairs=[(q, a + end) for end in ('', '!') for q, a in PAIRS])
  name = pair_task()
  inputs = [{q for q, _ in raw(name, split)} for split in ('train', 'validation')]
  assert not inputs[0] & inputs[1]
  assert inputs[0] | inputs[1] == set(TEXTS)


def test_files_of_their_own():
  for path, part in (('a', PAIRS[:9]), ('b', PAIRS[9:14]), ('c', PAIRS[14:20])):
    write_pairs(f'{path}.tsv', part)
  name = pair_task('a.tsv', validation_files='b.tsv', test_files=['c.tsv', 'c.tsv'])
  assert raw(name, 'train') == PAIRS[:9]
  assert raw(name, 'validation') == PAIRS[9:14]
  assert raw(name, 'test') == PAIRS[14:20]
  name = pair_task('a.tsv', validation_share=0)
  assert seqio.TaskRegistry.get(name).splits == ('train',)
  write_texts('t.jsonl', TEXTS[:9])
  write_texts('v.jsonl', TEXTS[9:12])
  name = text_task('t.jsonl', validation_files='v.jsonl')
  assert raw(name, 'validation') == [(text,) for text in TEXTS[9:12]]


def test_hosts_get_files_or_every_other_example():
  for i in range(4):
    write_texts(f'{i}.jsonl', TEXTS[i::4])
  name = text_task(validation_share=0)
  shards = [raw(name, 'train', seqio.ShardInfo(i, 2)) for i in range(2)]
  assert sorted(shards[0]) == sorted((t,) for t in TEXTS[0::4] + TEXTS[2::4])
  assert sorted(shards[1]) == sorted((t,) for t in TEXTS[1::4] + TEXTS[3::4])
  task = seqio.TaskRegistry.get(text_task('0.jsonl', validation_share=0))
  rows = [
    task.get_dataset(LENGTHS, shuffle=False, shard_info=seqio.ShardInfo(i, 2))
    for i in range(2)
  ]
  assert all(len(list(part)) > 0 for part in rows)


# --- What a model gets ----------------------------------------------------------


@pytest.mark.parametrize(
  ('objective', 'task'),
  [
    ('span_corruption', 'c4_v220_span_corruption'),
    ('prefix_lm', 'c4_v220_prefix_lm'),
  ],
)
def test_objectives_are_those_of_t5(objective, task):
  """T5's own task on C4, given the same texts."""
  write_texts()
  vocabulary = tiny_task.vocabulary(100)
  own = seqio.TaskRegistry.get(text_task(objective=objective, validation_share=0))
  feature = seqio.Feature(vocabulary, add_eos=True)

  def c4(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({'text': TEXTS})

  oracle = seqio.Task(
    'oracle',
    seqio.FunctionDataSource(c4, ['train']),
    {'inputs': feature, 'targets': feature},
    preprocessors=seqio.TaskRegistry.get(task).preprocessors,
  )
  found, expected = (
    rows(t.get_dataset(LENGTHS, shuffle=False, seed=7)) for t in (own, oracle)
  )
  assert found == expected
  assert len(found) > 100


def test_pairs_are_prefixed_and_cut_with_their_end_marker():
  write_pairs(pairs=[('abc', 'de'), ('x' * 50, 'y' * 40)])
  name = pair_task(input_prefix='say: ', validation_share=0)
  short, long = seqio.TaskRegistry.get(name).get_dataset(LENGTHS, shuffle=False)
  vocabulary = tiny_task.vocabulary()
  for example, inputs, targets in (
    (short, 'say: abc', 'de'),
    (long, 'say: ' + 'x' * 26, 'y' * 31),
  ):
    assert example['inputs'].numpy().tolist() == [*vocabulary.encode(inputs), 1]
    assert example['targets'].numpy().tolist() == [*vocabulary.encode(targets), 1]
  assert long['targets_pretokenized'].numpy() == b'y' * 40  # What is scored.


@pytest.mark.parametrize('metric', own_tasks.METRICS)
def test_scores(metric):
  write_pairs(pairs=[('q', 'The cat')] * 2)
  name = pair_task(validation_share=0, metric=metric)
  (function,) = seqio.TaskRegistry.get(name).metric_fns
  scores = function(['The cat sat here', 'red'], ['the cat sat here', ' red'])
  expected = dict.fromkeys(('rouge1', 'rouge2', 'rougeLsum', 'f1', 'em'), 100)
  expected |= {'rouge2': 50, 'exact_match': 50}
  if metric != 'bleu':
    assert scores[metric] == pytest.approx(expected[metric])
  assert 0 < scores[metric] <= 100
  assert function(['a b c d'], ['a b c d'])[metric] == pytest.approx(100)


@pytest.mark.parametrize('num_files', [1, 5])
def test_the_position_is_restored(num_files, folder):
  """In the middle of an epoch, by tf.data's own checkpoints."""
  for i in range(num_files):
    write_texts(f'{i}.jsonl', TEXTS[i::num_files])
  task = seqio.TaskRegistry.get(text_task())

  def start():
    dataset = task.get_dataset(LENGTHS, shuffle=True, seed=3, num_epochs=None)
    return iter(dataset.map(lambda example: example['targets']))

  def draw(iterator, n):
    return [next(iterator).numpy().tolist() for _ in range(n)]

  first = start()
  draw(first, 70)
  path = tf.train.Checkpoint(data=first).write(str(folder / 'position'))
  expected = draw(first, 300)
  second = start()
  tf.train.Checkpoint(data=second).read(path)
  assert draw(second, 300) == expected
  assert draw(start(), 300) != expected


# --- Names ----------------------------------------------------------------------


def test_the_name_tells_what_a_position_depends_on(folder):
  write_texts()
  names = collections.Counter()
  for changes in (
    {},
    {'validation_share': 0.3},
    {'objective': 'prefix_lm'},
    {'validation_files': 'a.jsonl'},
  ):
    names[text_task(**changes)] += 1
  write_texts(texts=TEXTS[1:])
  names[text_task()] += 1
  write_pairs()
  for changes in ({}, {'input_prefix': 'x'}, {'validation_share': 0.3}):
    names[pair_task(**changes)] += 1
  assert set(names.values()) == {1}
  # Not on the place, nor on what is only read when it is scored.
  write_texts()
  (folder / 'b').mkdir()
  write_texts('b/other.jsonl')
  assert text_task('b/*') == text_task() == next(iter(names))
  name = pair_task(metric='bleu', test_files='a.tsv', unreadable='skip')
  assert name == pair_task()
  assert all(re.fullmatch(r'(text_files|pairs)_[0-9a-f]{10}', n) for n in names)


def test_the_last_vocabulary_counts():
  write_pairs()
  for extra_ids in (5, 5, 7):
    vocabulary = tiny_task.vocabulary(extra_ids)
    task = seqio.TaskRegistry.get(pair_task(vocabulary=vocabulary))
    assert task.output_features['targets'].vocabulary == vocabulary


# --- Bad input ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'files': 'b*.jsonl'},
      r'TEXT_FILES=/\S+/b\*.jsonl: there is no such file, and no',
    ),
    ({'files': []}, 'TEXT_FILES names no file; give a pattern'),
    ({'files': ''}, 'empty; give'),
    ({'files': '.'}, r'TEXT_FILES=/\S+: there is no such file'),
    ({'files': 'a.csv'}, r'a.csv: the name must end in one of .txt, .jsonl, .json, .p'),
    ({'files': 'none.jsonl'}, r'TEXT_FILES=/\S+/none.jsonl is empty: it has no record'),
    ({'objective': 'mlm'}, "OBJECTIVE='mlm'; choose one of span_corruption, prefix_lm"),
    ({'document': 'page'}, "DOCUMENT='page'; choose one of paragraph, line, file"),
    ({'unreadable': 'drop'}, "UNREADABLE='drop'; choose one of refuse, skip"),
    ({'key': 'body'}, r"a.jsonl has unreadable lines: 1 .no text under 'body'., 2"),
    ({'key': 'body', 'unreadable': 'skip'}, 'a.jsonl is empty: it has no record'),
    ({'validation_share': 1}, 'VALIDATION_SHARE=1 must be at least 0, and below 1'),
    ({'validation_share': '1'}, "VALIDATION_SHARE='1' must be at least 0"),
    (
      {'validation_share': 1e-9},
      r'SHARE=1e-09 and a hash, none of the 300 records is in',
    ),
    ({'validation_files': 'v'}, r'VALIDATION_FILES=/\S+/v: there is no such file'),
    ({'cache_dir': 'a.jsonl'}, r'a.jsonl/records/\w+ cannot be written: .*CACHE_DIR'),
  ],
)
def test_bad_text_files(changes, message, folder):
  write_texts()
  for name in ('none.jsonl', 'a.csv'):
    pathlib.Path(name).write_text('')
  with pytest.raises(BadInput, match=message):
    text_task(**{'files': 'a.jsonl'} | changes)
  assert not list((folder / 'cache').rglob('*.tmp*'))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'metric': 'rouge'},
      "METRIC='rouge'; choose one of rouge1, rouge2, .* exact_match",
    ),
    ({'train_files': 'a.txt'}, 'must end in one of .jsonl, .json, .tsv, .parquet'),
    ({'target_key': 2}, "INPUT_KEY='inputs' and TARGET_KEY=2: give two names, or the"),
    ({'input_key': 'q'}, r"TRAIN_FILES=/\S+: the first line names .* none is 'q'"),
    ({'test_files': 'no'}, r'TEST_FILES=/\S+/no: there is no such file'),
  ],
)
def test_bad_pairs(changes, message):
  write_pairs()
  pathlib.Path('a.txt').write_text('x')
  with pytest.raises(BadInput, match=message):
    pair_task(**changes)


@pytest.mark.parametrize(
  ('changes', 'lengths', 'message'),
  [
    ({}, (512, 113), r'corruption of 512 inputs has 114 targets, more than 113; give'),
    ({}, (2048, 512), r'VOCABULARY has 100 sentinels .* of 2048 inputs needs 1\d\d'),
    # Of bytes all are, as in ByT5.
    (
      {'extra_ids': 0},
      (8192, 4096),
      r'has 256 sentinels .* of 8192 inputs needs 4\d\d',
    ),
    ({'objective': 'prefix_lm'}, (64, 63), 'of 64 tokens .*targets has only 63; give'),
  ],
)
def test_lengths_and_sentinels(changes, lengths, message):
  write_texts()
  task = seqio.TaskRegistry.get(text_task(**changes))
  with pytest.raises(BadInput, match=message):
    task.get_dataset(dict(zip(LENGTHS, lengths, strict=True)))
