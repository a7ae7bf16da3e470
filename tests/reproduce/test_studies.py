"""Plans of the studies of conversion, and of the miniature."""

import pathlib

import pytest

import gin
from gqa_t5x import convert
from gqa_t5x.conversion.methods import check_grouping, get_method
from gqa_t5x.reproduce.__main__ import PARTS
from gqa_t5x.reproduce.experiments import gin_files, paper, studies
from gqa_t5x.reproduce.experiments.models import (
  METHODS,
  Model,
  mha,
)
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.scales import PAPER
from gqa_t5x.reproduce.experiments.studies import MINIATURE, STUDIES
from gqa_t5x.reproduce.runner import stages
from helpers import gin_cases
from helpers.stages import check_training, gin_arguments, kinds


@pytest.mark.parametrize(
  ('study', 'models', 'conversions'),
  # Seeds share a converted checkpoint, but for random.
  [
    ('quick', 1 + 4 + 4, 4 + 4),
    ('tiny', 3 + 9 + 27 + 8, 9 + 9 + 2 + 8),
    ('mini', 16, 15),
  ],
)
def test_what_a_study_takes(tmp_path, study, models, conversions):
  plan = studies.make_plan(STUDIES[study], str(tmp_path)).stages
  stages.check_plan(plan)
  folder = tmp_path / 'local' / 'conversion' / study
  assert kinds(plan) == {
    't5x.train': 1 + models,
    'gqa_t5x.calibrate': 1,
    'gqa_t5x.convert': conversions,
    'gqa_t5x.reproduce': 2,
  }
  trained = {s.result for s in plan if 'uptrained' in s.result.parts}
  needed = {need.result for need in plan[-2].needs}
  assert needed == trained | {folder / 'statistics.npz'}
  for stage in plan:
    assert stage.result.is_relative_to(folder)
    if stage.leftover is not None:
      assert stage.leftover == stage.result.parent


@pytest.mark.parametrize('name', STUDIES)
def test_numbers_of_the_gin_files(name):
  plan = Planner(STUDIES[name], 'runs/reproduce')
  first, longest = plan.pretrain_steps, {'mini': 0.05}.get(name, 0.1)
  model = plan.experiment.models[0]
  assert model.alpha == longest
  last = plan.value('uptrain', 'TRAIN_STEPS')
  assert last == plan.step(longest)
  period = plan.value('uptrain', 'EVAL_PERIOD')
  assert period == pytest.approx(0.01 * first)
  assert plan.value('uptrain', 'CHECKPOINT_PERIOD') == last - first
  assert plan.value('uptrain', 'KEEP_CHECKPOINTS') == 1
  shown = {round(alpha * first) for alpha in paper.ALPHAS if alpha <= longest}
  assert shown <= {*range(0, last - first, period), last - first}
  if name == 'quick':
    return  # Its gin files are those of tiny, and name its folders.
  start = plan.pretraining(model.size).result
  assert plan.value('uptrain', 'INITIAL_CHECKPOINT_PATH') == str(start)
  assert plan.value('pretrain', 'MODEL_DIR') == str(start.parent)
  assert plan.value('uptrain', 'MODEL_DIR') == str(plan.path_of(model).parent)


@pytest.mark.parametrize('name', STUDIES)
def test_training_commands_of_studies(tmp_path, name):
  plan = Planner(STUDIES[name], str(tmp_path))
  size = plan.experiment.models[0].size
  pretraining = plan.pretraining(size)
  found = {None: check_training(pretraining, mha(size))}
  for model in (plan.experiment.models[0], plan.experiment.models[-1]):
    stage = plan.checkpoint(model)
    source = str(plan.conversion(model).result)
    given = {'RANDOM_SEED': 1, 'INITIAL_CHECKPOINT_PATH': source}
    found[model] = check_training(stage, model, **given)
    assert found[model]['run_eval_before_training']
    assert found[model]['eval_steps'] == 40
  for arguments in found.values():
    data = arguments['train_eval_dataset_cfg']
    assert (data.split, data.shuffle, data.seed) == ('validation', False, 42)


@pytest.mark.parametrize('experiment', [*STUDIES.values(), MINIATURE, PAPER])
def test_calibration_commands(tmp_path, experiment):
  plan = Planner(experiment, str(tmp_path))
  size = experiment.models[0].size
  stage = plan.statistics(size)
  with gin_cases.parsed(*gin_arguments(stage)):
    values = {
      name: gin.query_parameter(f'{name}/macro.value')
      for name in ('CHECKPOINT_PATH', 'OUTPUT', 'MODEL_SIZE')
    }
  assert values == {
    'CHECKPOINT_PATH': str(plan.pretraining(size).result),
    'OUTPUT': str(stage.result),
    'MODEL_SIZE': size,
  }


