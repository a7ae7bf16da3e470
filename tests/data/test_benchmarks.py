"""The benchmarks as seqio tasks: strings in, strings and tokens and scores out."""

import pytest
import seqio
import seqio.test_utils
import t5.data
import t5.data.mixtures
import tensorflow as tf
import tensorflow_datasets as tfds

from gqa_t5x.data import benchmarks, preprocessors, wmt_vocabulary

LENGTHS = {'inputs': 8, 'targets': 5}
T5_PATH = 'gs://t5-data/vocabs/cc_all.32000/sentencepiece.model'
PLANTS = {
  'speaker': ['MADELEINE BRAND, host', 'Professor SUSAN DUDLEY (Biology)'],
  'utt': ['This is Day to Day.', 'OK.  Thank you.'],
}
SUNSET = {
  'question': 'Which musical premiered in 1993?',
  'question_id': 'tc_33',
  'entity_pages': {
    'title': ['Andrew Lloyd Webber', 'Sunset Boulevard (musical)'],
    'wiki_context': ['Lord Lloyd-Webber is\n\na composer.', 'Sunset Boulevard is …'],
  },
  'search_results': {'rank': tf.zeros([0], tf.int32)},
  'answer': {
    'value': 'Sunset Boulevard',
    'aliases': ['Sunset Blvd', 'Sunset Boulevard'],
  },
}
# Task -> an example of TFDS, `inputs`, `targets`.
TEXTS = {
  'cnn_dailymail': (
    {'article': '(CNN) A "quoted" café.', 'highlights': 'One.\nTwo .'},
    'summarize: (CNN) A "quoted" café.',
    'One.\nTwo .',
  ),
  'arxiv': (
    {'article': 'let @xmath0 be .\nthen', 'abstract': ' we show . \n  it holds . '},
    'summarize: let @xmath0 be .\nthen',
    ' we show . \n  it holds . ',
  ),
  'pubmed': (
    {'article': '', 'abstract': ' aims . '},
    'summarize: ',
    ' aims . ',
  ),
  'mediasum': (
    {'id': 'NPR-11', 'summary': 'Plants know kin.', 'turns': PLANTS},
    'summarize: MADELEINE BRAND, host: This is Day to Day.\n'
    'Professor SUSAN DUDLEY (Biology): OK.  Thank you.',
    'Plants know kin.',
  ),
  'multi_news': (
    {'document': 'First.\n\nMore. ||||| Second.', 'summary': '– Both say so.'},
    'summarize: First.\n\nMore. ||||| Second.',
    '– Both say so.',
  ),
  'wmt14_en_de': (
    {'en': 'Good &amp; new.', 'de': 'Gut &amp; neu: „ß“.'},
    'translate English to German: Good &amp; new.',
    'Gut &amp; neu: „ß“.',
  ),
  'wmt14_en_de_shazeer': (
    {'en': 'Good morning.', 'de': 'Guten Morgen.'},
    'Good morning.',
    'Guten Morgen.',
  ),
  'trivia_qa': (
    SUNSET,
    'question: Which musical premiered in 1993? context: Andrew Lloyd Webber Lord '
    'Lloyd-Webber is\n\na composer. Sunset Boulevard (musical) Sunset Boulevard is …',
    'Sunset Boulevard',
  ),
}


@pytest.fixture(autouse=True)
def registered_as_at_import():
  """Gives the tasks their own vocabulary and folder back after each test."""
  yield
  for name in benchmarks.BENCHMARKS:
    benchmarks.task(name)


@pytest.fixture(scope='module')
def model_file(tmp_path_factory):
  """A small SentencePiece model that has a piece or bytes for every character."""
  texts = [text for _, *pair in TEXTS.values() for text in pair] * 4
  path = tmp_path_factory.mktemp('vocabulary') / 'small.model'
  path.write_bytes(wmt_vocabulary.train(texts, 360))
  return str(path)


@pytest.fixture
def vocabulary(model_file):
  return seqio.SentencePieceVocabulary(model_file, extra_ids=100)


def decoded(example) -> dict[str, str]:
  return {name: example[name].decode() for name in ('inputs', 'targets')}


def test_every_benchmark_has_a_row():
  assert set(TEXTS) == set(benchmarks.BENCHMARKS)


@pytest.mark.parametrize('name', TEXTS)
def test_texts(name):
  raw, inputs, targets = TEXTS[name]
  task = seqio.TaskRegistry.get(name)
  dataset = task.preprocess_precache(tf.data.Dataset.from_tensors(raw))
  (example,) = dataset.as_numpy_iterator()
  assert decoded(example) == {'inputs': inputs, 'targets': targets}
  if name == 'trivia_qa':
    assert example['answers'].tolist() == [b'Sunset Blvd', b'Sunset Boulevard']
  else:
    assert set(example) == {'inputs', 'targets'}


@pytest.mark.parametrize(
  ('text', 'expected'),
  [('', ''), ('日本語é' * 20, '日本語é' * 8), ('x' * 32, 'x' * 32)],
)
def test_characters_are_cut_whole_and_only_to_a_length(text, expected):
  dataset = tf.data.Dataset.from_tensors({'inputs': text, 'targets': text})
  cut = preprocessors.cut_characters(dataset, {'inputs': 2, 'targets': 1})
  (example,) = cut.as_numpy_iterator()
  assert decoded(example) == {'inputs': expected, 'targets': text}
  (example,) = preprocessors.cut_characters(dataset).as_numpy_iterator()
  assert decoded(example) == {'inputs': text, 'targets': text}


