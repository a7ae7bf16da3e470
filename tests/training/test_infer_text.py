"""Inference on users' files: what is read, what is refused, what comes out."""

import gzip
import itertools
import json
import math
import os
import shutil

import pytest
import seqio
import tensorflow as tf

from gqa_t5x import files
from gqa_t5x.errors import BadInput
from gqa_t5x.training import infer_text, resume, run_lock
from helpers import commands, tiny_task


@pytest.fixture
def register(tmp_path):
  """Registers a file of some lines."""

  def register(lines, name='in.txt', **kwargs):
    path = tmp_path / name
    path.write_bytes(b'\n'.join(lines) + b'\n')
    arguments = {
      'path': str(path),
      'vocabulary': tiny_task.vocabulary(),
      'output_dir': str(tmp_path / 'out'),
      'checkpoint': 'checkpoint_7',
    }
    return infer_text.task(**arguments | kwargs)

  return register


def examples(name, **lengths):
  lengths = {'inputs': 32, 'targets': 8} | lengths
  task = seqio.get_mixture_or_task(name)
  return list(task.get_dataset(lengths, 'infer', shuffle=False).as_numpy_iterator())


def test_a_task_has_the_lines_in_order(register, tmp_path):
  name = register([b'abc', b'x' * 50, b'de'], prefix='say: ')
  found = examples(name)
  assert [e['line'] for e in found] == [1, 2, 3]
  texts = [e['inputs_pretokenized'].decode() for e in found]
  assert texts == ['say: abc', 'say: ' + 'x' * 50, 'say: de']
  vocabulary = tiny_task.vocabulary()
  expected = [*vocabulary.encode('say: abc'), vocabulary.eos_id]
  assert found[0]['inputs'].tolist() == expected
  # Cut inputs, too, have an end marker.
  cut = vocabulary.encode('say: ' + 'x' * 50)[:31]
  assert found[1]['inputs'].tolist() == [*cut, vocabulary.eos_id]
  assert [p.name for p in (tmp_path / 'out').iterdir()] == [f'{name}.tfrecord']


def test_the_name_tells_contents_and_checkpoint(register):
  names = [
    register([b'abc']),
    register([b'abcd']),
    register([b'abc'], checkpoint='checkpoint_8'),
    register([b'abc'], prefix='say: '),
    register([b'abc'], name='my in.1.txt'),
  ]
  assert len(set(names)) == 5
  assert register([b'abc']) == names[0]
  assert names[0].startswith('text_in_')
  assert names[-1].startswith('text_my_in_1_')


def test_unreadable_lines_are_refused_by_number(register, tmp_path):
  many = [b'{"inputs": 1}'] * 12 + [b'{"inputs": "x"}']
  message = r"10 \(no text under 'inputs'\) and 2 more. Mend them, .*'skip'"
  with pytest.raises(ValueError, match=message):
    register(many, name='in.jsonl')
  assert list((tmp_path / 'out').iterdir()) == []


def test_unreadable_lines_are_skipped_and_reported(register, capsys):
  lines = [b'{"q": "a"}', b'{', b'', b'{"q": "b"}\r']
  name = register(lines, name='in.jsonl', key='q', unreadable='skip')
  found = examples(name)
  assert [(e['line'], e['inputs_pretokenized']) for e in found] == [
    (1, b'a'),
    (4, b'b'),
  ]
  assert (
    'in.jsonl: 2 unreadable lines are skipped, 2 are left.' in capsys.readouterr().err
  )


@pytest.mark.parametrize('name', ['in.txt', 'in.JSONL', 'n' * 249 + '.jsonl'])
def test_names_and_byte_order_marks(register, tmp_path, name):
  """A mark elsewhere than at the beginning of the file is text."""
  lines = [b'"a"', b'\xef\xbb\xbfb', b'"\\ud800"']
  if name != 'in.txt':
    lines = [b'{"inputs": "a"}', b'{"inputs": "\xef\xbb\xbfb"}', b'{"inputs": "\\ud8"}']
  lines[0] = b'\xef\xbb\xbf' + lines[0]
  found = examples(register(lines, name=name, unreadable='skip'))
  texts = [e['inputs_pretokenized'].decode() for e in found]
  skipped = [] if name != 'in.txt' else ['"\\ud800"']
  assert texts == ['"a"' if name == 'in.txt' else 'a', '\ufeffb', *skipped]
  assert not list((tmp_path / 'out').glob('*.tmp*'))


def test_columns_and_compression(register, tmp_path):
  """The formats: tests/data/test_records.py."""
  (found,) = examples(register([b'n\tinputs', b'3\ta'], name='in.tsv'))
  assert (found['line'], found['inputs_pretokenized']) == (2, b'a')
  (tmp_path / 'in.txt.gz').write_bytes(gzip.compress(b'a\nb\n'))
  name = register([], path=str(tmp_path / 'in.txt.gz'))
  assert [e['inputs_pretokenized'] for e in examples(name)] == [b'a', b'b']


