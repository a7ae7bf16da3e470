"""The planner: what each experiment takes, as commands that parse."""

import pytest

import gin
from gqa_t5x import tpu_compile
from gqa_t5x.benchmark import define_flags
from gqa_t5x.reproduce.experiments import estimates, gin_files, paper
from gqa_t5x.reproduce.experiments.models import (
  MEAN,
  SCRATCH,
  Model,
)
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.scales import LOCAL, PAPER
from gqa_t5x.reproduce.experiments.targets import APART, TARGETS, make_plan
from helpers import gin_cases
from helpers.stages import BUCKET, check_training, gin_arguments, kinds

# --- Reading gin ----------------------------------------------------------------


def test_macros_are_read_as_gin_reads_them(tmp_path):
  base, other, top = (tmp_path / name for name in ('base', 'other', 'top'))
  base.write_text('A = 1\nB = 1\nC = 1\nE = 1\n')
  other.write_text(f"include '{base}'\nB = 2\nC = 2  # a comment\n")
  top.write_text(
    f"include '{base}'\ninclude '{other}'\n"
    "C = 3\nC = 4\nD = {'inputs': 5,\n     'targets': 6}\nE = @f()\nf.x = 7\n"
  )
  found = {'A': 1, 'B': 2, 'C': 4, 'D': {'inputs': 5, 'targets': 6}}
  assert gin_files.macros(str(top)) == found
  # As T5X breaks long lines of an operative configuration.
  assert gin_files.parse("# Macros:\nA_PATH = \\\n    'x/y'\nB = %A\n") == {
    'A_PATH': 'x/y'
  }
  with pytest.raises(ValueError, match=r'gin/uptrain_gqa8.gin does not set NO_SUCH'):
    gin_files.macro('gin/uptrain_gqa8.gin', 'NO_SUCH')
  assert gin_files.macro('gin/uptrain_gqa8.gin', 'TRAIN_STEPS') == 1_050_000


# --- The papers' experiments ----------------------------------------------------


@pytest.mark.parametrize(
  ('target', 'expected'),
  [
    # 7 tasks x (MHA-Large, MHA-XXL, 3 seeds of MQA, GQA-8, latent), and three
    # uptrainings; times of two sizes and of latent at three pairs of lengths.
    (
      'table1',
      {
        't5x.train': 7 * 7 + 3,
        'gqa_t5x.calibrate': 1,
        'gqa_t5x.convert': 3,
        'gqa_t5x.benchmark': 9,
      },
    ),
    # Four methods: each converted, uptrained, fine-tuned on three tasks.
    (
      'figure4',
      {'gqa_t5x.convert': 4, 't5x.train': 4 * 4, 'gqa_t5x.calibrate': 1},
    ),
    # MHA at alpha 0; MQA, GQA-8 and latent at five alphas, one uptraining each.
    (
      'figure5',
      {'gqa_t5x.convert': 3, 't5x.train': 3 * 16 + 3, 'gqa_t5x.calibrate': 1},
    ),
    ('figure6', {'gqa_t5x.benchmark': 2}),
    # Three models, three tasks, three seeds; one pre-training and two uptrainings.
    ('appendix_a', {'t5x.train': 27 + 3, 'gqa_t5x.convert': 2}),
    (
      'shazeer',
      {
        'gqa_t5x.data.wmt_vocabulary': 1,
        't5x.train': 2,
        't5x.eval': 4,
        'gqa_t5x.benchmark': 2,
      },
    ),
    (
      'conversion',
      {'gqa_t5x.convert': 8, 't5x.train': 8, 'gqa_t5x.calibrate': 1},
    ),
    ('heads', {'gqa_t5x.reproduce': 1}),
    ('training', {'gqa_t5x.reproduce': 1}),
    ('intensity', {'gqa_t5x.reproduce': 1}),
    # Five models at three lengths, six of figure 6 (three are the same), eight slices.
    ('compiled', {'gqa_t5x.tpu_compile': 15 + 6 - 3 + 8}),
  ],
)
def test_what_the_papers_take(target, expected):
  assert kinds(make_plan(target, 'paper', BUCKET).stages) == expected


@pytest.mark.parametrize('scale', ['paper', 'local'])
def test_everything_is_planned_once(scale):
  targets = {target for target in TARGETS if (target, scale) not in APART}
  each = {s.result for t in targets for s in make_plan(t, scale, BUCKET).stages}
  results = [stage.result for stage in make_plan('all', scale, BUCKET).stages]
  assert len(set(results)) == len(results)
  # Uptraining to 0.1 goes on where it ended at 0.05, so each of both is there.
  assert set(results) == each


def test_reading_changes_nothing():
  plan = Planner(PAPER, BUCKET)
  model = PAPER.models[3]
  path = f'{BUCKET}/paper/uptrained/xxl_gqa8_mean/checkpoint_1050000'
  assert str(plan.path_of(model)) == path
  plan.finetuning(model, 'arxiv', 1)
  assert plan.stages == []
  plan.require(plan.finetuning(model, 'arxiv', 1))
  assert [stage.command[1] for stage in plan.stages] == [
    'gqa_t5x.convert',
    't5x.train',
    't5x.train',
  ]


@pytest.mark.parametrize('scale', [PAPER, LOCAL], ids=lambda scale: scale.name)
def test_fine_tuning_commands(scale):
  plan, task = Planner(scale, BUCKET), [*scale.tasks][-1]
  for model in scale.models:
    for seed in scale.seeds_of(model):
      stage = plan.finetuning(model, task, seed)
      found = check_training(stage, model, RANDOM_SEED=seed)
      data = found['infer_eval_dataset_cfg']
      assert data.mixture_or_task_name == task
      if scale is PAPER:
        lengths = {'inputs': paper.TASKS[task][1], 'targets': paper.TASKS[task][2]}
        assert data.task_feature_lengths == lengths
        assert found['train_dataset_cfg'].batch_size == 128
  several = [len(scale.seeds_of(model)) for model in scale.models]
  assert several == ([1, 1, 3, 1, 1] if scale is PAPER else [1, 3, 1])


