"""The conversion study: plan, commands, rows from event files, spectra, report."""

import math
import pathlib

import numpy as np
import pytest
import tensorflow as tf

import __main__
import gin
from gqa_t5x import calibrate, convert
from gqa_t5x.checkpoints import folders
from gqa_t5x.conversion.input_statistics import InputStatistics, write_statistics
from gqa_t5x.conversion.methods import check_grouping, get_method
from gqa_t5x.reproduce.__main__ import PARTS
from gqa_t5x.reproduce.experiments import conversion
from gqa_t5x.reproduce.experiments.arms import Arm
from gqa_t5x.reproduce.experiments.gin_macros import macro
from gqa_t5x.reproduce.report import conversion_report
from gqa_t5x.reproduce.results import conversion_rows, events, spectra
from gqa_t5x.reproduce.runner import stages
from gqa_t5x.training import models
from helpers import commands
from helpers.trees import STEP, D, H, N, tiny_state, write_msgpack

TASK = 'a_task'


# --- Plan ---------------------------------------------------------------------


# Of the studies, as they are meant to be.
SIZES = {'quick': 'tiny', 'tiny': 'tiny', 'mini': 'mini'}
LONGEST = {'quick': 0.1, 'tiny': 0.1, 'mini': 0.05}


@pytest.mark.parametrize(
  ('study', 'models', 'converted'),
  # Seeds share a converted checkpoint, but for random.
  [
    ('quick', 1 + 4 + 4, 4 + 4),
    ('tiny', 3 + 9 + 27 + 8, 9 + 9 + 2 + 8),
    ('mini', 16, 15),
  ],
)
def test_plan(tmp_path, study, models, converted):
  plan = conversion.plan(tmp_path, study)
  stages.check_plan(plan)
  folder = tmp_path / 'local' / 'conversion' / study
  kinds = [stage.command[1] for stage in plan]
  assert kinds.count('gqa_t5x.convert') == converted
  assert kinds.count('t5x.train') == 1 + models
  assert kinds.count('gqa_t5x.calibrate') == 1
  assert kinds.count('gqa_t5x.reproduce') == 2
  assert len(plan) == 1 + 1 + converted + models + 2
  trained = {s.result for s in plan if 'uptrained' in s.result.parts}
  assert set(plan[-2].needs) == trained | {folder / 'statistics.npz'}
  for stage in plan:
    assert stage.result.is_relative_to(folder)
    if stage.leftover is not None:
      assert stage.leftover == stage.result.parent


@pytest.mark.parametrize('name', conversion.STUDIES)
def test_numbers_of_the_gin_files(name):
  study = conversion.STUDIES[name]
  paths = conversion.Paths(pathlib.Path('runs/reproduce'), name)
  pretrain, last = paths.pretrain_steps, paths.last_step
  assert last - pretrain == pytest.approx(LONGEST[name] * pretrain)
  assert macro(study.uptrain, 'EVAL_PERIOD') == pytest.approx(0.01 * pretrain)
  assert macro(study.uptrain, 'CHECKPOINT_PERIOD') == last - pretrain
  assert macro(study.uptrain, 'KEEP_CHECKPOINTS') == 1
  steps = [step - pretrain for step in paths.evaluated_steps]
  alphas = conversion_report.ALPHAS
  shares = [alpha for alpha in alphas if alpha * pretrain <= steps[-1]]
  assert shares[-1] == LONGEST[name]
  assert {round(alpha * pretrain) for alpha in shares} <= set(steps)
  if name == 'quick':
    return  # Its gin files are those of tiny, and name its folders.
  assert macro(study.uptrain, 'INITIAL_CHECKPOINT_PATH') == str(paths.mha)
  assert macro(study.pretrain, 'MODEL_DIR') == str(paths.mha.parent)
  mha = conversion.arms(name)[0]
  assert macro(study.uptrain, 'MODEL_DIR') == str(paths.uptrained(mha).parent)


def stage_of(plan, title):
  (stage,) = (stage for stage in plan if stage.title == title)
  return stage


def split_gin(command):
  """The gin files, and the bindings that T5X makes of --gin.X=Y."""
  files = [w.partition('=')[2] for w in command if w.startswith('--gin_file=')]
  pairs = [w.removeprefix('--gin.').partition('=') for w in command if '--gin.' in w]
  return files, [f'{name} = {value}' for name, _, value in pairs]