def test_a_name_with_glob_characters(register):
  """Unlike a folder of checkpoints."""
  assert len(examples(register([b'a'], name='in [1]*?.txt'))) == 1


@pytest.mark.parametrize(
  ('lines', 'changes', 'message'),
  [
    ([b'a'], {'unreadable': 'drop'}, "UNREADABLE='drop'; choose one of refuse, skip"),
    ([b'a'], {'path': 'nowhere.txt'}, 'INPUT_FILE=nowhere.txt: there is no such file'),
    ([b'', b' '], {'unreadable': 'skip'}, 'in.txt has no line to infer on'),
    ([b'a'], {'path': '/'}, 'INPUT_FILE=/: it is a folder'),
    ([b'a'], {'path': 'x' * 300}, 'INPUT_FILE=x+: there is no such file'),
    ([b'a'], {'path': 'a\0b'}, 'INPUT_FILE=a'),
    ([b'{}'], {'name': 'in.json'}, r'in\.json: is it text, or JSON[?] Name it'),
    ([b'{}'], {'name': 'in.Json'}, r'in\.Json: is it text, or JSON[?] Name it'),
  ],
)
def test_bad_input(register, lines, changes, message):
  with pytest.raises(ValueError, match=message):
    register(lines, **changes)


def test_several_decodes_are_lists(tmp_path):
  """What T5X gives: tokens and scores of each decode."""
  vocabulary = tiny_task.vocabulary()
  words = [vocabulary.encode(word) for word in ('ab', 'cd')]
  examples = tf.data.Dataset.from_tensors(
    {'line': tf.constant(5, tf.int64), 'inputs_pretokenized': 'x'}
  )
  path = str(tmp_path / 'out.jsonl')
  for tokens, scores, texts in (
    ([words], [[-1.0, -0.5]], ['ab', 'cd']),
    ([words[1]], [-0.5], 'cd'),
  ):
    infer_text.write(
      path, (tokens, {'scores': scores}), examples, 'predict_with_aux', vocabulary
    )
    row = json.loads((tmp_path / 'out.jsonl').read_text())
    expected = {'line': 5, 'input': 'x', 'prediction': texts, 'score': scores[0]}
    assert row == expected
  for scores, line in (([-math.inf], '-inf'), ([[-1.0, math.nan]], r'\[-1.0, nan\]')):
    with pytest.raises(ValueError, match=f'The score of line 5 is {line}: the check'):
      infer_text.write(
        path, (words, {'scores': scores}), examples, 'predict_with_aux', vocabulary
      )
  with pytest.raises(ValueError, match="mode='score'; scores need predict_with_aux"):
    infer_text.write(path, ([], {}), examples, 'score', vocabulary)


@pytest.mark.slow
def test_from_file_to_file(pretrained, tmp_path):
  """Each line gets what it gets at another place, in another batch and file."""
  commands.write_gin(tmp_path)
  lines = ['one', 'two words', 'three words more', 'größer', 'five']
  (tmp_path / 'in.txt').write_text('\n'.join([*lines, *reversed(lines)]) + '\n')
  macros = {'INPUT_FILE': 'in.txt', 'BATCH_SIZE': 3, 'CHECKPOINT_PERIOD': 2}
  macros |= {'CHECKPOINT_PATH': str(pretrained / 'mha' / 'checkpoint_6')}
  macros |= {'INFER_OUTPUT_DIR': 'out'}
  files = ['tiny.gin', 'gin/infer_text.gin']
  (tmp_path / 'bad.txt').write_text('one\n\n')
  with pytest.raises(ValueError, match=r'unreadable lines: 2 .empty.'):
    commands.files_here(
      tmp_path, 't5x.infer', files, **macros | {'INPUT_FILE': 'bad.txt'}
    )
  commands.files_here(tmp_path, 't5x.infer', files, **macros)
  (file,) = (tmp_path / 'out').glob('text_in_*.jsonl-00000-of-00001')
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  assert [row['line'] for row in rows] == list(range(1, 11))
  assert [row['input'] for row in rows] == [*lines, *reversed(lines)]
  for row, mirrored in zip(rows, reversed(rows), strict=True):
    assert row['prediction'] == mirrored['prediction']
    assert row['score'] == pytest.approx(mirrored['score'], rel=1e-4)
    assert row['score'] < 0


ONE = '-00000-of-00001'  # What the only job calls its results.
BEAM = 'gin/decoding/beam_search.gin'
FILES = {
  'text': ['tiny.gin', 'gin/infer_text.gin'],
  'task': ['tiny.gin', 'gin/runs/infer.gin', 'task.gin'],
}


