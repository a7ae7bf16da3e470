"""Every gin file: parsed, finalised, and what reaches the engine."""

import itertools
import pathlib
import re
import shlex

import pytest
from t5x import utils

import gin
from gqa_t5x import convert
from gqa_t5x.model import network, sizes
from helpers import commands, gin_cases
from helpers.gin_cases import CHECKPOINT, OUTPUT, RUNS, START, TRAIN

# File -> function, what must be given, size, and key/value heads (None: all), or their
# number and size.
RUNNABLE = {
  'gin/uptrain_gqa8.gin': ('train', TRAIN | START, 'xxl', 8),
  'gin/uptrain_mqa.gin': ('train', TRAIN | START, 'xxl', 1),
  'gin/uptrain_latent512.gin': ('train', TRAIN | START, 'xxl', (1, 512)),
  'gin/calibrate.gin': ('calibrate', CHECKPOINT | OUTPUT, 'xxl', None),
  'gin/local/pretrain_mha.gin': ('train', {}, 'tiny', None),
  'gin/local/uptrain_mha.gin': ('train', {}, 'tiny', None),
  'gin/local/uptrain_gqa2.gin': ('train', {}, 'tiny', 2),
  'gin/local/uptrain_mqa.gin': ('train', {}, 'tiny', 1),
  'gin/local/finetune.gin': ('train', TRAIN | START, 'tiny', None),
  'gin/local/calibrate.gin': ('calibrate', CHECKPOINT | OUTPUT, 'tiny', None),
  'gin/local/study_pretrain.gin': ('train', {}, 'tiny', None),
  'gin/local/study_uptrain.gin': ('train', {}, 'tiny', None),
  'gin/local/study_mini_pretrain.gin': ('train', {}, 'mini', None),
  'gin/local/study_mini_uptrain.gin': ('train', {}, 'mini', None),
}
# File of gin/models -> size.
MODELS = {s if '_' in s else f't5_1_1_{s}': s for s in sizes.SIZES}
MODELS |= {f'flan_t5_{s}': s for s in ('small', 'base', 'large', 'xl', 'xxl')}
FROM_CHECKPOINT = 'gin/models/from_checkpoint.gin'  # test_from_checkpoint.py
BEST = 'gin/runs/best_checkpoint.gin'
INFER_TEXT = 'gin/infer_text.gin'  # reads its input: test_infer_text.py
EXPORT = 'gin/runs/export.gin'  # of Google's T5X alone: test_saved_model.py
# Name -> files, function, required values, size, key/value heads.
CASES = {file: ([file], *row) for file, row in RUNNABLE.items()}
# Every run with the smallest model, every model with one run.
_PAIRS = {('t5_1_1_tiny', run): None for run in RUNS if run != 'translate'}
for _model in MODELS:
  _PAIRS[_model, 'translate' if 'shazeer' in _model else 'finetune'] = None
for _model, _run in _PAIRS:
  _name, _task, _given = RUNS[_run]
  _files = gin_cases.files(_model, _task, _run)
  CASES[f'{_model}-{_run}'] = (_files, _name, _given, MODELS[_model], None)
# A way to decode comes after the run, for Shazeer's models, too.
for _decoding in ('beam_search', 'int8', 'sample'):
  _files = gin_cases.files(
    'shazeer_mqa', gin_cases.WMT, 'infer', f'gin/decoding/{_decoding}.gin'
  )
  _given = gin_cases.INFER | gin_cases.VOCABULARY
  CASES[f'shazeer_mqa-{_decoding}'] = (_files, 'infer', _given, 'shazeer_mqa', None)


def no_files(*args, **kwargs):
  raise AssertionError('a vocabulary is read or built')


def is_runnable(file: str) -> bool:
  """Whether a file alone makes a run: it has a model and what is done with it."""
  included = commands.includes(file)
  return all(
    any(i.startswith(f'gin/{p}/') for i in included) for p in ('models', 'runs')
  )


def test_every_runnable_file_has_a_row():
  assert {file for file in commands.gin_files() if is_runnable(file)} == set(RUNNABLE)


def test_every_part_is_used():
  roots = {file for files, *_ in CASES.values() for file in files}
  used = roots.union(*map(commands.includes, roots))
  # gin/tasks and best_checkpoint.gin: test_gin_papers.py.
  tasks = {file for file in commands.gin_files() if file.startswith('gin/tasks/')}
  own = {BEST, INFER_TEXT, EXPORT, FROM_CHECKPOINT}
  assert set(commands.gin_files()) == used | tasks | own