@pytest.mark.parametrize('study', conversion.STUDIES)
def test_training_commands(tmp_path, monkeypatch, study):
  # No checkpoint is there to be checked.
  monkeypatch.setattr(folders, 'list_checkpoints', lambda folder: [])
  monkeypatch.setattr(folders, 'find_checkpoint', lambda path: path)
  monkeypatch.setattr(folders, 'open_checkpoint', lambda path: {})
  monkeypatch.setattr(models, 'check_params', lambda model, params, source: None)
  plan = conversion.plan(tmp_path, study)
  folder = tmp_path / 'local' / 'conversion' / study
  step = macro(conversion.STUDIES[study].pretrain, 'TRAIN_STEPS')
  cases = {
    f'pre-train MHA, {step:,} steps': (8, None, 0, folder / 'mha'),
    'uptrain with 8 K/V heads, MHA, seed 1': (
      8,
      folder / 'mha' / f'checkpoint_{step}',
      1,
      folder / 'uptrained' / 'none_8_seed1',
    ),
    'uptrain with 1 K/V heads, svd (calibrated), seed 1': (
      1,
      folder / 'converted' / 'svd_calibrated_1' / f'checkpoint_{step}',
      1,
      folder / 'uptrained' / 'svd_calibrated_1_seed1',
    ),
  }
  for name, (num_kv_heads, source, seed, model_dir) in cases.items():
    stage = stage_of(plan, name)
    files, bindings = split_gin(stage.command)
    with commands.gin_config(files, bindings) as arguments_of:
      arguments = arguments_of('train')
      config = arguments['model'].module.config
      assert config.emb_dim == {'tiny': 128, 'mini': 256}[SIZES[study]]
      assert config.self_kv == config.cross_kv == num_kv_heads
      assert gin.query_parameter('RANDOM_SEED/macro.value') == seed
      if source:
        assert gin.query_parameter('INITIAL_CHECKPOINT_PATH/macro.value') == str(source)
        assert arguments['run_eval_before_training']
        assert arguments['eval_steps'] == 40
    assert arguments['model_dir'] == str(model_dir)
    assert stage.result == model_dir / f'checkpoint_{arguments["total_steps"]}'
    evaluation = arguments['train_eval_dataset_cfg']
    assert (evaluation.split, evaluation.shuffle, evaluation.seed) == (
      'validation',
      False,
      42,
    )


@pytest.mark.parametrize('study', conversion.STUDIES)
def test_calibration_command(tmp_path, monkeypatch, study):
  monkeypatch.setattr(__main__, 'calibrate', calibrate.calibrate, raising=False)
  stage = stage_of(conversion.plan(tmp_path, study), 'collect statistics')
  files, bindings = split_gin(stage.command)
  with commands.gin_config(files, bindings):
    values = {
      name: gin.query_parameter(f'{name}/macro.value')
      for name in ('CHECKPOINT_PATH', 'OUTPUT', 'MODEL_SIZE')
    }
  assert values == {
    'CHECKPOINT_PATH': str(stage.needs[0]),
    'OUTPUT': str(stage.result),
    'MODEL_SIZE': SIZES[study],
  }


def test_conversion_commands(tmp_path):
  """All parse, their methods exist, and each makes what its stage says."""
  plan = [
    stage
    for stage in conversion.plan(tmp_path, 'tiny')
    if stage.command[1] == 'gqa_t5x.convert'
  ]
  folder = tmp_path / 'local' / 'conversion' / 'tiny'
  seen = set()
  for stage in plan:
    args = convert.define_command().values
    assert args(stage.command[1:]) == ['gqa_t5x.convert']
    assert args.input == str(folder / 'mha' / 'checkpoint_2400')
    assert stage.result == pathlib.Path(args.output) / 'checkpoint_2400'
    get_method(args.method)  # Or it raises.
    check_grouping(args.grouping)
    expected = (folder / 'statistics.npz') if args.statistics else None
    assert args.statistics == (str(expected) if expected else None)
    assert (expected in stage.needs) == (args.statistics is not None)
    statistics = 'calibrated' if args.statistics else 'not'
    seen.add((args.method, statistics, args.grouping, args.num_kv_heads, args.seed))
  assert len(seen) == len(plan)
  assert ('random', 'not', 'contiguous', 2, 3) in seen
  assert ('svd', 'not', 'contiguous', 1, 0) in seen
  assert ('svd', 'calibrated', 'similarity', 4, 0) in seen
  assert ('refit', 'calibrated', 'contiguous', 2, 0) in seen
  assert not any(g == 'similarity' and k == 1 for _, _, g, k, _ in seen)


