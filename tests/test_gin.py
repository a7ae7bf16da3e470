"""Every gin file: parsed, finalised, and its model's shapes worked out (no memory)."""

import functools
import itertools
import pathlib
import subprocess
import sys

import commands
import jax
import jax.numpy as jnp
import pytest
import t5.data.mixtures  # noqa: F401
from t5x import partitioning, utils

import gin
from gqa_t5x import calibrate, models, network
from gqa_t5x.conversion import checkpoint

TRAIN = {'MODEL_DIR': 'gs://bucket/out'}
START = {'INITIAL_CHECKPOINT_PATH': 'gs://bucket/checkpoint_1000000'}
TASK = {'MIXTURE_OR_TASK_NAME': 'c4_v220_span_corruption'}
LENGTHS = {'TASK_FEATURE_LENGTHS': {'inputs': 512, 'targets': 114}}
STEPS = {'TRAIN_STEPS': 1_100_000}
CHECKPOINT = {'CHECKPOINT_PATH': 'gs://bucket/checkpoint_1000000'}
OUTPUT = {'OUTPUT': 'gs://bucket/out'}

# File -> function, what must be given, number of parameters. T5.1.1 as published
# has 11,135,332,352; fewer K/V heads leave out 2 kernels of 4096 x 64 a head in 2
# attention layers of 24 decoder layers: 25,165,824 a head.
RUNNABLE = {
  'gin/uptrain_gqa8.gin': ('train', TRAIN | START, 11_135_332_352 - 56 * 25_165_824),
  'gin/uptrain_mqa.gin': ('train', TRAIN | START, 11_135_332_352 - 63 * 25_165_824),
  'gin/calibrate.gin': ('calibrate', CHECKPOINT | OUTPUT, 11_135_332_352),
  # A head here: 2 kernels of 128 x 16 in 2 attention layers of 4 decoder layers.
  'gin/local/pretrain_mha.gin': ('train', {}, 2_296_576),
  'gin/local/uptrain_mha.gin': ('train', {}, 2_296_576),
  'gin/local/uptrain_gqa2.gin': ('train', {}, 2_296_576 - 6 * 32_768),
  'gin/local/uptrain_mqa.gin': ('train', {}, 2_296_576 - 7 * 32_768),
  'gin/local/calibrate.gin': ('calibrate', CHECKPOINT | OUTPUT, 2_296_576),
  'gin/local/study_pretrain.gin': ('train', {}, 2_296_576),
  'gin/local/study_uptrain.gin': ('train', {}, 2_296_576),
  'gin/local/study_mini_pretrain.gin': ('train', {}, 12_589_568),
  'gin/local/study_mini_uptrain.gin': ('train', {}, 12_589_568),
}
# gin/models/t5_1_1_SIZE.gin, followed by each of gin/runs. Published numbers.
SIZES = {
  'tiny': 9_472_768,
  'mini': 26_941_952,
  'small': 76_961_152,
  'base': 247_577_856,
  'large': 783_150_080,
  'xl': 2_849_757_184,
  'xxl': 11_135_332_352,
}
# Run -> the engine's function, and what must be given.
RUNS = {
  'pretrain': ('train', TRAIN | TASK | LENGTHS | STEPS | {'BATCH_SIZE': 2048}),
  'uptrain': ('train', TRAIN | TASK | LENGTHS | STEPS | START | {'BATCH_SIZE': 2048}),
  'finetune': ('train', TRAIN | TASK | LENGTHS | STEPS | START),
  'eval': ('evaluate', TASK | CHECKPOINT | {'EVAL_OUTPUT_DIR': 'gs://bucket/out'}),
  'infer': (
    'infer',
    TASK | LENGTHS | CHECKPOINT | {'INFER_OUTPUT_DIR': 'gs://bucket/out'},
  ),
  'calibrate': ('calibrate', TASK | LENGTHS | CHECKPOINT | OUTPUT),
}
# Name -> files, function, required values, number of parameters.
CASES = {file: ([file], *row) for file, row in RUNNABLE.items()}
for _size, _run in itertools.product(SIZES, RUNS):
  CASES[f'{_size}-{_run}'] = (
    [f'gin/models/t5_1_1_{_size}.gin', f'gin/runs/{_run}.gin'],
    *RUNS[_run],
    SIZES[_size],
  )
