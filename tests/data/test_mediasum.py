"""MediaSum from its published JSON files to the examples of TFDS and of the task."""

import json
import re

import pytest
import seqio

from gqa_t5x.data import benchmarks, mediasum, prepare

DIALOGUES = [
  {
    'id': f'NPR-{i}',
    'program': 'Day to Day',
    'date': '2008-06-10',
    'url': 'https://www.npr.org/',
    'title': 'Plants',
    'summary': f'Summary {i}, "quoted", naïve.',
    'utt': [f'This is Day {i}.', 'OK. [LAUGHTER] Thank you.'],
    'speaker': ['MADELEINE BRAND, host', 'Professor SUSAN DUDLEY (Biology)'],
  }
  for i in range(6)
]
SPLITS = {'train': ['NPR-5', 'NPR-0', 'NPR-2'], 'val': ['NPR-1'], 'test': ['NPR-3']}


def write(folder, dialogues=DIALOGUES, splits=SPLITS) -> None:
  """Writes the two files as published; text stands for itself."""
  for name, value in (('news_dialogue', dialogues), ('train_val_test_split', splits)):
    if value is not None:
      text = value if isinstance(value, str) else json.dumps(value)
      (folder / f'{name}.json').write_text(text)


def keys(split: str) -> set[str]:
  source = seqio.TaskRegistry.get('mediasum').source
  examples = source.get_dataset(split, shuffle=False).as_numpy_iterator()
  return {example['id'].decode() for example in examples}


@pytest.fixture
def registered():
  """Gives the task its own folder and vocabulary back afterwards."""
  yield
  benchmarks.task('mediasum')


# --- Reading an array -----------------------------------------------------------------


@pytest.mark.parametrize('indent', [None, 4])
@pytest.mark.parametrize('ensure_ascii', [True, False])
@pytest.mark.parametrize('chunk_bytes', [1, 7, 64, 1 << 20])
@pytest.mark.parametrize(
  'values', [[], [*DIALOGUES[:2], {'a': ['日本語, ]}{[', '\\"', '']}, {}]]
)
def test_an_array_is_read_whatever_the_chunks(
  tmp_path, monkeypatch, indent, ensure_ascii, chunk_bytes, values
):
  monkeypatch.setattr(mediasum, 'CHUNK_BYTES', chunk_bytes)
  path = tmp_path / 'array.json'
  text = json.dumps(values, indent=indent, ensure_ascii=ensure_ascii)
  path.write_text(f'\n {text}\n', encoding='utf-8')
  assert list(mediasum.read_array(path)) == values


@pytest.mark.parametrize(
  'text',
  [
    b'',
    b'{"a": [1]}',
    b'[{"a": 1}',
    b'[{"a": 1}, {"a"',
    b'[{"a": 1}, {"a": nonsense}, {"a": 2}]',
    b'[{"a": 1}] and more',
    b'PK\x03\x04\xff\xfe',  # an archive
  ],
)
def test_a_damaged_array_is_named(tmp_path, text):
  path = tmp_path / 'array.json'
  path.write_bytes(text)
  message = "('utf-8'" if text.startswith(b'PK') else '(damaged'
  with pytest.raises(
    ValueError, match=re.escape(f'array.json is no whole JSON array {message}')
  ):
    list(mediasum.read_array(path))


def test_a_damaged_array_does_not_fill_the_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(mediasum, 'CHUNK_BYTES', 10)
  monkeypatch.setattr(mediasum, 'MAX_CHARS', 100)
  path = tmp_path / 'array.json'
  path.write_text('[{"a": nonsense' + ' ' * 1000 + '}]')
  with pytest.raises(ValueError, match=r'damaged near character 1\)'):
    list(mediasum.read_array(path))


# --- The data set ---------------------------------------------------------------------


def test_the_published_split_and_turns_in_order(tmp_path, capsys, registered):
  folder = tmp_path / 'data [1]*?'  # Nothing of TensorFlow Datasets takes it for more.
  folder.mkdir()
  write(folder)
  assert prepare.main(['prepare', 'mediasum', f'--data_dir={folder}']) == 0
  assert (
    'mediasum: train 3, validation 1, test 1 examples in' in capsys.readouterr().out
  )
  benchmarks.task('mediasum', data_dir=str(folder))
  expected = {'train': {'NPR-0', 'NPR-2', 'NPR-5'}, 'test': {'NPR-3'}}
  assert {split: keys(split) for split in expected} == expected
  task = seqio.TaskRegistry.get('mediasum')
  assert task.splits == ('train', 'validation', 'test')
  assert [task.num_input_examples(split) for split in task.splits] == [3, 1, 1]
  dataset = task.preprocess_precache(task.source.get_dataset('validation'))
  (example,) = dataset.as_numpy_iterator()
  assert {name: text.decode() for name, text in example.items()} == {
    'inputs': 'summarize: MADELEINE BRAND, host: This is Day 1.\n'
    'Professor SUSAN DUDLEY (Biology): OK. [LAUGHTER] Thank you.',
    'targets': 'Summary 1, "quoted", naïve.',
  }


# (dialogues, splits) -> what the error says.
BAD = {
  'no dialogues': ((None, SPLITS), 'lacks news_dialogue.json. MediaSum is downloaded'),
  'no split': ((DIALOGUES, None), 'lacks train_val_test_split.json. MediaSum is down'),
  'another split': (
    (DIALOGUES, {'train': []}),
    "split.json is not the published .*'val'",
  ),
  'no JSON': ((DIALOGUES, 'train'), 'train_val_test_split.json is not the published'),
  'cut short': ((json.dumps(DIALOGUES)[:-9], SPLITS), 'news_dialogue.json is no whole'),
  'no summary': (([{'id': 'x', 'utt': [], 'speaker': []}], SPLITS), "lacks 'summary'"),
  'turns': (
    ([{**DIALOGUES[0], 'utt': []}], SPLITS),
    'NPR-0 has 0 turns and 2 speakers',
  ),
  'other data': (
    (DIALOGUES[4:5], SPLITS),
    'lacks 3 of 3 .* NPR-0 for one; .* other data',
  ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_files_are_named(tmp_path, case):
  files, message = BAD[case]
  write(tmp_path, *files)
  with pytest.raises(ValueError, match=message) as error:
    prepare.prepare(['mediasum'], str(tmp_path))
  assert str(tmp_path) in str(error.value)


def test_a_dialogue_less_is_a_warning(tmp_path, caplog, registered):
  write(tmp_path, DIALOGUES[:5])
  prepare.prepare(['mediasum'], str(tmp_path))
  assert 'news_dialogue.json lacks 1 of 3 dialogues of a split, NPR-5' in caplog.text
  benchmarks.task('mediasum', data_dir=str(tmp_path))
  assert keys('train') == {'NPR-0', 'NPR-2'}
