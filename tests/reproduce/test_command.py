"""The command: plans for people and machines, refusals, a run's end."""

import json

import pytest

from gqa_t5x.reproduce import __main__ as reproduce
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.report import papers
from gqa_t5x.reproduce.runner import stages


@pytest.fixture
def call(capsys):
  def call(*words, **flags):
    argv = ['reproduce', *words, *(f'--{k}={v}' for k, v in flags.items())]
    code = reproduce.define_command().run(argv, reproduce.act)
    return code, capsys.readouterr()

  return call


def test_plan_for_machines(call, tmp_path):
  code, said = call('plan', 'figure6', output_dir=tmp_path, json=True)
  assert code == 0
  row, latent = json.loads(said.out)
  assert row['kind'] == 'plan'
  assert row['source'] == 'analytic'
  assert row['writes'] == f'{tmp_path}/paper/benchmark/figure6.json'
  assert row['command'].startswith('python -m gqa_t5x.benchmark decode --size=xxl')
  assert row['done'] is False
  assert latent['writes'] == f'{tmp_path}/paper/benchmark/figure6_latent.json'
  assert '--kv_head_dim=512' in latent['command']


def test_plan_says_what_is_done(call, tmp_path):
  folder = tmp_path / 'local' / 'conversion' / 'quick' / 'mha' / 'checkpoint_2400'
  folder.mkdir(parents=True)
  code, said = call('plan', 'conversion', scale='local', output_dir=tmp_path)
  assert code == 0
  assert said.out.startswith('# [1/21] pre-train MHA, 2,400 steps, done\n')
  assert '# 21 commands, 1 done; left: about' in said.out
  assert 'core-hours' in said.out


def test_a_folder_that_cannot_be_read_leaves_the_plan(call, monkeypatch):
  def missing(plan):
    raise OSError('no network')

  monkeypatch.setattr(Planner, 'missing', missing)
  code, said = call('plan', 'figure6', output_dir='gs://bucket', json=True)
  assert code == 0
  assert [row['done'] for row in json.loads(said.out)] == [None] * 2
  assert said.err == '# gs://bucket/paper cannot be read: OSError.\n'


def test_plan_names_the_data(call, tmp_path):
  _, said = call(
    'plan', 'table1', output_dir=tmp_path, tfds_data_dir='gs://bucket/tfds'
  )
  data = 'python -m gqa_t5x.data.prepare cnn_dailymail arxiv pubmed mediasum multi_news'
  assert said.out.splitlines()[1] == (
    f'{data} wmt14_en_de trivia_qa --data_dir=gs://bucket/tfds'
  )
  trainings = [line for line in said.out.splitlines() if 't5x.train' in line]
  assert len(trainings) == 7 * 7 + 3
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


def test_a_run_ends_with_the_report(monkeypatch, call, tmp_path):
  called = []
  monkeypatch.setattr(stages, 'run', lambda *args: called.append(args) or 0)
  monkeypatch.setattr(papers, 'write', called.append)
  code, _ = call('run', 'intensity', output_dir=tmp_path, jobs=2)
  assert code == 0
  (chosen, folder, jobs), written = called
  assert [stage.title for stage in chosen] == ['compute arithmetic intensity']
  assert (folder, jobs, written) == (tmp_path / 'local', 2, str(tmp_path))