def test_one_run_of_uptraining_passes_all_alphas():
  plan = make_plan('figure5', 'paper', BUCKET)
  model = Model('xxl', 8, MEAN, 0.1)
  (longest,) = (s for s in plan.stages if s.result == plan.path_of(model))
  found = check_training(longest, model, NUM_MICROBATCHES=4, CHECKPOINT_PERIOD=5000)
  assert found['total_steps'] == 1_100_000
  starts = set()
  for stage in plan.stages:
    if 'finetuned/xxl_gqa8_mean' in str(stage.result):
      assert stage.needs in [(longest,), longest.needs]
      _, macros = gin_arguments(stage)
      starts.add(int(macros['INITIAL_CHECKPOINT_PATH'].rpartition('_')[2]))
  assert starts == {1_000_000, 1_010_000, 1_020_000, 1_050_000, 1_100_000}
  assert all((step - 1_000_000) % 5000 == 0 for step in starts)


def test_a_longer_run_goes_on_where_a_shorter_one_ended():
  plan = make_plan('all', 'paper', BUCKET)
  ends = [s for s in plan.stages if 'uptrained/xxl_gqa8_mean' in str(s.result)]
  assert [s.result.name for s in ends] == ['checkpoint_1050000', 'checkpoint_1100000']
  assert ends[0] in ends[1].needs
  assert ends[0].work == ends[1].work == 50_000
  assert ends[0].hours == pytest.approx(ends[1].hours)


@pytest.mark.parametrize(
  ('scale', 'size', 'steps'), [(PAPER, 'large', 1_000_000), (LOCAL, 'tiny', 2400)]
)
def test_training_from_scratch(scale, size, steps):
  model = Model(size, 1, SCRATCH)
  found = check_training(Planner(scale, BUCKET).checkpoint(model), model)
  assert not found['checkpoint_cfg'].restore.path
  assert found['total_steps'] == steps


@pytest.mark.parametrize('scale', ['paper', 'local'])
def test_benchmark_commands_parse(scale):
  for stage in make_plan('all', scale, BUCKET).stages:
    if stage.command[1] == 'gqa_t5x.benchmark':
      args = define_flags('decode').values
      assert args(stage.command[1:]) == ['gqa_t5x.benchmark', 'decode']
      assert str(stage.result) == args.json
      assert stage.alone


def test_shazeer_is_evaluated_with_one_beam_and_four():
  plan = Planner(PAPER, BUCKET)
  for size in ('shazeer_mha', 'shazeer_mqa'):
    for beams in (1, 4):
      stage = plan.translation_scores(size, beams)
      with gin_cases.parsed(*gin_arguments(stage)) as arguments_of:
        found = arguments_of('evaluate')
        decodes = gin.query_parameter('NUM_DECODES/macro.value')
      assert decodes == beams
      assert found['dataset_cfg'].split == 'test'
      assert str(stage.result.parent.parent) == found['output_dir']


def test_compilation_commands():
  """Lengths and heads are those of the report's tables (test_compiled.py)."""
  for stage in make_plan('compiled', 'local', 'runs/here').stages:
    command = tpu_compile.define_flags()
    args = command.values
    assert args(command.rewrite(stage.command[1:])) == ['gqa_t5x.tpu_compile']
    assert args.json == str(stage.result)
    assert args.json.startswith('runs/here/compiled/')
    if args.gin_file:
      assert args.gin_file == ['gin/uptrain_gqa8.gin']
      bound = [binding.partition(' = ')[0] for binding in args.gin_bindings]
      assert bound == ['MODEL_PARTITIONS', 'NUM_MICROBATCHES']
    else:
      # Eight chips and at most 32 inputs each: the paper's rule.
      assert (args.topology, args.model_partitions) == ('v4:2x2x2', 8)
      assert (args.search, args.max_batch_per_chip) == (True, 32)


# --- Estimates ------------------------------------------------------------------


def test_the_estimate_is_the_papers_own():
  hours = estimates.Run('xxl', 8, 'v3', 2048, 512, 114).training_hours(50_000)
  assert hours / 24 == pytest.approx(paper.UPTRAIN_CHIP_DAYS, rel=0.05)


def test_more_heads_take_longer_to_decode():
  hours = [
    estimates.Run('xxl', heads, 'v4', 32, 2048, 512).decoding_hours(1000)
    for heads in (1, 8, 64)
  ]
  assert hours == sorted(hours)
  # 32 x 2048 tokens x 24 layers x 2 x 64 heads of 64 x 2 bytes: 25.8 GB a step, read at
  # half of 1228 GB/s, 512 times, for a batch of 32.
  cache = 32 * 2048 * 24 * 2 * 64 * 64 * 2
  seconds = 512 * cache / (0.5 * 1228e9) * 1000 / 32
  assert (hours[2] - hours[0]) * 3600 == pytest.approx(seconds, rel=0.4)
  assert (hours[2] - hours[0]) * 3600 > seconds * 63 / 64


def test_the_papers_averages_are_those_of_its_tasks_but_for_one():
  differences = {
    model: average - sum(scores) / 7
    for model, (average, *scores) in paper.TABLE1.items()
  }
  assert differences.pop('MQA-XXL') == pytest.approx(46.6 - 327.3 / 7)
  assert all(abs(difference) < 0.06 for difference in differences.values())
