"""The local recipe: its plan, its resuming, its commands and its report."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x.checkpoints import tree
from gqa_t5x.model import network
from gqa_t5x.reproduce.experiments import uptrain
from gqa_t5x.reproduce.experiments.gin_macros import macro
from gqa_t5x.reproduce.report import uptrain_report
from gqa_t5x.reproduce.results import evaluate
from gqa_t5x.reproduce.runner import stages


def test_macro_reads_literals_and_drops_comments():
  assert macro('gin/uptrain_gqa8.gin', 'TRAIN_STEPS') == 1_050_000
  assert macro('gin/uptrain_gqa8.gin', 'TASK_FEATURE_LENGTHS') == {
    'inputs': 512,
    'targets': 114,
  }
  with pytest.raises(ValueError, match=r'gin/uptrain_gqa8.gin does not set NO_SUCH'):
    macro('gin/uptrain_gqa8.gin', 'NO_SUCH')


def test_macro_follows_includes_and_takes_the_last(tmp_path):
  base, other, top = (tmp_path / name for name in ('base', 'other', 'top'))
  base.write_text('A = 1\nB = 1\nC = 1\n')
  other.write_text(f"include '{base}'\nB = 2\nC = 2\n")
  top.write_text(f"include '{base}'\ninclude '{other}'\nC = 3\nC = 4\n")
  assert [macro(str(top), name) for name in 'ABC'] == [1, 2, 4]


def test_plan_and_gin_files_name_the_same_checkpoints(tmp_path):
  paths = uptrain.Paths(tmp_path / 'runs' / 'local')
  for num_kv_heads, name in uptrain.UPTRAIN.items():
    file = f'gin/local/{name}.gin'
    source = paths.converted('mean', num_kv_heads).relative_to(tmp_path)
    assert macro(file, 'INITIAL_CHECKPOINT_PATH') == str(source)
    target = paths.uptrained('mean', num_kv_heads).parent.relative_to(tmp_path)
    assert macro(file, 'MODEL_DIR') == str(target)
  plan = uptrain.plan(paths.folder)
  stages.check_plan(plan)
  results = [stage.result for stage in plan]
  assert len(results) == 1 + 1 + 4 * 2 + 1 + 2 * 2 + 2
  assert results[0] == paths.mha
  assert results[-1] == paths.folder / 'report.md'
  # Nothing is left to run beside the timing of decoding.
  assert set(plan[-2].needs) == set(results[:-2])
  assert plan[-1].needs == (results[-2],)
  # The paper's alpha.
  share = (paths.last_step - paths.pretrain_steps) / paths.pretrain_steps
  assert share == pytest.approx(0.05)


def test_commands_of_the_plan(tmp_path):
  plan = {stage.title: stage for stage in uptrain.plan(tmp_path)}
  mha = tmp_path / 'mha' / 'checkpoint_1000'
  svd = plan['convert to 2 K/V heads by svd']
  assert svd.command == (
    '-m',
    'gqa_t5x.convert',
    f'--input={mha}',
    f'--output={tmp_path}/converted/svd_2',
    '--num_kv_heads=2',
    '--method=svd',
    f'--statistics={mha}.statistics.npz',
  )
  assert svd.needs == (mha, mha.with_name('checkpoint_1000.statistics.npz'))
  mean = plan['convert to 1 K/V heads by mean']
  assert '--method=mean' in mean.command
  assert not any('statistics' in word for word in mean.command)
  assert mean.needs == (mha,)
  trained = plan['uptrain with 1 K/V heads by svd, 50 steps']
  assert trained.command[:3] == (
    '-m',
    't5x.train',
    '--gin_file=gin/local/uptrain_mqa.gin',
  )
  assert f"--gin.MODEL_DIR='{tmp_path}/uptrain_mqa_svd'" in trained.command
  assert trained.result == tmp_path / 'uptrain_mqa_svd' / 'checkpoint_1050'
  source = tmp_path / 'converted' / 'svd_1' / 'checkpoint_1000'
  assert f"--gin.INITIAL_CHECKPOINT_PATH='{source}'" in trained.command
  assert trained.needs == (source,)
  assert str(plan['report']) == (
    f'python -m gqa_t5x.reproduce report uptrain --output_dir={tmp_path}'
  )


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
    ('svd', 2, 0, 2.2),
    ('svd', 2, 2, 2.05),
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
  uptrain_report.write(rows_file, tmp_path)
  table = [
    line
    for line in (tmp_path / 'report.md').read_text().splitlines()
    if line.startswith('| ')
  ]
  assert table[1:] == [
    '| MHA | - | 1,000 | 64 | 2.000, 0.250 | 1.900, 0.250 | 2.000 |',
    '| GQA-2 | mean | 1,000 | 64 | 2.500, 0.250 | 2.100, 0.250 | 0.500 |',
    '| GQA-2 | random | 1,000 | 64 | 3.500, 0.250 | not run | 0.500 |',
    '| GQA-2 | svd | 1,000 | 64 | 2.200, 0.250 | 2.050, 0.250 | 0.500 |',
  ]
  assert (tmp_path / 'report.png').read_bytes()[:4] == b'\x89PNG'
  assert {p.name for p in tmp_path.iterdir()} == {
    'rows.json',
    'report.md',
    'report.png',
  }


def test_validation_loss_of_uniform_predictions():
  vocab_size = 32
  module = network.Transformer(network.config('tiny', vocab_size=vocab_size))
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
  sizes = tree.read_architecture(shapes)
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