def test_conversion_commands(tmp_path):
  """All parse, their methods exist, and each makes what its stage says."""
  plan = studies.make_plan(STUDIES['tiny'], str(tmp_path))
  chosen = [s for s in plan.stages if s.command[1] == 'gqa_t5x.convert']
  folder = tmp_path / 'local' / 'conversion' / 'tiny'
  seen = set()
  for stage in chosen:
    args = convert.define_command().values
    assert args(stage.command[1:]) == ['gqa_t5x.convert']
    assert args.input == str(folder / 'mha' / 'checkpoint_2400')
    assert stage.result == pathlib.Path(args.output) / 'checkpoint_2400'
    get_method(args.method)  # Or it raises.
    check_grouping(args.grouping)
    expected = str(folder / 'statistics.npz') if args.statistics else None
    assert args.statistics == expected
    needed = {str(need.result) for need in stage.needs}
    assert needed == {args.input, expected} - {None}
    statistics = 'calibrated' if args.statistics else 'not'
    seen.add((args.method, statistics, args.grouping, args.num_kv_heads, args.seed))
  assert len(seen) == len(chosen)
  assert ('random', 'not', 'contiguous', 2, 3) in seen
  assert ('svd', 'not', 'contiguous', 1, 0) in seen
  assert ('svd', 'calibrated', 'similarity', 4, 0) in seen
  assert ('refit', 'calibrated', 'contiguous', 2, 0) in seen
  assert not any(g == 'similarity' and k == 1 for _, _, g, k, _ in seen)


@pytest.mark.parametrize('experiment', [STUDIES['mini'], MINIATURE])
def test_reproduce_commands_are_there(tmp_path, experiment):
  for stage in studies.make_plan(experiment, str(tmp_path)).stages[-2:]:
    _, _, verb, name, *flags = stage.command
    assert (verb, name) in PARTS
    study = [] if experiment is MINIATURE else ['--study=mini']
    assert flags == [f'--output_dir={tmp_path}', *study]


def test_names_of_models():
  models = [
    Model('tiny', 2, METHODS[0], 0.1, 3),
    Model('tiny', 2, METHODS[2], 0.1, 3),
    Model('tiny', 4, METHODS[-1], 0.1, 1),
  ]
  assert [(m.conversion_name, m.run_name, m.method.title) for m in models] == [
    ('mean_2', 'mean_2_seed3', 'mean'),
    ('random_2_seed3', 'random_2_seed3', 'random'),
    (
      'svd_calibrated_similarity_4',
      'svd_calibrated_similarity_4_seed1',
      'svd (calibrated, similarity)',
    ),
  ]
  assert len({method.title for method in METHODS}) == len(METHODS)


def test_the_miniature_and_its_gin_files_name_the_same_checkpoints(tmp_path):
  plan = studies.make_plan(MINIATURE, str(tmp_path / 'runs' / 'local'))
  for model in (
    m for m in MINIATURE.models if m.alpha and m.method.name in ('none', 'mean')
  ):
    file = f'gin/local/uptrain_{model.heads}.gin'
    source = plan.conversion(model).result.relative_to(tmp_path)
    assert gin_files.macro(file, 'INITIAL_CHECKPOINT_PATH') == str(source)
    target = plan.path_of(model)
    folder = str(target.parent.relative_to(tmp_path))
    assert gin_files.macro(file, 'MODEL_DIR') == folder
    steps = gin_files.macro(file, 'TRAIN_STEPS')
    assert target.name == f'checkpoint_{steps}'
    assert steps == 1.05 * plan.pretrain_steps  # the paper's alpha
  assert len(plan.stages) == 1 + 1 + 4 * 2 + 1 + 2 * 2 + 2
  # Nothing is left to run while decoding is timed.
  before = {stage.result for stage in plan.stages[:-2]}
  assert {need.result for need in plan.stages[-2].needs} == before
  assert plan.stages[-1].result == plan.folder / 'report.md'


def test_commands_of_the_miniature(tmp_path):
  """Those that docs/uptrain was made with."""
  plan = studies.make_plan(MINIATURE, str(tmp_path)).stages
  commands = {stage.title: str(stage).replace(str(tmp_path), 'runs') for stage in plan}
  assert commands['convert to 2 K/V heads by svd (calibrated)'] == (
    'python -m gqa_t5x.convert --input=runs/mha/checkpoint_1000'
    ' --output=runs/converted/svd_2 --num_kv_heads=2 --method=svd'
    ' --statistics=runs/mha/checkpoint_1000.statistics.npz'
  )
  trained = commands['uptrain with 1 K/V heads, svd (calibrated)']
  assert '--gin_file=gin/local/uptrain_mqa.gin' in trained
  assert "INITIAL_CHECKPOINT_PATH='runs/converted/svd_1/checkpoint_1000'" in trained
  assert commands['report'] == (
    'python -m gqa_t5x.reproduce report uptrain --output_dir=runs'
  )