# A way to decode comes after the run.
for _decoding in ('beam_search', 'sample'):
  CASES[f'tiny-infer-{_decoding}'] = (
    [*CASES['tiny-infer'][0], f'gin/decoding/{_decoding}.gin'],
    *RUNS['infer'],
    SIZES['tiny'],
  )


@pytest.fixture(autouse=True)
def calibrate_recorded():
  """Has `commands.gin_config` pass on what gin gives to gqa_t5x.calibrate, too."""

  @functools.wraps(calibrate.calibrate)
  def record(**kwargs):
    return kwargs

  commands.recorders().setdefault('calibrate', record)


@pytest.fixture(autouse=True)
def checked(monkeypatch):
  """No checkpoint is there to be checked; records which ones would have been."""
  found = []
  monkeypatch.setattr(checkpoint, 'list_checkpoints', lambda folder: [])
  monkeypatch.setattr(checkpoint, 'find_checkpoint', lambda path: path)
  monkeypatch.setattr(checkpoint, 'open_checkpoint', lambda path: {})
  monkeypatch.setattr(checkpoint, 'step_is_known', lambda path: True)
  monkeypatch.setattr(
    models, 'check_params', lambda model, params, source: found.append((model, source))
  )
  return found


def bindings(values) -> list[str]:
  return [f'{name} = {value!r}' for name, value in values.items()]


def state_shapes(name: str, arguments):
  """The state's shapes and layout, computed as T5X computes them."""
  model, data = arguments['model'], arguments.get('dataset_cfg')
  data = data or arguments['train_dataset_cfg']
  lengths = data.task_feature_lengths or LENGTHS['TASK_FEATURE_LENGTHS']
  encoder, decoder = (
    (data.batch_size, lengths[feature]) for feature in ('inputs', 'targets')
  )
  inputs = {
    'encoder_input_tokens': encoder,
    'decoder_input_tokens': decoder,
    'decoder_target_tokens': decoder,
  }
  trains = name == 'train'
  initializer = utils.TrainStateInitializer(
    optimizer_def=model.optimizer_def if trains else None,
    init_fn=model.get_initial_variables,
    input_shapes=inputs,
    # T5X gives types in training only.
    input_types=dict.fromkeys(inputs, jnp.int32) if trains else None,
    partitioner=arguments['partitioner'],
  )
  return initializer.global_train_state_shape, initializer.train_state_axes


