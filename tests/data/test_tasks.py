"""The offline corpus: its vocabulary, span corruption and summarization."""

import copy
import itertools
import pathlib
import pickle

import pytest
import seqio
import tensorflow as tf

from gqa_t5x.data import benchmarks, metrics, tasks
from gqa_t5x.data import corpus as corpus_lib
from gqa_t5x.data import vocabulary as vocabulary_lib

TINY = corpus_lib.Corpus('tiny', ('topics', 'asyncio', 'email', 'logging', 'unittest'))
TASK, SUMMARIZE = 'tiny_span_corruption', 'tiny_summarize'
REVERSAL = 'tiny_reversal'
LENGTHS = {'inputs': 128, 'targets': 32}
EXTRA_IDS = 100
LAST_ID = 4095

TEXTS = [
  'Return the value.',
  'Lines:\n\n  indented\n    more\n',
  'double  and    fourfold spaces, trailing too  ',
  'naïve café, ﬁ ½ …, Ελληνικά, 日本語, 🙂\u00a0!',
  'tab\tbell\x07',
  ">>> f(x)[0] = {'a': 1}  # comment",
  '\n',
]


@pytest.fixture(scope='module')
def task(tmp_path_factory):
  """The registered task of a tiny corpus in a cache of this file's own.

  The tasks of summaries and of reversals are registered, too.
  """
  with pytest.MonkeyPatch.context() as monkeypatch:
    cache = tmp_path_factory.mktemp('cache') / 'not_there_yet'
    monkeypatch.setenv('GQA_T5X_CACHE', str(cache))
    task = tasks.add_span_corruption(TASK, TINY)
    tasks.add_summarize(SUMMARIZE, TINY)
    tasks.add_reversal(REVERSAL, TINY)
    assert not cache.exists()  # Registering builds nothing.
    yield task
    for name in (TASK, SUMMARIZE, REVERSAL):
      seqio.TaskRegistry.remove(name)


@pytest.fixture(scope='module')
def vocabulary(task):
  return vocabulary_lib.CorpusVocabulary(TINY)


def test_vocabulary_ids(vocabulary):
  assert vocabulary.vocab_size == LAST_ID + 1
  assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
  assert vocabulary.bos_id == -1
  assert vocabulary.extra_ids == EXTRA_IDS
  assert vocabulary.encode('<extra_id_0> <extra_id_1>') == [LAST_ID, LAST_ID - 1]
  assert vocabulary.encode('<extra_id_99>') == [LAST_ID - 99]


@pytest.mark.parametrize('text', TEXTS)
def test_vocabulary_round_trips(vocabulary, text):
  ids = vocabulary.encode(text)
  assert vocabulary.decode(ids) == text
  # TensorFlow's tokenizer may cut elsewhere where two cuts are equally likely.
  ids_tf = vocabulary.encode_tf(tf.constant(text))
  assert vocabulary.decode_tf(ids_tf).numpy().decode() == text
  assert len(ids_tf) == len(ids)
  assert not {0, 1, 2} & {*ids, *ids_tf.numpy().tolist()}


def test_vocabulary_round_trips_the_corpus(vocabulary):
  texts = list(corpus_lib.read(TINY, 'validation'))
  ids = [vocabulary.encode(text) for text in texts]
  assert [vocabulary.decode(i) for i in ids] == texts
  assert sum(map(len, texts)) > 2.5 * sum(map(len, ids))


def test_vocabulary_training_is_deterministic(vocabulary):
  with open(vocabulary_lib.ensure(TINY), 'rb') as file:
    assert file.read() == vocabulary_lib._train(TINY)


def test_model_and_task_have_the_same_vocabulary(task, vocabulary):
  for feature in task.output_features.values():
    assert feature.vocabulary == vocabulary
  untrained = vocabulary_lib.CorpusVocabulary(TINY)
  vocabulary.load_model()
  assert untrained == vocabulary
  assert copy.deepcopy(vocabulary) == vocabulary
  assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary
  other = corpus_lib.Corpus('other', TINY.sources)
  assert vocabulary_lib.CorpusVocabulary(other) != vocabulary


def test_registered_tasks_have_the_vocabulary_of_the_model(monkeypatch):
  features = seqio.get_mixture_or_task('pydocs_span_corruption').output_features
  path = pathlib.Path(features['targets'].vocabulary.sentencepiece_model_file)
  monkeypatch.setenv('GQA_T5X_CACHE', str(path.parents[1]))  # as at the import
  for corpus in corpus_lib.CORPORA:
    given = vocabulary_lib.pydocs_vocabulary(corpus)
    for name in (f'{corpus}_span_corruption', f'{corpus}_summarize'):
      task = seqio.get_mixture_or_task(name)
      assert task.splits == ('train', 'validation', 'test')
      assert {f.vocabulary == given for f in task.output_features.values()} == {True}
    assert task.metric_fns == [metrics.rouge]
  assert given != vocabulary_lib.pydocs_vocabulary()
  # The papers' tasks are registered, too.
  assert tasks.gqa_t5x.data.benchmarks is benchmarks
  with pytest.raises(ValueError, match="named 'c4'; choose one of pydocs, pydocs_std"):
    vocabulary_lib.pydocs_vocabulary('c4')


def _uncorrupt(inputs, targets):
  """Puts the spans of the targets where the inputs have their sentinels."""
  assert inputs[-1] == targets[-1] == 1
  sentinels = [i for i in inputs if i > LAST_ID - EXTRA_IDS]
  assert sentinels == list(range(LAST_ID, LAST_ID - len(sentinels), -1))
  assert [i for i in targets if i > LAST_ID - EXTRA_IDS] == sentinels
  assert targets[0] == LAST_ID
  spans = {}
  for token in targets[:-1]:
    if token in sentinels:
      span = spans[token] = []
    else:
      span.append(token)
  return [t for token in inputs[:-1] for t in spans.get(token, [token])]