def test_reproduce_commands_are_there(tmp_path):
  for stage in conversion.plan(tmp_path, 'mini')[-2:]:
    _, _, verb, experiment, *flags = stage.command
    assert (verb, experiment) in PARTS
    assert flags == [f'--output_dir={tmp_path}', '--study=mini']


@pytest.mark.parametrize(
  ('arm', 'converted', 'name', 'text'),
  [
    (('mean', 'none', 'contiguous', 2, 3), 'mean_2', 'mean_2_seed3', 'mean'),
    (('random', 'none', 'contiguous', 2, 3), 'random_2_seed3', None, 'random'),
    (
      ('svd', 'calibrated', 'similarity', 4, 1),
      'svd_calibrated_similarity_4',
      'svd_calibrated_similarity_4_seed1',
      'svd (calibrated, similarity)',
    ),
  ],
)
def test_names(arm, converted, name, text):
  arm = Arm(*arm)
  assert arm.conversion == converted
  assert arm.name == (name or converted)
  assert arm.title == text


# --- Rows from event files ----------------------------------------------------


def write_events(model_dir, losses, share=0.5):
  """Event files as T5X's: cross-entropy over all tokens, and the real tokens' share."""
  folder = model_dir / 'training_eval' / TASK
  writer = tf.summary.create_file_writer(str(folder))
  with writer.as_default():
    for step, loss in losses.items():
      tf.summary.scalar('cross_ent_loss_per_all_target_tokens', loss * share, step)
      tf.summary.scalar('non_padding_fraction/loss_weights', share, step)
      tf.summary.scalar('loss', 1e6, step)
  writer.close()
  (file,) = folder.glob('events*')
  return file


def evaluation(steps=(100, 101, 102)):
  return conversion_rows.Evaluation(
    study='quick',
    size='tiny',
    task=TASK,
    lengths={'inputs': 128, 'targets': 29},
    batch_size=16,
    num_batches=40,
    steps=list(steps),
  )


def test_loss_rows(tmp_path):
  mha = Arm('none', 'none', 'contiguous', 8, 1)
  mean = Arm('mean', 'none', 'contiguous', 2, 3)
  write_events(tmp_path / 'mha', {100: 4.0, 101: 3.75, 102: 3.5})
  write_events(tmp_path / 'mean', {100: 5.0, 101: 4.5, 102: 3.875}, share=0.25)
  runs = {mha: tmp_path / 'mha', mean: tmp_path / 'mean'}
  rows = conversion_rows.loss_rows(runs, evaluation())
  assert len(rows) == 6
  expected = {
    'kind': 'conversion',
    'source': 'measured',
    'command': 'python -m gqa_t5x.reproduce run conversion --scale=local --study=quick',
    'size': 'tiny',
    'num_kv_heads': 2,
    'method': 'mean',
    'statistics': 'none',
    'grouping': 'contiguous',
    'seed': 3,
    'pretrain_steps': 100,
    'uptrain_steps': 2,
    'alpha': 0.02,
    'validation_loss': 3.875,
    'excess_loss': -0.125,
    'validation_batches': 40,
    'batch_size': 16,
    'input_length': 128,
    'output_length': 29,
    'dtype': 'float32',
  }
  assert {key: rows[5][key] for key in expected} == expected
  assert rows[5].keys() - expected.keys() == {'device', 'versions'}
  assert [row['excess_loss'] for row in rows] == [0, -0.25, -0.5, 1, 0.5, -0.125]