@pytest.fixture(scope='module')
def infer(pretrained, tmp_path_factory):
  """Infers in a folder of its own on the lines of a file, or on the tiny task."""
  folder = tmp_path_factory.mktemp('infer')
  commands.write_gin(folder)
  (folder / 'in.txt').write_text('\n'.join(tiny_task.WORDS))

  def run(kind, *more_files, step=6, **macros):
    given = {'INPUT_FILE': 'in.txt'} if kind == 'text' else {}
    given |= {'CHECKPOINT_PATH': str(pretrained / 'mha' / f'checkpoint_{step}')}
    given |= {'INFER_OUTPUT_DIR': kind, 'BATCH_SIZE': 4}
    given |= {'infer_script.infer.checkpoint_period': 1} | macros
    files = [*FILES[kind], *more_files]
    commands.files_here(folder, 't5x.infer', files, **given)
    found = (folder / given['INFER_OUTPUT_DIR']).glob('*.jsonl-*-of-?????')
    return [path.read_text() for path in sorted(found)]

  run.folder = folder
  return run


@pytest.mark.slow
@pytest.mark.parametrize('kind', FILES)
def test_only_the_same_settings_go_on(kind, infer):
  """Whether results are complete or not; before there are any, all settings do."""
  (whole,) = infer(kind)
  for more, changes, message in (
    ((), {'BATCH_SIZE': 10}, 'BATCH_SIZE was 4, is 10'),
    ((BEAM,), {}, r'DECODE_FN was @\S+greedy, is @\S+beam_search'),
    ((BEAM,), {}, 'BREVITY_PENALTY was not set, is 0.6'),
    ((), {'step': 4}, r"CHECKPOINT_PATH was '.*checkpoint_6', is '.*checkpoint_4'"),
    (
      (),
      {'SPLIT': 'train'},
      'SPLIT was .*, is .train.*Give the same settings to go on',
    ),
  ):
    with pytest.raises(BadInput, match=f'{kind} has results of other .*{message}'):
      infer(kind, *more, **changes)
  assert infer(kind) == [whole]
  # Stopped: parts of another number of rows are there.
  other = infer.folder / f'other_{kind}'
  other.mkdir()
  settings = resume.SETTINGS.format(ONE)
  shutil.copy(infer.folder / kind / settings, other)
  (other / f'tmp-{kind}{ONE}').mkdir()
  with pytest.raises(BadInput, match='BATCH_SIZE was 4, is 2'):
    infer(kind, INFER_OUTPUT_DIR=other.name, BATCH_SIZE=2)
  (other / settings).unlink()
  with pytest.raises(BadInput, match='results of unknown settings; choose another'):
    infer(kind, INFER_OUTPUT_DIR=other.name)
  (other / f'tmp-{kind}{ONE}').rmdir()
  assert infer(kind, INFER_OUTPUT_DIR=other.name) == [whole]


@pytest.mark.slow
def test_float16_decodes_padded_inputs(infer):
  (found,) = infer('text', INFER_OUTPUT_DIR='half', ACTIVATION_DTYPE='float16')
  (whole,) = infer('text')
  for half, single in zip(found.splitlines(), whole.splitlines(), strict=True):
    expected = json.loads(single)['score']
    assert json.loads(half)['score'] == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize('kind', FILES)
def test_several_jobs_share_a_folder(kind, infer):
  """Each has a share of the lines, and all have the same settings."""
  (whole,) = infer(kind)
  name = f'shards_{kind}'

  def job(number, of=3, **macros):
    shard = {'shard_id': number, 'num_shards': of}
    macros |= {f'infer_script.infer.{key}': value for key, value in shard.items()}
    return infer(kind, INFER_OUTPUT_DIR=name, **macros)

  (infer.folder / name).mkdir()
  lock = files.lock(infer.folder / name / f'{run_lock.NAME}-00000-of-00003')
  job(2)
  job(1)
  with pytest.raises(run_lock.InUse, match=rf'{name} is in use by .* another folder'):
    job(0)
  os.close(lock)
  parts = [part.splitlines() for part in job(0)]
  assert [len(part) for part in parts] == [3, 3, 2]
  # Another place in a batch: the last digits of a score differ.
  key = 'input' if kind == 'text' else 'inputs'
  merged, expected = (
    [(row[key], row['prediction']) for row in map(json.loads, lines)]
    for lines in ([*itertools.chain(*parts)], whole.splitlines())
  )
  assert sorted(merged, key=str) == sorted(expected, key=str)
  for number, of, changes, message in (
    (0, 3, {'BATCH_SIZE': 2}, 'BATCH_SIZE was 4, is 2'),
    (0, 4, {}, r'infer.num_shards was 3, is 4'),
    (3, 3, {}, r'^shard_id=3 must be from 0 to 2, as num_shards is 3'),
  ):
    with pytest.raises(BadInput, match=message):
      job(number, of, **changes)
