"""Summarization of docstrings: the pairs, the task, and its gin file."""

import pytest
import seqio
import tensorflow as tf

import gin
from gqa_t5x.data import corpus as corpus_lib
from gqa_t5x.data import metrics, tasks
from helpers import gin_cases

BODY = ' '.join(['The body says at length what it does.'] * 3)
TINY = corpus_lib.Corpus('tiny', ('topics', 'asyncio', 'email', 'logging', 'unittest'))
NAME = 'tiny_summarize'


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


@pytest.fixture(scope='module')
def task(tmp_path_factory):
  """The task on a tiny corpus in a cache of this file's own."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setenv('GQA_T5X_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield tasks.add_summarize(NAME, TINY)
    seqio.TaskRegistry.remove(NAME)


def test_examples_are_the_texts_of_the_split(task):
  lengths = {'inputs': 48, 'targets': 24}
  vocabulary = task.output_features['targets'].vocabulary
  examples = list(
    task.get_dataset(lengths, 'validation', shuffle=False).as_numpy_iterator()
  )
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


def test_the_registered_tasks():
  for name in corpus_lib.CORPORA:
    task = seqio.TaskRegistry.get(f'{name}_summarize')
    assert task.metric_fns == [metrics.rouge]
    assert task.splits == ('train', 'validation', 'test')
    trained = seqio.TaskRegistry.get(f'{name}_span_corruption')
    vocabularies = [t.output_features['targets'].vocabulary for t in (task, trained)]
    assert vocabularies[0] == vocabularies[1]


def test_fine_tuning_from_gin():
  given = {
    'INITIAL_CHECKPOINT_PATH': 'gs://bucket/checkpoint_2400',
    'MODEL_DIR': 'gs://bucket/out',
  }
  with gin_cases.parsed(['gin/local/finetune.gin'], given) as arguments_of:
    found = arguments_of('train')
    metric = gin.query_parameter('METRIC/macro.value')
    schedule = gin.query_parameter('gqa_t5x.training.trainer.Trainer.learning_rate_fn')
    rates = [float(schedule.scoped_configurable_fn()(s)) for s in (2401, 3601, 4800)]
  assert found['total_steps'] == 2400 + 2400
  data = found['infer_eval_dataset_cfg']
  assert data.mixture_or_task_name == 'pydocs_summarize'
  assert (data.split, data.pack) == ('validation', False)
  assert metric == 'rouge1'
  # From 0.03, half of it half-way, to nothing at the end.
  assert rates == pytest.approx([0.03, 0.015, 0.0], abs=1e-6)
