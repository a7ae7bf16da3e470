"""The gin files of tasks: the paper's values, and what a user may change."""

import pathlib

import pytest
import seqio
from t5x import utils

import gin
from gqa_t5x.data import benchmarks
from helpers import commands

T5_PATH = 'gs://t5-data/vocabs/cc_all.32000/sentencepiece.model'
C4 = 'c4_v220_span_corruption'
VOCABULARY_FILE = 'gs://bucket/wmt.model'
# Section 3.1 of GQA and section 4 of Shazeer: file -> task, lengths, dev score.
TASKS = {
  'cnn_dailymail': ('cnn_dailymail', 512, 256, 'rouge1'),
  'arxiv': ('arxiv', 2048, 512, 'rouge1'),
  'pubmed': ('pubmed', 2048, 512, 'rouge1'),
  'mediasum': ('mediasum', 2048, 512, 'rouge1'),
  'multi_news': ('multi_news', 2048, 512, 'rouge1'),
  'wmt14_en_de': ('wmt14_en_de', 512, 256, 'bleu'),
  'trivia_qa': ('trivia_qa', 2048, 32, 'f1'),
  'wmt14_en_de_shazeer': ('wmt14_en_de_shazeer', 256, 256, 'bleu'),
  'c4_span_corruption': (C4, 512, 114, None),
}
# Tested with the corpus.
OTHERS = {'benchmark', 'pydocs_summarize'}


@pytest.fixture(autouse=True)
def registered_as_at_import():
  """Gives the tasks their own vocabulary and folder back after each test."""
  yield
  for name in benchmarks.BENCHMARKS:
    benchmarks.task(name)


def train_arguments(file, bindings=(), more_files=()):
  """What t5x.train gets from model, task and run, in that order, and the metric."""
  if file == 'wmt14_en_de_shazeer':
    bindings = [f"VOCABULARY_FILE = '{VOCABULARY_FILE}'", *bindings]
  files = [
    'gin/models/t5_1_1_tiny.gin',
    *more_files,
    f'gin/tasks/{file}.gin',
    'gin/runs/pretrain.gin',
  ]
  bindings = ["MODEL_DIR = 'gs://bucket/out'", *bindings]
  with commands.gin_config(files, bindings) as arguments_of:
    return arguments_of('train'), gin.query_parameter('METRIC/gin.macro.value')


def test_every_file_has_a_row():
  files = pathlib.Path(commands.ROOT, 'gin', 'tasks').glob('*.gin')
  assert {path.stem for path in files} == set(TASKS) | OTHERS


@pytest.mark.parametrize('file', TASKS)
def test_values_are_the_papers(file):
  name, inputs, targets, metric = TASKS[file]
  arguments, chosen = train_arguments(file)
  model = arguments['model']
  assert chosen == metric
  for data in (arguments['train_dataset_cfg'], arguments['train_eval_dataset_cfg']):
    assert data.mixture_or_task_name == name
    assert data.task_feature_lengths == {'inputs': inputs, 'targets': targets}
  task = seqio.get_mixture_or_task(name)
  if metric:
    (score,) = task.metric_fns
    assert metric in score([['a']] if metric == 'f1' else ['a'], ['a'])
  utils.verify_matching_vocabs(data, model)
  vocabulary = utils.get_vocabulary(data)[1]
  assert vocabulary == model.output_vocabulary
  shazeer = file == 'wmt14_en_de_shazeer'
  path, extra_ids = (VOCABULARY_FILE, 0) if shazeer else (T5_PATH, 100)
  assert vocabulary.sentencepiece_model_file == path
  assert vocabulary.extra_ids == extra_ids
  size = 32768 if shazeer else 32128
  assert model.module.config.vocab_size == size


def test_another_vocabulary_and_folder(tmp_path):
  (tmp_path / 'mine.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    'import seqio\n'
    'VOCABULARY = @seqio.ByteVocabulary()\n'
    'seqio.ByteVocabulary.extra_ids = 7\n'
    'VOCAB_SIZE = 384\n'
  )
  arguments, _ = train_arguments(
    'trivia_qa',
    ["DATA_DIR = 'gs://bucket/tfds'"],
    more_files=[str(tmp_path / 'mine.gin')],
  )
  model, data = arguments['model'], arguments['train_dataset_cfg']
  assert data.mixture_or_task_name == 'trivia_qa'
  utils.verify_matching_vocabs(data, model)
  assert utils.get_vocabulary(data)[0] == seqio.ByteVocabulary(7)
  task = seqio.TaskRegistry.get('trivia_qa')
  assert task.source.tfds_dataset.data_dir == 'gs://bucket/tfds'
  # The next run in this process is T5's again.
  train_arguments('trivia_qa')
  assert task is not seqio.TaskRegistry.get('trivia_qa')
  assert seqio.TaskRegistry.get('trivia_qa').source.tfds_dataset.data_dir is None


def test_shazeers_task_asks_for_its_vocabulary():
  files = [f'gin/{f}.gin' for f in ('models/t5_1_1_tiny', 'runs/pretrain')]
  files.insert(1, 'gin/tasks/wmt14_en_de_shazeer.gin')
  with pytest.raises((ValueError, RuntimeError), match='VOCABULARY_FILE'):
    with commands.gin_config(files, ["MODEL_DIR = 'out'"]) as arguments_of:
      arguments_of('train')