@pytest.mark.parametrize('case', CASES)
def test_parses_finalises_and_has_the_right_model(case, monkeypatch):
  files, name, required, size, K = CASES[case]
  with gin_cases.parsed(files, required) as arguments_of:
    arguments = arguments_of(name)
    if name == 'train':
      monkeypatch.setattr('tensorflow.io.gfile.GFile', no_files)
      data = arguments['train_dataset_cfg']
      utils.verify_matching_vocabs(data, arguments['model'])
      vocabulary = utils.get_vocabulary(data)[1]
      assert vocabulary == arguments['model'].output_vocabulary
  config = arguments['model'].module.config
  # Parameters of the sizes: test_network.py.
  vocab_size = 4096 if case.startswith('gin/local') else None
  K, R = K if isinstance(K, tuple) else (K, None)
  heads = {'num_kv_heads': K, 'kv_head_dim': R}
  quantize = 'weights_and_cache' if case.endswith('-int8') else None
  expected = network.config(size, **heads, vocab_size=vocab_size, quantize=quantize)
  own = {field: getattr(config, field) for field in ('dtype', 'remat_policy')}
  assert config == expected.replace(dropout_rate=config.dropout_rate, **own)
  if name == 'train':
    assert arguments['trainer_cls'].__module__ == 'gqa_t5x.training.trainer'
    assert arguments['checkpoint_cfg'].save.period > 0
    assert arguments['stats_period'] == 100
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
    ((model, path),) = arguments_of.checked
    assert path == restored.path
    assert model.module.config == config
  else:
    assert 'pretrain' in case or 'translate' in case


@pytest.mark.parametrize(
  'case',
  [
    'gin/uptrain_gqa8.gin',
    'shazeer_mha-translate',
    *(f't5_1_1_tiny-{run}' for run in RUNS if run != 'translate'),
  ],
)
def test_what_is_required_is_named(case):
  files, name, required, *_ = CASES[case]
  for missing in required:
    given = {k: v for k, v in required.items() if k != missing}
    with pytest.raises((ValueError, RuntimeError), match=rf'\b{missing}\b'):
      with gin_cases.parsed(files, given) as arguments_of:
        arguments_of(name)


@pytest.mark.parametrize('run', [run for run in RUNS if run != 'translate'])
def test_a_run_without_a_task_names_what_a_task_gives(run):
  _, _, required = RUNS[run]
  files = ['gin/models/t5_1_1_tiny.gin', f'gin/runs/{run}.gin']
  task = {'MIXTURE_OR_TASK_NAME': 'words', 'TASK_FEATURE_LENGTHS': {'inputs': 1}}
  for missing in task:
    given = required | {k: v for k, v in task.items() if k != missing}
    with pytest.raises(ValueError, match=rf'^{missing}/macro.value set to .*REQUIRED'):
      with gin_cases.parsed(files, given):
        pass


@pytest.mark.parametrize(
  ('file', 'task', 'lengths'),
  [
    ('gin/calibrate.gin', 'c4_v220', {'inputs': 512, 'targets': 114}),
    ('gin/local/calibrate.gin', 'pydocs', {'inputs': 128, 'targets': 29}),
  ],
)
def test_calibration_is_on_packed_training_data(file, task, lengths):
  with gin_cases.parsed([file], CHECKPOINT | OUTPUT) as arguments_of:
    arguments = arguments_of('calibrate')
  data = arguments['dataset_cfg']
  assert data.mixture_or_task_name == f'{task}_span_corruption'
  assert data.task_feature_lengths == lengths
  assert (data.split, data.pack, data.shuffle) == ('train', True, False)
  assert (arguments['num_sequences'], arguments['include_encoder']) == (512, False)
  utils.verify_matching_vocabs(data, arguments['model'])


def test_local_fine_tuning():
  given = TRAIN | {'INITIAL_CHECKPOINT_PATH': 'gs://bucket/checkpoint_2400'}
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


# --- The commands in the files ------------------------------------------------


def example_commands(file: str) -> list[list[str]]:
  """The words of each command in a file's first comment."""
  head = itertools.takewhile(
    lambda s: s.startswith('#'), commands.gin_files()[file].splitlines()
  )
  text = '\n'.join(line.removeprefix('#') for line in head).replace('\\\n', ' ')
  found = re.findall(r'^ +(python -m .*)$', text, flags=re.MULTILINE)
  return [shlex.split(command, comments=True)[1:] for command in found]


WITH_COMMANDS = [
  *(f'gin/runs/{run}.gin' for run in (*RUNS, 'best_checkpoint')),
  *(file for file in RUNNABLE if not file.startswith('gin/local/')),
]


@pytest.mark.parametrize('file', WITH_COMMANDS)
def test_a_file_shows_its_command(file):
  engines = set()
  for words in example_commands(file):
    if words[:2] == ['-m', 'gqa_t5x.convert']:
      assert convert.define_command().values(words[1:]) == words[1:2]
      continue
    gin_files = re.findall(r'--gin_file=(\S+)', ' '.join(words))
    if file not in gin_files:
      continue
    engines.add(words[1])
    given = [word.removeprefix('--gin.') for word in words if word.startswith('--gin.')]
    flags = {word.split('=')[0] for word in words[2:] if not word.startswith('--gin.')}
    assert flags <= {'--gin_file', '--tfds_data_dir'}
    with commands.gin_config(
      gin_files, [word.replace('=', ' = ', 1) for word in given]
    ):
      assert gin.query_parameter('TASK_FEATURE_LENGTHS/macro.value')['inputs'] >= 256
  (engine,) = engines
  kind = {'best_checkpoint': 't5x.eval', 'eval': 't5x.eval', 'infer': 't5x.infer'}
  kind['calibrate'] = 'gqa_t5x.calibrate'
  assert engine == kind.get(pathlib.Path(file).stem, 't5x.train')