def test_reversal_of_the_beginning_of_a_text(task, vocabulary):
  lengths = {'inputs': 20, 'targets': 16}
  dataset = seqio.get_mixture_or_task(REVERSAL).get_dataset(
    lengths, 'validation', shuffle=False
  )
  texts = corpus_lib.read(TINY, 'validation')
  for example, text in zip(dataset.as_numpy_iterator(), texts, strict=True):
    ids = vocabulary.encode_tf(tf.constant(text)).numpy().tolist()[:15]
    assert example['inputs'].tolist() == [*ids, 1]
    assert example['targets'].tolist() == [*ids[::-1], 1]


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_inputs_and_targets_hold_the_whole_text(task, vocabulary, split):
  dataset = task.get_dataset(LENGTHS, split, shuffle=False, seed=42)
  examples, again = (list(dataset.as_numpy_iterator()) for _ in range(2))
  for example, same in zip(examples, again, strict=True):
    assert example['inputs'].tolist() == same['inputs'].tolist()
  tokens = [_uncorrupt(e['inputs'].tolist(), e['targets'].tolist()) for e in examples]
  texts = [vocabulary.encode_tf(text) for text in corpus_lib.read(TINY, split)]
  assert list(itertools.chain(*tokens)) == tf.concat(texts, 0).numpy().tolist()
  # T5's lengths: 128 inputs of 15% noise in spans of 3 come from 141 tokens.
  assert {len(t) for t in tokens[:-1]} == {141}
  assert {len(e['inputs']) for e in examples[:-1]} == {128}
  assert {len(e['targets']) for e in examples[:-1]} == {29}


@pytest.mark.parametrize('damage', [b'', b'not a model', None])
def test_a_damaged_vocabulary_is_named(tmp_path, monkeypatch, vocabulary, damage):
  vocabulary.load_model()
  model = vocabulary_lib.ensure(TINY)
  monkeypatch.setenv('GQA_T5X_CACHE', str(tmp_path))
  folder = corpus_lib.ensure(corpus_lib.Corpus('json', ('json', 'asyncio', 'email')))
  with open(model, 'rb') as file:
    half = file.read()[:30_000]
  path = folder / vocabulary_lib.FILE
  path.write_bytes(half if damage is None else damage)
  damaged = vocabulary_lib.CorpusVocabulary(
    corpus_lib.Corpus('json', ('json', 'asyncio', 'email'))
  )
  for _ in range(2):
    with pytest.raises(ValueError, match=rf'{path} is damaged.*Delete it'):
      damaged.load_model()


def test_a_corpus_too_small_for_the_vocabulary_is_named(tmp_path, monkeypatch):
  monkeypatch.setenv('GQA_T5X_CACHE', str(tmp_path))
  small = corpus_lib.Corpus('small', ('json', 'email'))
  with pytest.raises(ValueError, match=r"'small'.* characters are too few"):
    vocabulary_lib.ensure(small)
  assert not (small.folder / vocabulary_lib.FILE).exists()


# --- Summarization ---

BODY = ' '.join(['The body says at length what it does.'] * 3)


@pytest.mark.parametrize(
  ('text', 'pair'),
  [
    (f'Return the value of x.\n\n{BODY}\n', ('Return the value of x.', BODY)),
    # Line breaks and empty lines of the body stay.
    (
      f'Grüße an alle, naïvement.\n\n\n  {BODY}\n\nArgs:\n  x: one.\n',
      ('Grüße an alle, naïvement.', f'{BODY}\n\nArgs:\n  x: one.'),
    ),
    # No summary of one line, no period, too short, no body, a short body.
    (f'Return the value\nof x and of y.\n\n{BODY}', None),
    (f'Return the value of x\n\n{BODY}', None),
    (f'Return the value.\n\n{BODY}', None),
    ('Return the value of x, and of nothing else but x.', None),
    ('Return the value of x.\n\nThe value.', None),
    (f'\n\n{BODY}', None),
    ('', None),
  ],
)
def test_pairs(text, pair):
  dataset = tf.data.Dataset.from_tensor_slices({'text': [text]})
  found = [
    (example['summary'].decode(), example['article'].decode())
    for example in tasks.split_summary(dataset).as_numpy_iterator()
  ]
  assert found == ([pair] if pair else [])


def test_summaries_are_those_of_the_split(task, vocabulary):
  dataset = seqio.TaskRegistry.get(SUMMARIZE).get_dataset(
    {'inputs': 48, 'targets': 24}, 'validation', shuffle=False
  )
  examples = list(dataset.as_numpy_iterator())
  expected = []
  for text in corpus_lib.read(TINY, 'validation'):
    summary, _, body = (part.strip() for part in text.partition('\n\n'))
    one_line = '\n' not in summary and summary.endswith('.')
    if one_line and len(summary.encode()) >= 20 and len(body.encode()) >= 80:
      expected.append((summary, body))
  assert len(examples) == len(expected) > 5
  for example, (summary, body) in zip(examples, expected, strict=True):
    inputs, targets = example['inputs'], example['targets']
    assert len(inputs) <= 48
    assert len(targets) <= 24
    assert inputs[-1] == targets[-1] == 1
    assert f'summarize: {body}'.startswith(vocabulary.decode(inputs[:-1].tolist()))
    assert summary.startswith(vocabulary.decode(targets[:-1].tolist()))
    assert example['targets_pretokenized'].decode() == summary
  assert any(len(example['inputs']) == 48 for example in examples)
