"""The vocabulary of WMT14 for Shazeer's models, and the commands of the data."""

import pytest
import seqio
from tensorflow_datasets.translate import wmt14

from gqa_t5x.data import benchmarks, prepare, wmt_vocabulary

PAIRS = {
  f'{i}': {'en': f'The house number {i} is green.', 'de': f'Haus Nummer {i} ist grün.'}
  for i in range(60)
}


class Wmt14Translate(wmt14.Wmt14Translate, skip_registration=True):
  """TFDS's builder with sentences of this file."""

  code_path = None  # there are no downloads, nor checksums of them

  def _split_generators(self, dl_manager):
    splits = ('train', 'validation', 'test')
    return {split: iter(PAIRS.items()) for split in splits}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder of TFDS with the data of `wmt14_en_de`."""
  folder = str(tmp_path_factory.mktemp('tfds'))
  Wmt14Translate(config='de-en', data_dir=folder).download_and_prepare()
  return folder


@pytest.fixture(autouse=True)
def registered_as_at_import():
  """Gives the tasks their own folder back after each test."""
  yield
  for name in benchmarks.BENCHMARKS:
    benchmarks.task(name)


def test_a_vocabulary_of_the_tasks_training_text(folder, tmp_path, capsys):
  path = tmp_path / 'new [1]' / 'wmt.model'
  wmt_vocabulary.write(str(path), folder, num_pieces=295)
  assert f'295 pieces in {path}' in capsys.readouterr().out
  vocabulary = seqio.SentencePieceVocabulary(str(path), extra_ids=0)
  assert vocabulary.vocab_size == 295
  assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
  # Both languages have pieces, after 3 ids and 256 bytes; other characters are bytes.
  for text, num_bytes in (('house is green', 0), ('Nummer ist grün', 0), ('日本語', 9)):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert sum(id_ < 259 for id_ in ids) == num_bytes
    assert 2 not in ids
  with pytest.raises(ValueError, match=r'wmt\.model exists already; choose another'):
    wmt_vocabulary.write(str(path), folder)


def test_training_is_deterministic():
  texts = [text for pair in PAIRS.values() for text in pair.values()]
  assert wmt_vocabulary.train(texts, 295) == wmt_vocabulary.train(texts, 295)


def test_sentences_are_those_of_the_first_pairs(folder):
  benchmarks.task('wmt14_en_de_shazeer', data_dir=folder)
  found = list(wmt_vocabulary.sentences(num_pairs=7))
  pairs = {(pair['en'], pair['de']) for pair in PAIRS.values()}
  assert len(set(zip(found[::2], found[1::2], strict=True)) & pairs) == 7
  assert found == list(wmt_vocabulary.sentences(num_pairs=7))


def test_too_little_text_is_an_error(folder, tmp_path):
  path = tmp_path / 'wmt.model'
  with pytest.raises(ValueError, match=r'no vocabulary of 32768 pieces: .*too high'):
    wmt_vocabulary.write(str(path), folder)
  assert not path.exists()


def test_prepared_data_is_left_alone(folder, capsys):
  prepare.prepare(['wmt14_en_de', 'wmt14_en_de_shazeer'], folder)
  sizes = 'train 60, validation 60, test 60 examples in'
  for line, name in zip(
    capsys.readouterr().out.splitlines(),
    ['wmt14_en_de', 'wmt14_en_de_shazeer'],
    strict=True,
  ):
    assert line == f'{name}: {sizes} {folder}/wmt14_translate/de-en/1.0.0'


@pytest.mark.parametrize(
  ('names', 'said'), [(['c4'], 'c4'), ([], 'on the command line')]
)
def test_unknown_names_are_an_error(names, said):
  with pytest.raises(
    ValueError, match=f'named {said}; choose from cnn_dailymail, arxiv'
  ):
    prepare.prepare(names, None)


@pytest.mark.parametrize(
  ('command', 'args', 'message'),
  [
    (prepare, ['mediasum'], 'error: FOLDER lacks news_dialogue.json and train_val'),
    (
      wmt_vocabulary,
      ['--output=FOLDER/x'],
      'error: task wmt14_en_de_shazeer: there is',
    ),
    (wmt_vocabulary, [], 'error: --output is missing: the file to write'),
  ],
)
def test_commands_say_what_is_wrong_in_one_line(
  tmp_path, capsys, command, args, message
):
  args = [arg.replace('FOLDER', str(tmp_path)) for arg in args]
  assert command.main(['x', *args, f'--data_dir={tmp_path}']) == 1
  said = capsys.readouterr().err.splitlines()
  assert said[-1].startswith(message.replace('FOLDER', str(tmp_path)))


@pytest.mark.parametrize('command', [prepare, wmt_vocabulary])
def test_help(capsys, command):
  assert command.main(['x', '--help']) == 0
  said = capsys.readouterr().out
  assert said.startswith(command.__doc__)
  assert '--data_dir: Folder of TensorFlow Datasets' in said
