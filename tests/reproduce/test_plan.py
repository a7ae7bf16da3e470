"""The plans: what each table and figure takes, as commands that parse."""

import ast
import json
import types

import pytest

import gin
from gqa_t5x import convert
from gqa_t5x.benchmark import define_flags
from gqa_t5x.model import sizes
from gqa_t5x.reproduce import __main__ as reproduce
from gqa_t5x.reproduce.experiments import estimates, paper, plan, run
from gqa_t5x.reproduce.experiments.models import SCRATCH, Model
from gqa_t5x.reproduce.experiments.scales import LOCAL, PAPER
from gqa_t5x.reproduce.experiments.targets import TARGETS
from gqa_t5x.reproduce.results import intensity
from gqa_t5x.reproduce.runner import stages
from helpers import gin_cases

BUCKET = 'gs://bucket'


def kinds(chosen) -> dict[str, int]:
  names = [stage.command[1] for stage in chosen]
  return {name: names.count(name) for name in dict.fromkeys(names)}


# 7 tasks x (MHA-Large, MHA-XXL, 3 seeds of MQA, GQA-8), and two uptrainings; times of
# two sizes at three pairs of lengths.
TABLE1 = {'t5x.train': 7 * 6 + 2, 'gqa_t5x.convert': 2, 'gqa_t5x.benchmark': 6}


@pytest.mark.parametrize(
  ('target', 'expected'),
  [
    ('table1', TABLE1),
    ('figure3', TABLE1),
    # Four methods: each converted, uptrained, fine-tuned on three tasks.
    (
      'figure4',
      {'gqa_t5x.convert': 4, 't5x.train': 4 * 4, 'gqa_t5x.calibrate': 1},
    ),
    # MHA at alpha 0; MQA and GQA-8 at five alphas, one uptraining each.
    ('figure5', {'gqa_t5x.convert': 2, 't5x.train': 3 * 11 + 2}),
    ('figure6', {'gqa_t5x.benchmark': 1}),
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
    ('intensity', {'gqa_t5x.reproduce': 1}),
  ],
)
def test_what_the_papers_take(target, expected):
  assert kinds(plan.make(target, 'paper', BUCKET).stages) == expected


def test_everything_is_planned_once():
  assert {*TARGETS} == {
    *('table1', 'figure3', 'figure4', 'figure5', 'figure6', 'appendix_a', 'shazeer'),
    *('conversion', 'intensity', 'compiled'),
  }
  for scale in ('paper', 'local'):
    lab = plan.make('all', scale, BUCKET)
    targets = set(TARGETS) - ({'compiled'} if scale == 'local' else set())
    each = {s.result for t in targets for s in plan.make(t, scale, BUCKET).stages}
    results = [stage.result for stage in lab.stages]
    assert len(set(results)) == len(results)
    # Uptraining to 0.1 goes on where it ended at 0.05, so each of both is there.
    assert set(results) == each


def words_of(stage, prefix):
  return [w.removeprefix(prefix) for w in stage.command if w.startswith(prefix)]


def gin_arguments(stage):
  """The gin files and macros of a command of the engine."""
  pairs = [w.partition('=') for w in words_of(stage, '--gin.')]
  macros = {name: ast.literal_eval(value) for name, _, value in pairs}
  return words_of(stage, '--gin_file='), macros


def check_training(stage, model: Model, **expected):
  files, bindings = gin_arguments(stage)
  with gin_cases.parsed(files, bindings) as arguments_of:
    found = arguments_of('train')
    config = found['model'].module.config
    macros = {name: gin.query_parameter(f'{name}/macro.value') for name in expected}
  size = sizes.SIZES[model.size]
  assert (config.emb_dim, config.num_heads) == (size['emb_dim'], size['num_heads'])
  assert config.encoder_kv == size['num_heads']
  assert config.self_kv == config.cross_kv == (model.num_kv_heads or size['num_heads'])
  assert macros == expected
  assert stage.result.name == f'checkpoint_{found["total_steps"]}'
  assert str(stage.result.parent) == found['model_dir']
  return found


@pytest.mark.parametrize('scale', [PAPER, LOCAL], ids=lambda scale: scale.name)
def test_fine_tuning_commands(scale):
  lab = plan.make('table1', scale.name, BUCKET)
  task = scale.tasks[-1]
  for model in scale.models:
    for seed in scale.seeds_of(model):
      stage = lab.stage(lab.finetuned(model, task, seed))
      found = check_training(stage, model, RANDOM_SEED=seed)
      data = found['infer_eval_dataset_cfg']
      assert data.mixture_or_task_name == task
      if scale is PAPER:
        lengths = {'inputs': paper.TASKS[task][1], 'targets': paper.TASKS[task][2]}
        assert data.task_feature_lengths == lengths
        assert found['train_dataset_cfg'].batch_size == 128
  seeds = [scale.seeds_of(model) for model in scale.models]
  several = [len(found) for found in seeds]
  assert several == ([1, 1, 3, 1] if scale is PAPER else [1, 3, 1])