def count(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def is_runnable(file: str) -> bool:
  """Whether a file alone makes a run: it has a model and what is done with it."""
  included = commands.includes(file)
  return all(
    any(i.startswith(f'gin/{p}/') for i in included) for p in ('models', 'runs')
  )


def test_every_runnable_file_has_a_row():
  assert {file for file in commands.gin_files() if is_runnable(file)} == set(RUNNABLE)


def test_every_size_and_run_is_combined():
  models = pathlib.Path(commands.ROOT, 'gin', 'models').glob('t5_1_1_*.gin')
  assert {path.stem.removeprefix('t5_1_1_') for path in models} == set(SIZES)
  assert set(network.SIZES) == set(SIZES)
  runs = pathlib.Path(commands.ROOT, 'gin', 'runs').glob('*.gin')
  assert {path.stem for path in runs} == {*RUNS, 'train', 'checkpoint'}


def test_every_fragment_is_used():
  roots = {file for files, *_ in CASES.values() for file in files}
  used = roots.union(*map(commands.includes, roots))
  assert set(commands.gin_files()) == used


@pytest.mark.parametrize('case', CASES)
def test_parses_finalises_and_has_the_right_shapes(case, checked):
  files, name, required, expected = CASES[case]
  with commands.gin_config(files, bindings(required)) as arguments_of:
    arguments = arguments_of(name)
    shapes, _ = state_shapes(name, arguments)
  assert count(shapes.params) == expected
  config = arguments['model'].module.config
  kernel = shapes.params['decoder']['layers_0']['encoder_decoder_attention']['key']
  assert kernel['kernel'].shape == (config.emb_dim, config.cross_kv * config.head_dim)
  if name == 'train':
    assert shapes.param_states is not None
    assert arguments['trainer_cls'].__module__ == 'gqa_t5x.trainer'
    assert arguments['checkpoint_cfg'].save.period > 0
    # Otherwise T5X calls the schedule's first warm-up steps anew after each restart.
    assert arguments.get('relative_steps') is None
  else:
    assert arguments['restore_checkpoint_cfg'].path == CHECKPOINT['CHECKPOINT_PATH']
    assert arguments['output' if name == 'calibrate' else 'output_dir'] == (
      'gs://bucket/out'
    )
  # What is restored goes through gqa_t5x.restore, with the run's own model.
  restored = arguments.get('restore_checkpoint_cfg')
  restored = restored or arguments['checkpoint_cfg'].restore
  if restored.path:
    ((model, path),) = checked
    assert path == restored.path
    assert model.module.config == config
  else:
    assert 'pretrain' in case


@pytest.mark.parametrize('case', ['gin/uptrain_gqa8.gin', *(f'tiny-{r}' for r in RUNS)])
def test_what_is_required_is_named(case):
  files, name, required, _ = CASES[case]
  for missing in required:
    given = {k: v for k, v in required.items() if k != missing}
    with pytest.raises((ValueError, RuntimeError), match=rf'\b{missing}\b'):
      with commands.gin_config(files, bindings(given)) as arguments_of:
        arguments_of(name)


@pytest.mark.parametrize(
  'case', [c for c, (_, name, *_) in CASES.items() if name == 'train']
)
def test_task_and_model_agree_on_the_vocabulary(case, monkeypatch):
  def no_files(*args, **kwargs):
    raise AssertionError('a vocabulary is read or built')

  files, name, required, _ = CASES[case]
  with commands.gin_config(files, bindings(required)) as arguments_of:
    arguments = arguments_of(name)
    monkeypatch.setattr('tensorflow.io.gfile.GFile', no_files)
    model, data = arguments['model'], arguments['train_dataset_cfg']
    utils.verify_matching_vocabs(data, model)
    assert utils.get_vocabulary(data)[1] == model.output_vocabulary
    assert gin.query_parameter('VOCAB_SIZE/macro.value') == (
      model.module.config.vocab_size
    )


@pytest.mark.parametrize(
  ('file', 'task', 'lengths'),
  [
    ('gin/calibrate.gin', 'c4_v220', {'inputs': 512, 'targets': 114}),
    ('gin/local/calibrate.gin', 'pydocs', {'inputs': 128, 'targets': 29}),
  ],
)
def test_calibration_is_on_packed_training_data(file, task, lengths):
  with commands.gin_config([file], bindings(CHECKPOINT | OUTPUT)) as arguments_of:
    arguments = arguments_of('calibrate')
  data = arguments['dataset_cfg']
  assert data.mixture_or_task_name == f'{task}_span_corruption'
  assert data.task_feature_lengths == lengths
  assert (data.split, data.pack, data.shuffle) == ('train', True, False)
  assert (arguments['num_sequences'], arguments['include_encoder']) == (512, False)
  utils.verify_matching_vocabs(data, arguments['model'])


# --- The paper's run ----------------------------------------------------------


@pytest.fixture
def paper():
  """What t5x.train gets from gin/uptrain_gqa8.gin, and the bindings in force."""
  with commands.gin_config(
    ['gin/uptrain_gqa8.gin'], bindings(TRAIN | START)
  ) as arguments_of:
    yield arguments_of('train')


def test_uptraining_is_the_papers(paper):
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
  # An Orbax checkpoint without its position in the data could not be resumed.
  assert not save.save_dataset


def test_model_is_the_papers(paper):
  config = paper['model'].module.config
  assert (config.emb_dim, config.mlp_dim) == (4096, 10240)
  assert (config.num_encoder_layers, config.num_decoder_layers) == (24, 24)
  assert (config.num_heads, config.head_dim) == (64, 64)
  assert (config.self_kv, config.cross_kv, config.encoder_kv) == (8, 8, 64)
  assert (config.dropout_rate, config.remat_policy) == (0.0, 'full')
  assert (config.vocab_size, config.dtype) == (32128, 'bfloat16')
  shapes, _ = state_shapes('train', paper)
  attention = {
    ('encoder', 'attention'): 4096,
    ('decoder', 'self_attention'): 512,
    ('decoder', 'encoder_decoder_attention'): 512,
  }
  for (stack, kind), width in attention.items():
    for layer in range(24):
      kernels = shapes.params[stack][f'layers_{layer}'][kind]
      assert kernels['query']['kernel'].shape == (4096, 4096)
      for name in ('key', 'value'):
        assert kernels[name]['kernel'].shape == (4096, width)


def test_optimizer_and_schedule_are_the_papers(paper):
  optimizer = paper['model'].optimizer_def
  assert type(optimizer).__name__ == 'Adafactor'
  assert optimizer.hyper_params.decay_rate == 0.8
  assert optimizer.hyper_params.step_offset == 0
  assert paper['model']._loss_normalizing_factor == 2048 * 114 == 233472
  assert paper['model']._z_loss == 1e-4
  assert paper['model']._label_smoothing == 0.0
  bound = gin.query_parameter('gqa_t5x.trainer.Trainer.learning_rate_fn')
  schedule = bound.scoped_configurable_fn()
  rates = {0: 0.01, 10_000: 0.01, 40_000: 0.005, 1_000_000: 0.001}
  assert {step: float(schedule(step)) for step in rates} == pytest.approx(rates)
  microbatches = gin.query_parameter('NUM_MICROBATCHES/macro.value')
  assert 2048 % microbatches == 0


@pytest.mark.parametrize(
  ('file', 'kv_axis'), [('uptrain_gqa8', 'model'), ('uptrain_mqa', None)]
)
def test_every_kv_head_stays_whole(file, kv_axis):
  """8 heads are split over 8 partitions; 1 head is not cut."""
  required = bindings(TRAIN | START)
  with commands.gin_config([f'gin/{file}.gin'], required) as arguments_of:
    arguments = arguments_of('train')
    assert gin.query_parameter('MODEL_PARTITIONS/macro.value') == 8
    _, axes = state_shapes('train', arguments)
  rules = dict(arguments['partitioner'].logical_axis_rules)
  assert rules['kv_heads'] == rules['joined_kv_heads'] == kv_axis
  assert rules['heads'] == rules['joined_kv'] == 'model'
  attention = axes.params['decoder']['layers_23']['encoder_decoder_attention']
  spec = partitioning.PartitionSpec
  assert attention['query']['kernel'] == spec('data', 'model')
  for name in ('key', 'value'):
    assert attention[name]['kernel'] == spec('data', kv_axis)


# --- The folder ---------------------------------------------------------------


def test_import_gin_is_the_package():
  done = subprocess.run(
    [sys.executable, '-c', 'import gin; print(gin.REQUIRED, gin.__file__)'],
    cwd=commands.ROOT,
    env=commands.environment(),
    capture_output=True,
    text=True,
    check=True,
  )
  assert not str(gin.__file__).startswith(str(commands.ROOT / 'gin'))
  assert str(commands.ROOT / 'gin') not in done.stdout
  assert not list((commands.ROOT / 'gin').rglob('*.py'))


def test_gin_files_do_not_include_those_of_t5x():
  """The stand-in has none, and pip users have no checkout of T5X."""
  files = commands.gin_files()
  assert all(commands.includes(file) <= set(files) for file in files)
