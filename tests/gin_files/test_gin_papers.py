"""Every experiment of the papers, composed of gin files: what reaches the engine."""

import pytest
import seqio
from jax.sharding import PartitionSpec
from t5x import utils

import gin
from gqa_t5x.model import network
from gqa_t5x.training import partitioning
from helpers import commands, gin_cases
from helpers.gin_cases import C4, CNN, START, TRAIN, WMT

T5_PATH = 'gs://t5-data/vocabs/cc_all.32000/sentencepiece.model'
BY_2D = (['gin/partitioning/2d.gin'], {'MODEL_PARTITIONS': 8})
# Model of table 1 -> size, K, further files and values.
MODELS = {
  'MHA-Large': ('large', None, [], {}),
  'MHA-XXL': ('xxl', None, *BY_2D),
  'MQA-XXL': ('xxl', 1, *BY_2D),
  'GQA-8-XXL': ('xxl', 8, *BY_2D),
}
# Task -> input and output length, and the metric.
TASKS = {
  'cnn_dailymail': (512, 256, 'rouge1'),
  'arxiv': (2048, 512, 'rouge1'),
  'pubmed': (2048, 512, 'rouge1'),
  'mediasum': (2048, 512, 'rouge1'),
  'multi_news': (2048, 512, 'rouge1'),
  'wmt14_en_de': (512, 256, 'bleu'),
  'trivia_qa': (2048, 32, 'f1'),
}
# Every model on one task, every task with one model.
GQA8, MQA = 'gin/uptrain_gqa8.gin', 'gin/uptrain_mqa.gin'
CELLS = [(model, 'arxiv') for model in MODELS]
CELLS += [('GQA-8-XXL', task) for task in TASKS if task != 'arxiv']


def cell(model: str, task: str, run: str) -> tuple[list[str], dict]:
  """Files and values of a cell of table 1."""
  size, K, more, values = MODELS[model]
  files = gin_cases.files(f't5_1_1_{size}', f'gin/tasks/{task}.gin', run, *more)
  return files, values | ({} if K is None else {'NUM_KV_HEADS': K})


def check_model(arguments, size: str, K: int | None, **more) -> None:
  """Compares the model with a published size; its parameters: test_network.py."""
  expected = network.config(size, num_kv_heads=K, dtype='bfloat16', **more)
  assert arguments['model'].module.config == expected


def macro(name: str):
  return gin.query_parameter(f'{name}/macro.value')


def schedule():
  """The learning rate by step that the trainer gets."""
  bound = gin.query_parameter('gqa_t5x.training.trainer.Trainer.learning_rate_fn')
  return bound.scoped_configurable_fn()


# --- Table 1 ------------------------------------------------------------------


@pytest.mark.parametrize(('model', 'task'), CELLS)
def test_fine_tuning_is_the_papers(model, task):
  files, values = cell(model, task, 'finetune')
  inputs, outputs, metric = TASKS[task]
  with gin_cases.parsed(files, values | TRAIN | START) as arguments_of:
    arguments = arguments_of('train')
    rate = schedule()
    assert [float(rate(step)) for step in (1_000_000, 1_050_000)] == (
      pytest.approx([0.001, 0.001])
    )
  check_model(arguments, *MODELS[model][:2], dropout_rate=0.1)
  train, dev = (arguments[f'{name}_dataset_cfg'] for name in ('train', 'infer_eval'))
  for data, split, packed in ((train, 'train', True), (dev, 'validation', False)):
    assert data.mixture_or_task_name == task
    assert data.task_feature_lengths == {'inputs': inputs, 'targets': outputs}
    assert (data.batch_size, data.pack, data.split) == (128, packed, split)
  assert arguments['model']._loss_normalizing_factor == 233472
  assert arguments['model'].decode_fn.__name__ == 'greedy'
  assert arguments['total_steps'] == 1_050_000
  assert arguments['checkpoint_cfg'].save.keep is None
  assert arguments['checkpoint_cfg'].restore.path == 'gs://bucket/checkpoint_1000000'
  utils.verify_matching_vocabs(train, arguments['model'])
  vocabulary = arguments['model'].output_vocabulary
  assert (vocabulary.sentencepiece_model_file, vocabulary.extra_ids) == (T5_PATH, 100)
  (score,) = seqio.get_mixture_or_task(task).metric_fns
  assert metric in score([['a']] if metric == 'f1' else ['a'], ['a'])


