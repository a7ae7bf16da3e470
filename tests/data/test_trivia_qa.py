"""TriviaQA from TFDS's own records: which questions there are, and what is cut."""

import pytest
import seqio
from etils import epath
from tensorflow_datasets.datasets.trivia_qa import trivia_qa_dataset_builder

from gqa_t5x.data import benchmarks

LONG = 'word ' * 50_000


def question(key: str, pages=('Page.',), results=0, answers=('Red', 'red one')) -> dict:
  """An example with all features of the builder."""
  return {
    'question': f'Question {key}?',
    'question_id': key,
    'question_source': 'http://www.triviacountry.com/',
    'entity_pages': {
      'doc_source': ['TagMe'] * len(pages),
      'filename': [f'{i}.txt' for i in range(len(pages))],
      'title': [f'Title {i}' for i in range(len(pages))],
      'wiki_context': list(pages),
    },
    'search_results': {
      **{name: [f'{name} text'] * results for name in ('description', 'filename')},
      **{name: [f'{name} text'] * results for name in ('title', 'url')},
      'search_context': ['not to be read'] * results,
      'rank': list(range(results)),
    },
    'answer': {
      'aliases': list(answers),
      'normalized_aliases': [answer.lower() for answer in answers],
      'matched_wiki_entity_name': '',
      'normalized_matched_wiki_entity_name': '',
      'normalized_value': 'red',
      'type': 'WikipediaEntity',
      'value': answers[0] if answers else '<unk>',
    },
  }


# As TFDS mixes the files: domain and question -> example.
VALIDATION = {
  'web/a': question('a', results=2),
  'wikipedia/a': question('a'),
  'verified/a': question('a'),
  'web/b': question('b', pages=(), results=1),
  'wikipedia/c': question('c', pages=('One.', 'Two\n\nthree.')),
  # A question of the Web domain whose search results are all missing.
  'web/c': question('c', pages=('One.', 'Two\n\nthree.')),
  'wikipedia/d': question('d', pages=()),
  'wikipedia/e': question('e', pages=(LONG, LONG), answers=('Not in the page',)),
}
CONTEXTS = {
  'a': 'Title 0 Page.',
  'c': 'Title 0 One. Title 1 Two\n\nthree.',
  'd': '',
  'e': f'Title 0 {LONG} Title 1 {LONG}',
}
TEST = {'wikipedia/t': question('t', answers=())}


class TriviaQa(trivia_qa_dataset_builder.Builder, skip_registration=True):
  """TFDS's builder with examples of this file."""

  code_path = None  # there are no downloads, nor checksums of them
  pkg_dir_path = epath.Path(trivia_qa_dataset_builder.__file__).parent

  def _split_generators(self, dl_manager):
    splits = {'train': VALIDATION, 'validation': VALIDATION, 'test': TEST}
    return {split: iter(examples.items()) for split, examples in splits.items()}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """The task, on records that the builder wrote."""
  folder = str(tmp_path_factory.mktemp('tfds'))
  TriviaQa(config='rc', data_dir=folder).download_and_prepare()
  benchmarks.task('trivia_qa', seqio.ByteVocabulary(), folder)
  yield seqio.TaskRegistry.get('trivia_qa')
  benchmarks.task('trivia_qa')


def texts(task, split='validation', **kwargs) -> list[tuple[str, str]]:
  dataset = task.get_dataset(split=split, shuffle=False, **kwargs)
  return [
    (e['inputs_pretokenized'].decode(), e['targets_pretokenized'].decode())
    for e in dataset.as_numpy_iterator()
  ]


def test_each_question_of_the_wikipedia_domain_is_there_once(prepared):
  found = texts(prepared)
  assert sorted(found) == sorted(
    (
      f'question: Question {key}? context: {context}',
      'Not in the page' if key == 'e' else 'Red',
    )
    for key, context in CONTEXTS.items()
  )
  assert texts(prepared, num_epochs=3) == 3 * found


def test_only_the_end_of_the_evidence_is_cut(prepared):
  lengths = {'inputs': 64, 'targets': 8}
  examples = prepared.get_dataset(lengths, 'validation', shuffle=False)
  cut = {}
  for example in examples.as_numpy_iterator():
    text = example['inputs_pretokenized'].decode()
    tokens = example['inputs'].tolist()
    assert len(tokens) <= 64
    assert tokens[-1] == 1
    assert bytes(token - 3 for token in tokens[:-1]) == text.encode()[:63]
    cut[text[19]] = text
  assert set(cut) == set(CONTEXTS)
  start = 'question: Question e? context: Title 0 '
  assert cut['e'] == (start + LONG)[: 64 * 16]


def test_search_results_are_not_decoded(prepared):
  spec = prepared.source.get_dataset('validation').element_spec
  assert set(spec['search_results']) == {'rank'}
  assert set(spec['entity_pages']) == {'title', 'wiki_context'}


def evaluate(split: str, predict_fn) -> dict[str, float]:
  evaluator = seqio.Evaluator(
    'trivia_qa',
    seqio.EncDecFeatureConverter(pack=False),
    split,
    sequence_length={'inputs': 64, 'targets': 8},
  )
  scores, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict_fn)
  return scores.result()['trivia_qa']


def test_all_aliases_count_and_targets_are_whole(prepared):
  """The target "Not in the page" is longer than its 8 tokens."""
  answers = {'a': b'RED ONE', 'c': b'red', 'd': b'one', 'e': b'in page'}

  def predict(dataset):
    for i, example in dataset.as_numpy_iterator():
      key = chr(example['encoder_input_tokens'][19] - 3)
      tokens = [3 + byte for byte in answers[key]]
      yield int(i), tokens + [0] * (8 - len(tokens))

  # Two equal answers; "one" is half of "red one"; "in page" is 2 of "not in page".
  expected = {'em': 50, 'f1': (100 + 100 + 200 / 3 + 80) / 4}
  assert evaluate('validation', predict) == pytest.approx(expected)


def test_the_test_split_has_no_answers(prepared):
  assert texts(prepared, 'test') == [
    ('question: Question t? context: Title 0 Page.', '<unk>')
  ]