def test_damaged_events_are_named(tmp_path):
  file = write_events(tmp_path, {100: 4.0, 101: 3.75, 102: 3.5})
  data = file.read_bytes()
  assert events.validation_losses(tmp_path, TASK, [100, 102]) == {100: 4.0, 102: 3.5}
  changed = bytearray(data)
  changed[len(data) // 2] ^= 255
  for damaged in (data[:-5], bytes(changed)):
    file.write_bytes(damaged)
    with pytest.raises(events.BadEvents, match=f'{file} is damaged or incomplete'):
      events.validation_losses(tmp_path, TASK, [100])


def test_missing_steps_are_named(tmp_path):
  write_events(tmp_path, {100: 4.0})
  with pytest.raises(events.BadEvents, match=r'no validation loss of step 101, 102;'):
    events.validation_losses(tmp_path, TASK, [100, 101, 102])
  with pytest.raises(events.BadEvents, match='nowhere/training_eval/a_task has no'):
    events.validation_losses(tmp_path / 'nowhere', TASK, [100])


def test_incomplete_runs_leave_no_rows(tmp_path, capsys):
  assert conversion.evaluate(str(tmp_path), 'tiny') == 1
  assert 'none_8_seed1/training_eval/pydocs_span_corruption has no event file' in (
    capsys.readouterr().err
  )
  assert not (tmp_path / 'tiny').exists()


def test_entropy():
  expected = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
  assert conversion_rows.entropy(np.array([7, 7, 3, 9])) == pytest.approx(expected)


def test_unigram_row_leaves_padding_out(monkeypatch):
  def batches(lengths, batch_size, num_batches):
    assert (batch_size, num_batches) == (16, 40)
    yield {
      'decoder_target_tokens': np.array([[5, 5, 0], [6, 0, 0]]),
      'decoder_loss_weights': np.array([[1, 1, 0], [1, 0, 0]]),
    }
    yield {
      'decoder_target_tokens': np.array([[6, 0, 0]]),
      'decoder_loss_weights': np.array([[1, 0, 0]]),
    }

  monkeypatch.setattr(conversion_rows.evaluate, 'validation_batches', batches)
  row = conversion_rows.unigram_row(evaluation())
  assert row['kind'] == 'unigram'
  assert row['validation_loss'] == pytest.approx(math.log(2))


# --- Spectra ------------------------------------------------------------------


def test_describe():
  values = np.array([[90.0, 5.0, 4.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0]])
  assert spectra.describe(values, 2) == {
    'dropped_share': [pytest.approx(0.05), 0.5, 0.0],
    'rank_99': [3, 4, 5],
    'rank_95': [2, 4, 5],
    'rank_90': [1, 4, 5],
  }


def test_spectra_are_those_of_the_best_low_rank_approximation(tmp_path):
  """All queries of a group side by side: its singular values, squared."""
  state = tiny_state(moments=False)
  source = write_msgpack(tmp_path / f'checkpoint_{STEP}', state)
  rng = np.random.default_rng(0)
  roots = [rng.standard_normal((D, D)) for _ in range(3)]  # C = root root^T
  statistics = InputStatistics(*(np.float32(root @ root.T) for root in roots))
  modules = [
    f'decoder/layers_{i}/{name}'
    for i in range(2)
    for name in ('self_attention', 'encoder_decoder_attention')
  ]
  file = tmp_path / 'statistics.npz'
  write_statistics(file, dict.fromkeys(modules, statistics), {})
  rows = list(spectra.rows(source, file, (2, 1)))
  assert len(rows) == 4 * 2 * 2 * 2
  decoder = state['target']['decoder']
  scales = {
    'self_attention': 2 * ['pre_self_attention_layer_norm'],
    'cross_attention': ['pre_cross_attention_layer_norm', None],
  }
  for row in rows:
    layer = decoder[f'layers_{row["layer"]}']
    name = row['module'].replace('cross_attention', 'encoder_decoder_attention')
    q, k, v = (
      layer[name][n]['kernel'].reshape(D, N, H) for n in ('query', 'key', 'value')
    )
    o = layer[name]['out']['kernel'].reshape(N, H, D)
    if row['statistics'] == 'calibrated':
      left, key, value = roots
    else:
      norms = [
        layer[norm] if norm else state['target']['encoder']['encoder_norm']
        for norm in scales[row['module']]
      ]
      left, key = (np.diag(norm['scale']) for norm in norms)
      value = key
    size = N // row['num_kv_heads']
    for group in range(row['num_kv_heads']):
      heads = range(group * size, (group + 1) * size)
      if row['side'] == 'key':
        parts = [left.T @ q[:, i] @ k[:, i].T @ key for i in heads]
        joined = np.concatenate(parts, axis=0)
      else:
        joined = np.concatenate([value.T @ v[:, i] @ o[i] for i in heads], axis=1)
      squared = np.linalg.svd(joined, compute_uv=False) ** 2
      lost = squared[H:].sum() / squared.sum()
      assert row['dropped_share'][group] == pytest.approx(lost, rel=1e-4, abs=1e-9)