@pytest.mark.parametrize(
  ('model', 'task', 'run'), [(*c, run) for c in CELLS for run in ('eval', 'infer')]
)
def test_evaluation_and_inference_are_the_papers(model, task, run):
  files, values = cell(model, task, run)
  name, _, required = gin_cases.RUNS[run]
  inputs, outputs, metric = TASKS[task]
  with gin_cases.parsed(files, values | required) as arguments_of:
    arguments = arguments_of(name)
    assert macro('METRIC') == metric
  check_model(arguments, *MODELS[model][:2])
  data = arguments['dataset_cfg']
  assert data.mixture_or_task_name == task
  assert data.task_feature_lengths == {'inputs': inputs, 'targets': outputs}
  assert (data.batch_size, data.pack, data.split) == (32, False, 'validation')
  assert arguments['model'].decode_fn.__name__ == 'greedy'
  ((_, path),) = arguments_of.checked
  assert path == arguments['restore_checkpoint_cfg'].path


def test_the_best_checkpoint_is_of_a_folder_that_is_given():
  files = gin_cases.files('t5_1_1_tiny', CNN, 'eval', 'gin/runs/best_checkpoint.gin')
  with pytest.raises(ValueError, match=r'^MODEL_DIR/macro.value set to'):
    with gin_cases.parsed(files, {'EVAL_OUTPUT_DIR': 'gs://bucket/out'}):
      pass


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    ({'FINETUNE_STEPS': 300}, 1_000_300),
    ({'TRAIN_STEPS': 1_100_000}, 1_100_000),
    ({'INITIAL_CHECKPOINT_PATH': 'gs://b/checkpoint_7/', 'FINETUNE_STEPS': 3}, 10),
    ({'INITIAL_CHECKPOINT_PATH': 'gs://b/hugging_face', 'TRAIN_STEPS': 9}, 9),
  ],
)
def test_fine_tuning_ends_so_many_steps_after_its_checkpoint(given, expected):
  files = gin_cases.files('t5_1_1_large', CNN, 'finetune')
  with gin_cases.parsed(files, TRAIN | START | given) as arguments_of:
    assert arguments_of('train')['total_steps'] == expected


# --- Uptraining, figures 4 and 5 ----------------------------------------------


def test_uptraining_is_the_papers():
  with gin_cases.parsed(['gin/uptrain_gqa8.gin'], TRAIN | START) as arguments_of:
    paper = arguments_of('train')
    rate = schedule()
    rates = {0: 0.01, 10_000: 0.01, 40_000: 0.005, 1_000_000: 0.001}
    assert {step: float(rate(step)) for step in rates} == pytest.approx(rates)
    assert 2048 % macro('NUM_MICROBATCHES') == 0
  check_model(paper, 'xxl', 8, remat_policy='full')
  optimizer = paper['model'].optimizer_def
  assert type(optimizer).__name__ == 'Adafactor'
  assert optimizer.hyper_params.decay_rate == 0.8
  assert optimizer.hyper_params.step_offset == 0
  assert paper['model']._loss_normalizing_factor == 2048 * 114 == 233472
  assert paper['model']._z_loss == 1e-4
  assert paper['model']._label_smoothing == 0.0
  train, evaluation = paper['train_dataset_cfg'], paper['train_eval_dataset_cfg']
  for data, split in ((train, 'train'), (evaluation, 'validation')):
    assert data.mixture_or_task_name == 'c4_v220_span_corruption'
    assert data.task_feature_lengths == {'inputs': 512, 'targets': 114}
    assert (data.batch_size, data.pack, data.split) == (2048, True, split)
  assert train.shuffle
  assert paper['total_steps'] == 1_050_000
  assert paper['model_dir'] == 'gs://bucket/out'
  assert paper['run_eval_before_training'] is True
  restore, save = paper['checkpoint_cfg'].restore, paper['checkpoint_cfg'].save
  assert (restore.path, restore.mode) == (START['INITIAL_CHECKPOINT_PATH'], 'specific')
  assert (save.period, paper['eval_period']) == (1000, 1000)
  assert save.save_dataset