@pytest.mark.parametrize('name', ['mediasum', 'trivia_qa'])
def test_packed_for_training(name, vocabulary):
  """The model gets the tokens alone: not the texts, nor answers of any number."""
  raw, inputs, targets = TEXTS[name]
  benchmarks.task(name, vocabulary)
  with seqio.test_utils.DataInjector(name, {'train': raw}):
    dataset = seqio.get_dataset(
      name,
      {'inputs': 32, 'targets': 16},
      seqio.EncDecFeatureConverter(pack=True),
      dataset_split='train',
      shuffle=False,
    )
    (row,) = dataset.as_numpy_iterator()
  assert {value.dtype.kind for value in row.values()} == {'i'}
  for feature, text, length in (
    ('encoder_input_tokens', inputs, 32),
    ('decoder_target_tokens', targets, 16),
  ):
    tokens = [*vocabulary.encode(text)[: length - 1], 1]
    assert row[feature].tolist() == tokens + [0] * (length - len(tokens))


# --- The builders of TFDS -------------------------------------------------------------


@pytest.mark.parametrize('name', sorted(set(TEXTS) - {'trivia_qa', 'mediasum'}))
def test_mock_data_of_the_builders(name, vocabulary):
  """Feature names and versions are the builders'; the other two are tested apart."""
  benchmarks.task(name, vocabulary)
  task = seqio.TaskRegistry.get(name)
  raw, *_ = TEXTS[name]
  source, target = list(raw)[:2]
  prefix = {'wmt14_en_de': 'translate English to German: ', 'wmt14_en_de_shazeer': ''}
  with tfds.testing.mock_data(3, policy=tfds.testing.MockPolicy.USE_CODE):
    originals = list(task.source.get_dataset('validation').as_numpy_iterator())
    examples = list(
      task.get_dataset(LENGTHS, 'validation', shuffle=False).as_numpy_iterator()
    )
  assert len(examples) == len(originals) == 3
  for original, example in zip(originals, examples, strict=True):
    expected = prefix.get(name, 'summarize: ') + original[source].decode()
    assert example['inputs_pretokenized'].decode() == expected
    assert example['targets_pretokenized'] == original[target]
    assert example['inputs'].tolist() == [*vocabulary.encode(expected)[:7], 1]


@pytest.mark.parametrize('name', TEXTS)
def test_the_version_is_the_newest_of_the_installed_builders(name, tmp_path):
  pinned = benchmarks.BENCHMARKS[name].tfds_name
  data_set, version = pinned.split(':')
  builder = tfds.builder(data_set, data_dir=str(tmp_path))
  assert str(builder.version) == version
  assert f'{builder.info.full_name}'.replace('/' + version, '') == data_set


# --- Scores, by seqio's Evaluator -----------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'raw', 'prediction', 'expected'),
  [
    (
      'cnn_dailymail',
      {'article': 'a', 'highlights': 'the dog runs .\nthe cat sits .'},
      'the cat sits . the dog runs .',
      # 4 of 5 word pairs.
      {'rouge1': 100, 'rouge2': 80, 'rougeLsum': 100},
    ),
    ('wmt14_en_de', {'en': 'a', 'de': 'a b c d e'}, 'a b c d e', {'bleu': 100}),
    ('trivia_qa', SUNSET, 'the sunset blvd', {'em': 100, 'f1': 100}),
  ],
)
def test_scores_of_decoded_tokens(name, raw, prediction, expected, vocabulary):
  benchmarks.task(name, vocabulary)
  scores = seqio.test_utils.test_postprocessing(
    name, {'validation': raw}, predict_output=[prediction], sequence_length=LENGTHS
  )
  assert {key: scores[key] for key in expected} == pytest.approx(expected)
  assert ('bleu_signature' in scores) == (name == 'wmt14_en_de')


# --- Vocabulary and folder ------------------------------------------------------------


@pytest.mark.parametrize('name', TEXTS)
def test_as_registered_at_import(name):
  task = seqio.TaskRegistry.get(name)
  assert set(task.output_features) == {'inputs', 'targets'}
  for feature in task.output_features.values():
    assert feature.vocabulary == t5.data.get_default_vocabulary()
    assert feature.vocabulary.sentencepiece_model_file == T5_PATH
    assert feature.vocabulary.extra_ids == 100
    assert feature.add_eos
  assert task.splits == ('train', 'validation', 'test')
  assert task.source.tfds_dataset.data_dir is None


def test_errors_say_what_to_do(tmp_path):
  with pytest.raises(
    ValueError, match="named 'c4'; choose one of cnn_dailymail, arxiv"
  ):
    benchmarks.task('c4')
  benchmarks.task('pubmed', data_dir=str(tmp_path))
  message = (
    rf'task pubmed: there is no test split in {tmp_path}/scientific_papers/pubmed/1.1.1'
    r'. .* python -m gqa_t5x.data.prepare pubmed --data_dir=FOLDER, .* DATA_DIR'
  )
  with pytest.raises(ValueError, match=message):
    seqio.TaskRegistry.get('pubmed').get_dataset(
      LENGTHS, 'test', shard_info=seqio.ShardInfo(0, 1)
    )