def test_one_run_of_uptraining_passes_all_alphas():
  lab = plan.make('figure5', 'paper', BUCKET)
  model = Model('xxl', 8, 'mean', 0.1)
  longest = lab.stage(lab.uptrained(model))
  found = check_training(longest, model, NUM_MICROBATCHES=4, CHECKPOINT_PERIOD=5000)
  assert found['total_steps'] == 1_100_000
  starts = set()
  for stage in lab.stages:
    if 'finetuned/xxl_gqa8_mean' in str(stage.result):
      assert stage.needs in [(longest.result,), longest.needs]
      (start,) = words_of(stage, '--gin.INITIAL_CHECKPOINT_PATH=')
      starts.add(int(start.strip("'").rpartition('_')[2]))
  assert starts == {1_000_000, 1_010_000, 1_020_000, 1_050_000, 1_100_000}
  assert all((step - 1_000_000) % 5000 == 0 for step in starts)


def test_a_longer_run_goes_on_where_a_shorter_one_ended():
  lab = plan.make('all', 'paper', BUCKET)
  ends = [s for s in lab.stages if 'uptrained/xxl_gqa8_mean' in str(s.result)]
  assert [s.result.name for s in ends] == ['checkpoint_1050000', 'checkpoint_1100000']
  assert ends[0].result in ends[1].needs
  assert ends[0].hours == pytest.approx(ends[1].hours)  # 50,000 steps each


def test_training_from_scratch():
  for scale, size in (('paper', 'large'), ('local', 'tiny')):
    lab = plan.make('appendix_a', scale, BUCKET)
    model = Model(size, 1, SCRATCH)
    found = check_training(lab.stage(lab.from_scratch(model)), model)
    assert not found['checkpoint_cfg'].restore.path
    assert found['total_steps'] == {'paper': 1_000_000, 'local': 2400}[scale]


def test_conversion_and_benchmark_commands_parse():
  for scale in ('paper', 'local'):
    for stage in plan.make('all', scale, BUCKET).stages:
      if stage.command[1] == 'gqa_t5x.convert':
        args = convert.define_flags()
        assert args(stage.command[1:]) == ['gqa_t5x.convert']
        assert str(stage.result.parent) == args.output
      if stage.command[1] == 'gqa_t5x.benchmark':
        args = define_flags('decode').values
        assert args(stage.command[1:]) == ['gqa_t5x.benchmark', 'decode']
        assert str(stage.result) == args.json
        assert stage.alone


def test_shazeer_is_evaluated_with_one_beam_and_four():
  lab = plan.make('shazeer', 'paper', BUCKET)
  for size in ('shazeer_mha', 'shazeer_mqa'):
    for beams in (1, 4):
      scores = lab.translation_scores(size, beams)
      files, bindings = gin_arguments(lab.stage(scores))
      with gin_cases.parsed(files, bindings) as arguments_of:
        found = arguments_of('evaluate')
        decodes = gin.query_parameter('NUM_DECODES/macro.value')
      assert decodes == beams
      assert found['dataset_cfg'].split == 'test'
      assert str(scores.parent.parent) == found['output_dir']


# --- Estimates ------------------------------------------------------------------


def test_the_estimate_is_the_papers_own():
  hours = estimates.training_hours('xxl', 8, 2048, 512, 114, 50_000, 'v3')
  assert hours / 24 == pytest.approx(paper.UPTRAIN_CHIP_DAYS, rel=0.05)


def test_more_heads_take_longer_to_decode():
  arguments = (1000, 32, 2048, 512, 'v4')
  hours = [estimates.decoding_hours('xxl', heads, *arguments) for heads in (1, 8, 64)]
  assert hours == sorted(hours)
  # 32 x 2048 tokens x 24 layers x 2 x 64 heads of 64 x 2 bytes: 25.8 GB a step, read at
  # half of 1228 GB/s, 512 times, for a batch of 32.
  cache = 32 * 2048 * 24 * 2 * 64 * 64 * 2
  seconds = 512 * cache / (0.5 * 1228e9) * 1000 / 32
  assert (hours[2] - hours[0]) * 3600 == pytest.approx(seconds, rel=0.4)
  assert (hours[2] - hours[0]) * 3600 > seconds * 63 / 64


def test_the_papers_averages_are_those_of_its_tasks_but_for_one():
  differences = {
    model: paper.TABLE1_AVERAGE[model] - sum(scores) / 7
    for model, scores in paper.TABLE1.items()
  }
  assert differences.pop('MQA-XXL') == pytest.approx(46.6 - 327.3 / 7)
  assert all(abs(difference) < 0.06 for difference in differences.values())