@pytest.mark.parametrize(
  ('size', 'K'), [('large', 1), ('large', 8), ('xxl', 1), ('xxl', 8)]
)
def test_uptraining_to_all_alphas_by_composition(size, K):
  """0.01, 0.02, 0.05 and 0.1 are steps of one run; what differs is the model."""
  with gin_cases.parsed(['gin/uptrain_gqa8.gin'], TRAIN | START) as arguments_of:
    whole = arguments_of('train')
  more, values = BY_2D if size == 'xxl' else ([], {})
  files = gin_cases.files(f't5_1_1_{size}', C4, 'uptrain', *more)
  given = TRAIN | START | values
  given |= {'NUM_KV_HEADS': K, 'TRAIN_STEPS': 1_100_000, 'CHECKPOINT_PERIOD': 10_000}
  with gin_cases.parsed(files, given) as arguments_of:
    composed = arguments_of('train')
    assert float(schedule()(1_000_000)) == pytest.approx(0.001)
  check_model(composed, size, K)
  assert composed['total_steps'] == 1_100_000
  save = composed['checkpoint_cfg'].save
  assert (save.period, save.keep) == (10_000, None)
  for name in ('train_dataset_cfg', 'train_eval_dataset_cfg'):
    assert composed[name] == whole[name]
  assert composed['model']._loss_normalizing_factor == 233472
  assert composed['run_eval_before_training'] is True


@pytest.mark.parametrize(
  ('files', 'values', 'num_partitions', 'row_axis', 'kv_axis', 'kept_rows'),
  [
    ([GQA8], {}, 8, 'data', 'model', 'data'),
    ([GQA8], {'MODEL_PARTITIONS': 16}, 16, 'data', None, ('data', 'model')),
    ([MQA], {}, 8, 'data', None, ('data', 'model')),
    ([MQA], {'KV_SHARDING': 'replicated'}, 8, 'data', None, 'data'),
    (['gin/uptrain_latent512.gin'], {}, 8, 'data', None, ('data', 'model')),
    (*cell('GQA-8-XXL', 'arxiv', 'finetune'), 8, 'data', 'model', 'data'),
    (
      gin_cases.files('shazeer_mqa', WMT, 'translate'),
      gin_cases.VOCABULARY | {'MODEL_PARTITIONS': 2},
      *(2, None, None, ('data', 'model')),
    ),
  ],
)
def test_every_kv_head_stays_whole(
  files, values, num_partitions, row_axis, kv_axis, kept_rows
):
  """8 heads are split over 8 partitions; 1 head is not cut."""
  files = [*files, str(commands.TESTS / 'helpers' / 'shallow.gin')]
  with gin_cases.parsed(files, TRAIN | START | values) as arguments_of:
    arguments = arguments_of('train')
    assert macro('MODEL_PARTITIONS') == num_partitions
    shapes, axes = gin_cases.state_shapes('train', arguments)
  assert shapes.param_states is not None
  assert isinstance(arguments['partitioner'], partitioning.Partitioner)
  rules = dict(reversed(arguments['partitioner'].logical_axis_rules))  # first counts
  assert rules['kv_heads'] == rules['joined_kv_heads'] == kv_axis
  assert rules['cache_batch'] == kept_rows
  assert rules['heads'] == rules['joined_kv'] == 'model'
  is_shazeers = arguments['model'].module.config.encoder_kv == 1
  for stack, kind, axis in (
    ('encoder', 'attention', kv_axis if is_shazeers else 'model'),
    ('decoder', 'self_attention', kv_axis),
    ('decoder', 'encoder_decoder_attention', kv_axis),
  ):
    attention = axes.params[stack]['layers_0'][kind]
    assert attention['query']['kernel'] == PartitionSpec(row_axis, 'model')
    for name in ('key', 'value'):
      assert attention[name]['kernel'] == PartitionSpec(row_axis, axis)


def test_a_submesh_of_a_tpu():
  given = TRAIN | START | {'MODEL_PARALLEL_SUBMESH': (2, 2, 1, 2)}
  with gin_cases.parsed(['gin/uptrain_gqa8.gin'], given) as arguments_of:
    partitioner = arguments_of('train')['partitioner']
  assert partitioner.model_parallel_submesh == (2, 2, 1, 2)


# --- Appendix A, and Shazeer --------------------------------------------------


