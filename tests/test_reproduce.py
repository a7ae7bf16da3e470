"""The local recipe: its plan, its resuming, its commands and its report."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x import network
from gqa_t5x.conversion import architecture
from gqa_t5x.reproduce import evaluate, report, uptrain
from gqa_t5x.reproduce.gin_macros import macro


def test_macro_reads_literals_and_drops_comments():
  assert macro('gin/uptrain_gqa8.gin', 'TRAIN_STEPS') == 1_050_000
  assert macro('gin/uptrain_gqa8.gin', 'TASK_FEATURE_LENGTHS') == {
    'inputs': 512,
    'targets': 114,
  }
  with pytest.raises(ValueError, match=r'gin/uptrain_gqa8.gin does not set NO_SUCH'):
    macro('gin/uptrain_gqa8.gin', 'NO_SUCH')


def test_plan_and_gin_files_name_the_same_checkpoints(tmp_path):
  paths = uptrain.Paths(tmp_path / 'runs' / 'local')
  for num_kv_heads, name in uptrain.UPTRAIN.items():
    file = f'gin/local/{name}.gin'
    source = paths.converted('mean', num_kv_heads).relative_to(tmp_path)
    assert macro(file, 'INITIAL_CHECKPOINT_PATH') == str(source)
    target = paths.uptrained(num_kv_heads).parent.relative_to(tmp_path)
    assert macro(file, 'MODEL_DIR') == str(target)
  results = [stage.result for stage in uptrain.plan(paths.folder)]
  assert len(results) == len(set(results)) == 12
  assert results[0] == paths.mha
  assert results[-1] == paths.folder / 'report.md'
  # The paper's alpha.
  share = (paths.last_step - paths.pretrain_steps) / paths.pretrain_steps
  assert share == pytest.approx(0.05)


def _stages(folder, calls, fail_at=None, error=None):
  def make(name):
    def run(log):
      calls.append(name)
      if name == fail_at:
        raise error
      (folder / name).write_text(name)

    return uptrain.Stage(name, folder / name, run)

  return [make(name) for name in ('a', 'b', 'report.md')]


@pytest.mark.parametrize(
  ('error', 'code', 'message'),
  [
    (uptrain.StageFailed('b failed, see b.log'), 1, 'b failed, see b.log'),
    (KeyboardInterrupt(), 130, 'Run the same command again'),
  ],
)
def test_a_stopped_run_goes_on_where_it_was(
  tmp_path, monkeypatch, capsys, error, code, message
):
  calls = []
  monkeypatch.setattr(uptrain, 'plan', lambda f: _stages(f, calls, 'b', error))
  assert uptrain.run(str(tmp_path)) == code
  assert calls == ['a', 'b']
  assert message in capsys.readouterr().err
  monkeypatch.setattr(uptrain, 'plan', lambda f: _stages(f, calls))
  assert uptrain.run(str(tmp_path)) == 0
  assert calls == ['a', 'b', 'b', 'report.md']
  assert '[1/3] a: done' in capsys.readouterr().out


def test_command_shows_progress_and_logs_the_rest(tmp_path, monkeypatch, capsys):
  script = tmp_path / 'a_script.py'
  script.write_text(
    'import sys\n'
    'print("to stdout", sys.argv[1:])\n'
    'sys.stderr.write("train: 50%|##\\rtrain: 100%|####\\nnoise\\n")\n'
    'sys.exit(int(sys.argv[1] == "fail"))\n'
  )
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  log = tmp_path / 'log'
  uptrain._command('a_script', log, 'word', flag=3)
  assert '100%|####' in capsys.readouterr().err
  lines = log.read_text().splitlines()
  assert lines[0] == f'{sys.executable} -m a_script word --flag=3'
  assert set(lines[1:]) == {"to stdout ['word', '--flag=3']", 'noise'}
  with pytest.raises(uptrain.StageFailed, match=rf'noise(.|\n)*code 1(.|\n)*{log}'):
    uptrain._command('a_script', log, 'fail')


def _rows():
  common = {
    'parameters': 1000,
    'cache_bytes_per_token': 64,
    'pretrain_steps': 40,
    'device': 'cpu',
    'versions': {'jax': '1'},
    'kind': 'uptrain',
  }
  losses = [
    ('none', 8, 0, 2.0),
    ('none', 8, 2, 1.9),
    ('mean', 2, 0, 2.5),
    ('mean', 2, 2, 2.1),
    ('random', 2, 0, 3.5),
  ]
  names = ('method', 'num_kv_heads', 'uptrain_steps', 'validation_loss')
  rows = [
    {**common, **dict(zip(names, row, strict=True)), 'validation_accuracy': 0.25}
    for row in losses
  ]
  timing = {'kind': 'decode', 'batch_size': 4, 'input_length': 16}
  rows.append({**timing, 'num_kv_heads': 8, 'ms_per_step': 8.0})
  rows.append({**timing, 'num_kv_heads': 2, 'ms_per_step': 2.0})
  return rows


def test_report(tmp_path):
  rows_file = tmp_path / 'rows.json'
  rows_file.write_text(json.dumps(_rows()))
  report.write(rows_file, tmp_path)
  table = [
    line
    for line in (tmp_path / 'report.md').read_text().splitlines()
    if line.startswith('| ')
  ]
  assert table[1:] == [
    '| MHA | - | 1,000 | 64 | 2.000, 0.250 | 1.900, 0.250 | 2.000 |',
    '| GQA-2 | mean | 1,000 | 64 | 2.500, 0.250 | 2.100, 0.250 | 0.500 |',
    '| GQA-2 | random | 1,000 | 64 | 3.500, 0.250 | not run | 0.500 |',
  ]
  assert (tmp_path / 'report.png').read_bytes()[:4] == b'\x89PNG'
  assert {p.name for p in tmp_path.iterdir()} == {
    'rows.json',
    'report.md',
    'report.png',
  }


def test_validation_loss_of_uniform_predictions():
  vocab_size = 32
  module = network.Transformer(network.t5_1_1_config('tiny', vocab_size=vocab_size))
  tokens = jnp.ones((2, 3), jnp.int32)
  params = jax.jit(lambda key: module.init(key, tokens, tokens, tokens)['params'])(
    jax.random.PRNGKey(0)
  )
  logits_dense = params['decoder']['logits_dense']
  logits_dense['kernel'] = jnp.zeros_like(logits_dense['kernel'])
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  sizes = architecture.read_architecture(shapes)
  # Equal logits: the loss is log V, and the first token is the prediction.
  targets = np.array([[0, 5, 7], [9, 0, 0]])
  batch = {
    'encoder_input_tokens': np.ones((2, 4), np.int32),
    'decoder_input_tokens': np.ones((2, 3), np.int32),
    'decoder_target_tokens': targets.astype(np.int32),
    'decoder_loss_weights': np.array([[1, 1, 1], [1, 0, 0]], np.int32),
  }
  loss, accuracy = evaluate.validation_loss(params, sizes, [batch, batch])
  assert loss == pytest.approx(math.log(vocab_size), rel=1e-5)
  assert accuracy == pytest.approx(0.25)