def test_intensity_is_shazeers():
  rows = {
    (row['num_kv_heads'], row['batch_size'], row['input_length']): row['intensity']
    for row in intensity.rows()
  }
  # T5-XXL: d = 4096, h = 64.
  assert rows[64, 32, 2048] == pytest.approx(1 / (2048 / 4096 + 1 / 32))
  assert rows[1, 32, 2048] == pytest.approx(1 / (2048 / (4096 * 64) + 1 / 32))
  assert rows[8, 32, 2048] == pytest.approx(1 / (2048 * 8 / (4096 * 64) + 1 / 32))


# --- The command ----------------------------------------------------------------


@pytest.fixture
def call(capsys):
  def call(*words, **flags):
    values = reproduce.flags.FLAGS
    with_flags = ['reproduce', *words, *(f'--{k}={v}' for k, v in flags.items())]
    saved = values.flag_values_dict()
    try:
      code = reproduce.main(values(with_flags))
    finally:
      for name in ('output_dir', 'results', 'scale', 'study', 'json', 'tfds_data_dir'):
        values[name].value = saved[name]
    return code, capsys.readouterr()

  return call


def test_plan_for_machines(call, tmp_path):
  code, said = call('plan', 'figure6', output_dir=tmp_path, json=True)
  assert code == 0
  (row,) = json.loads(said.out)
  assert row['kind'] == 'plan'
  assert row['source'] == 'analytic'
  assert row['writes'] == f'{tmp_path}/paper/benchmark/figure6.json'
  assert row['command'].startswith('python -m gqa_t5x.benchmark decode --size=xxl')
  assert row['done'] is False


def test_plan_says_what_is_done(call, tmp_path):
  folder = tmp_path / 'local' / 'conversion' / 'quick' / 'mha' / 'checkpoint_2400'
  folder.mkdir(parents=True)
  code, said = call('plan', 'conversion', scale='local', output_dir=tmp_path)
  assert code == 0
  assert said.out.startswith('# [1/21] pre-train MHA, 2,400 steps, done\n')
  assert '# 21 commands, 1 done; left: about' in said.out
  assert 'core-hours' in said.out


def test_a_folder_that_cannot_be_read_leaves_the_plan(capsys):
  def exists():
    raise OSError('no network')

  stage = types.SimpleNamespace(result=types.SimpleNamespace(exists=exists))
  lab = types.SimpleNamespace(stages=[stage, stage], folder=f'{BUCKET}/paper')
  rows = [{}, {}]
  plan.look_for_results(rows, lab)
  assert rows == [{'done': None}, {'done': None}]
  assert capsys.readouterr().err == '# gs://bucket/paper cannot be read: OSError.\n'


def test_plan_names_the_data(call, tmp_path):
  _, said = call(
    'plan', 'table1', output_dir=tmp_path, tfds_data_dir='gs://bucket/tfds'
  )
  data = 'python -m gqa_t5x.data.prepare cnn_dailymail arxiv pubmed mediasum multi_news'
  assert said.out.splitlines()[1] == (
    f'{data} wmt14_en_de trivia_qa --data_dir=gs://bucket/tfds'
  )
  trainings = [line for line in said.out.splitlines() if 't5x.train' in line]
  assert len(trainings) == TABLE1['t5x.train']
  assert all('--tfds_data_dir=gs://bucket/tfds' in line for line in trainings)


@pytest.mark.parametrize(
  ('words', 'flags', 'code', 'message'),
  [
    (('run', 'table1'), {'scale': 'paper'}, 1, 'takes TPU pods'),
    (('run', 'table1'), {'output_dir': 'gs://b'}, 1, 'gs://b is not on this machine'),
    (('run', 'table1'), {'study': 'mini'}, 1, '--study=mini goes with conversion'),
    (('run', 'table2'), {}, 2, 'TARGET: uptrain (run only), table1, figure3'),
    (('table1',), {}, 2, 'Usage'),
  ],
)
def test_bad_commands(call, words, flags, code, message):
  found, said = call(*words, **flags)
  assert found == code
  assert message in said.err


def test_a_run_ends_with_the_report(monkeypatch, tmp_path):
  called = []
  monkeypatch.setattr(stages, 'run', lambda *args: called.append(args) or 0)
  monkeypatch.setattr(run.report, 'write', lambda folder: called.append(folder) or 0)
  assert run.run('intensity', 'local', str(tmp_path), 2) == 0
  (chosen, folder, jobs), written = called
  assert [stage.title for stage in chosen] == ['compute arithmetic intensity']
  assert (folder, jobs, written) == (tmp_path / 'local', 2, str(tmp_path))