def test_pre_training_from_scratch_is_t5s():
  files = gin_cases.files('t5_1_1_large', C4, 'pretrain')
  with gin_cases.parsed(files, TRAIN | {'NUM_KV_HEADS': 1}) as arguments_of:
    arguments = arguments_of('train')
    rate = schedule()
  check_model(arguments, 'large', 1)
  rates = {0: 0.01, 10_000: 0.01, 40_000: 0.005}
  assert {step: float(rate(step)) for step in rates} == pytest.approx(rates)
  data = arguments['train_dataset_cfg']
  assert data.task_feature_lengths == {'inputs': 512, 'targets': 114}
  assert (data.batch_size, data.pack) == (2048, True)
  assert arguments['total_steps'] == 1_000_000
  assert arguments['model']._loss_normalizing_factor == 233472
  assert arguments['checkpoint_cfg'].restore.path == []


@pytest.mark.parametrize('model', ['shazeer_mha', 'shazeer_mqa'])
def test_translation_is_shazeers(model):
  files = gin_cases.files(model, WMT, 'translate')
  with gin_cases.parsed(files, TRAIN | gin_cases.VOCABULARY) as arguments_of:
    arguments = arguments_of('train')
    rules = dict(arguments['partitioner'].logical_axis_rules)
    rate = schedule()
    assert float(rate(100_000)) == pytest.approx(100_000**-0.5)
    assert macro('METRIC') == 'bleu'
  check_model(arguments, model, None, dropout_rate=0.1)
  assert arguments['model']._label_smoothing == 0.1
  assert rules['kv_heads'] == 'model'  # of one partition
  train, dev = (arguments[f'{name}_dataset_cfg'] for name in ('train', 'infer_eval'))
  for data, packed in ((train, True), (dev, False)):
    assert data.mixture_or_task_name == 'wmt14_en_de_shazeer'
    assert data.task_feature_lengths == {'inputs': 256, 'targets': 256}
    assert (data.batch_size, data.pack) == (128, packed)
  assert arguments['total_steps'] == 100_000


def test_beams_are_shazeers():
  files = gin_cases.files('shazeer_mqa', WMT, 'eval', 'gin/decoding/beam_search.gin')
  given = gin_cases.EVAL | gin_cases.VOCABULARY
  with gin_cases.parsed(files, given) as arguments_of:
    model = arguments_of('evaluate')['model']
    alpha = gin.query_parameter('gqa_t5x.decoding.beam_search.beam_search.alpha')
    assert str(alpha) == '%BREVITY_PENALTY'
    assert macro('BREVITY_PENALTY') == 0.6
  assert model.decode_fn.__name__ == 'beam_search'
  assert model._default_decoder_params.num_decodes == 4


# --- Tasks --------------------------------------------------------------------


def test_another_vocabulary_and_folder(tmp_path):
  (tmp_path / 'mine.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    'import seqio\n'
    'VOCABULARY = @seqio.ByteVocabulary()\n'
    'seqio.ByteVocabulary.extra_ids = 7\n'
    'VOCAB_SIZE = 384\n'
  )
  files = gin_cases.files('t5_1_1_tiny', 'gin/tasks/trivia_qa.gin', 'pretrain')
  mine = [files[0], str(tmp_path / 'mine.gin'), *files[1:]]
  with gin_cases.parsed(mine, TRAIN | {'DATA_DIR': 'gs://bucket/tfds'}) as arguments_of:
    arguments = arguments_of('train')
    data = arguments['train_dataset_cfg']
    utils.verify_matching_vocabs(data, arguments['model'])
    assert utils.get_vocabulary(data)[0] == seqio.ByteVocabulary(7)
    source = seqio.TaskRegistry.get('trivia_qa').source
    assert source.tfds_dataset.data_dir == 'gs://bucket/tfds'
  # The next run in this process is T5's again.
  with gin_cases.parsed(files, TRAIN) as arguments_of:
    arguments_of('train')
    assert seqio.TaskRegistry.get('trivia_qa').source.tfds_dataset.data_dir is None


# --- All files ----------------------------------------------------------------


def test_every_task_file_is_tried():
  tasks = {file for file in commands.gin_files() if file.startswith('gin/tasks/')}
  tried = {f'gin/tasks/{task}.gin' for task in TASKS} | {C4, WMT}
  # What tasks include, gin/local/finetune.gin (test_gin.py) and own files
  # (test_gin_own.py).
  names = ('benchmark', 'pydocs_summarize', 'text_files', 'pairs')
  others = {f'gin/tasks/{name}.gin' for name in names}
  assert tasks == tried | others
