"""The benchmark command: its settings, rows, files and refusals."""

import dataclasses
import functools
import io
import json
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from gqa_t5x import benchmark
from gqa_t5x.analysis.benchmarks import (
  decode_benchmark,
  table_and_figure,
  timing,
  train_benchmark,
  workload,
)
from gqa_t5x.analysis.benchmarks.decode_benchmark import Setting
from gqa_t5x.analysis.costs import formulas
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network, sizes


@pytest.fixture(scope='module', autouse=True)
def small_machine():
  """A model of one layer, and small measures of the machine."""
  dims = dict(emb_dim=16, num_heads=8, head_dim=4, mlp_dim=32, vocab_size=64)
  layers = dict(num_encoder_layers=1, num_decoder_layers=1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sizes.SIZES, 'one_layer', dims | layers)
    patch.setattr(timing, 'STREAM_BYTES', {'cpu': 2**20})
    patch.setattr(workload, 'matmul_rate', lambda *_: 0.5)
    yield


def chosen(name, *words, compare=None):
  args = benchmark.define_flags(name).values
  args(['benchmark', name, *words])
  lists = {flag: args[flag].value for flag in benchmark.LISTS[name]}
  return benchmark.settings(name, lists, compare)


@pytest.mark.parametrize('name', ['decode', 'train'])
def test_a_size_with_heads_of_its_own(name):
  """Shazeer's models side by side, by one command."""
  words = '--size=shazeer_mha,shazeer_mqa,tiny'
  found = chosen(name, words)
  assert [(s.size, s.num_kv_heads) for s in found] == [
    ('shazeer_mha', 8),
    ('shazeer_mqa', 1),
    *(('tiny', K) for K in (8, 4, 2, 1)),
  ]
  config = found[1].config
  assert (config.mlp_dim, config.encoder_kv, config.self_kv) == (5440, 1, 1)
  assert [s.num_kv_heads for s in chosen(name, words, '--num_kv_heads=2')] == [2] * 3


def test_default_settings():
  """Every divisor of the heads; a quarter of them for conversion, twice."""
  rest = (8, 512, 64, 'float32', 1, None, None, 'gqa_t5x')
  assert [dataclasses.astuple(setting) for setting in chosen('decode')] == [
    ('base', K, *rest) for K in (12, 6, 4, 3, 2, 1)
  ]
  assert [dataclasses.astuple(setting) for setting in chosen('convert')] == [
    ('base', 3, 'mean', compression) for compression in ('none', 'zstd')
  ]


def test_heads_of_a_size_of_their_own():
  """With all heads to choose from; T5X's network has none, CTranslate2 neither."""
  words = ['--num_kv_heads=4,1', '--kv_head_dim=16,256']
  found = chosen('decode', *words, compare='t5x')
  assert [(s.num_kv_heads, s.kv_head_dim, s.system) for s in found] == [
    *((K, 16, 'gqa_t5x') for K in (4, 1)),
    (12, None, 't5x'),
    *((K, 256, 'gqa_t5x') for K in (4, 1)),
    (12, None, 't5x'),
  ]
  assert found[4].config.kv_size == 256
  (training,) = chosen('train', '--num_kv_heads=1', '--kv_head_dim=256')
  assert training.config.kv_size == 256
  with pytest.raises(BadInput, match='kv_head_dim=16: CTranslate2 has no such heads'):
    chosen('decode', *words, compare='ctranslate2')


def test_all_combinations_with_t5x():
  """Settings that differ in heads and system only are neighbours."""
  found = chosen('decode', '--num_kv_heads=4,1', '--batch_size=1,8', compare='t5x')
  assert [(s.batch_size, s.num_kv_heads, s.system) for s in found] == [
    (batch_size, K, system)
    for batch_size in (1, 8)
    for K, system in ((4, 'gqa_t5x'), (1, 'gqa_t5x'), (12, 't5x'))
  ]


@pytest.mark.parametrize('compare', ['t5x', 'ctranslate2'])
def test_int8_beside_floats(compare):
  """Of ours alone."""
  words = ['--num_kv_heads=4', '--quantize=none,weights_and_cache']
  found = chosen('decode', *words, compare=compare)
  ours = [s.quantize for s in found if s.system == 'gqa_t5x']
  assert ours == [None, 'weights_and_cache']
  assert {s.quantize for s in found if s.system != 'gqa_t5x'} == {None}


def test_ctranslate2_has_the_same_heads():
  found = chosen('decode', '--num_kv_heads=4,1', compare='ctranslate2')
  systems = ('gqa_t5x', 'ctranslate2', 'ctranslate2_int8')
  expected = [(K, system) for system in systems for K in (4, 1)]
  assert [(s.num_kv_heads, s.system) for s in found] == expected


def test_ctranslate2_is_timed(tmp_path):
  pytest.importorskip('ctranslate2')
  words = ['--size=one_layer', '--num_kv_heads=2', '--batch_size=2', '--repeats=5']
  words += ['--input_length=8', '--output_length=8', '--compare=ctranslate2']
  rows = write_rows('decode', tmp_path, *words)
  systems = ['gqa_t5x', 'ctranslate2', 'ctranslate2_int8']
  assert [row['system'] for row in rows] == systems
  assert all(row['encode_ms'] > 0 for row in rows)
  assert ['gb_per_s' in row for row in rows] == [True, True, False]


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    pytest.param(
      ['decode', '--compare=ctranslate2', '--dtype=bfloat16'],
      'dtype=bfloat16: CTranslate2 is compared in float32 alone',
      marks=pytest.mark.skipif(not find_spec('ctranslate2'), reason='an extra'),
    ),
    (['decode', '--size=huge'], 'size=huge; choose from tiny, mini, small'),
    (['decode', '--dtype=int8'], 'dtype=int8; choose from float32, bfloat16.'),
    (['decode', '--num_kv_heads=5'], 'num_heads=12 is not divisible by num_kv_heads=5'),
    (['decode', '--kv_head_dim=0'], 'kv_head_dim=0 must be from 1 to num_heads * head'),
    (['train', '--kv_head_dim=769'], 'kv_head_dim=769 must be from 1 to num_heads'),
    (['train', '--batch_size=fill'], 'batch_size=fill must be whole numbers.'),
    (['decode', '--batch_size=0'], 'batch_size=0 must be at least 1.'),
    (['decode', '--output_length=3'], 'output_length=3 must be at least 4'),
    (
      ['decode', '--batch_size=fill', '--output_length=0'],
      'output_length=0 must be at least 4',
    ),
    (
      ['decode', '--batch_size=fill', '--input_length=-2'],
      'input_length=-2 must be at least 1.',
    ),
    (['decode', '--num_beams=' + 400 * '9'], 'num_beams must be at most 2147483647.'),
    (['train', '--target_length='], '--target_length is missing its value; give one'),
    (['decode', '--num_kv_heads='], '--num_kv_heads is missing its value; give one'),
    (['decode', '--quantize=int4'], 'quantize=int4; choose from none, weights, cache,'),
    (['decode', '--batch_size=1000000'], 'needs 42598.1 GB, and '),
    (['decode', '--json=/no/such/rows.json'], '/no/such/rows.json: there is no such'),
    (['decode', '--json=/'], "'/' is a folder; name a file."),
    (['decode', '--png=', '--size=tiny'], '--png is missing its value; give one'),
    (['decode', '--png=x.txt'], 'x.txt: choose one of the suffixes '),
    (['decode', '--repeats=3'], 'flag --repeats=3'),
    (
      ['dance'],
      "say what to measure: decode, train, convert, accelerator; not 'dance'.",
    ),
    (['decode', 'fast'], "unexpected argument 'fast'; see --help"),
    (['train', '--num_beams=2'], "Unknown command line flag 'num_beams'"),
    (['train', '--batch_size=1000000'], 'target 128, float32 needs '),
    (['convert', '--method=median'], 'method=median; choose from mean, first, random'),
    (['convert', '--compression=rar'], 'compression=rar; choose from none, zstd, gzip'),
    (['convert', '--work_dir=/no/such'], 'work_dir=/no/such: there is no such folder.'),
  ],
)
def test_what_cannot_be_measured(words, said, capsys):
  assert benchmark.main(['benchmark', *words]) == 1
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('error: ')
  assert said in err
  assert err.count('\n') == 1


CONVERT = 'gqa_t5x.analysis.benchmarks.convert_benchmark'


@pytest.mark.parametrize(
  ('module', 'words', 'said'),
  [
    ('matplotlib', ['decode', '--png=x.png'], 'needs matplotlib, which is not'),
    (CONVERT, ['convert'], "which is not installed; pip install 'gqa_t5x[train]'.\n"),
    (
      't5x.examples.t5',
      ['decode', '--compare=t5x'],
      "needs T5X's own example network (t5x.examples.t5), which is not installed",
    ),
  ],
)
def test_what_is_missing_is_named(module, words, said, monkeypatch, capsys):
  monkeypatch.delitem(sys.modules, 'gqa_t5x.training.t5x_baseline', raising=False)
  monkeypatch.setitem(sys.modules, module, None)
  assert benchmark.main(['benchmark', *words]) == 1
  err = capsys.readouterr().err
  assert err.startswith('error: ')
  assert said in err


def test_a_batch_that_fills_the_memory(monkeypatch):
  monkeypatch.setattr(timing, 'free_bytes', lambda: 2e9)
  for K in (8, 1):
    (found,) = chosen(
      'decode', '--size=tiny', f'--num_kv_heads={K}', '--batch_size=fill'
    )
    assert found.batch_size % 8 == 0
    more = dataclasses.replace(found, batch_size=found.batch_size + 8)
    assert found.nbytes() <= 0.9 * 2e9 < more.nbytes()
  monkeypatch.setattr(timing, 'free_bytes', lambda: 1e6)
  (found,) = chosen('decode', '--size=tiny', '--num_kv_heads=1', '--batch_size=fill')
  with pytest.raises(BadInput, match=r'batch 8, .* needs .* GB, and 0\.0 GB are free'):
    found.check()
  monkeypatch.setattr(timing, 'free_bytes', lambda: None)
  with pytest.raises(BadInput, match=r'batch_size=fill: .* unknown'):
    chosen('decode', '--size=tiny', '--num_kv_heads=1', '--batch_size=fill')


def write_rows(name, folder, *words):
  argv = ['benchmark', name, *words, f'--json={folder}/rows.json']
  assert benchmark.main(argv) == 0
  return json.loads((folder / 'rows.json').read_text())


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
  """Rows of a run of the command."""
  folder = tmp_path_factory.mktemp('benchmark')
  words = ['--size=one_layer', '--num_kv_heads=8,1', '--num_beams=2', '--batch_size=2']
  words += ['--input_length=8', '--output_length=4', '--repeats=5']
  found = write_rows('decode', folder, *words, f'--png={folder}/heads.png')
  assert (folder / 'heads.png').read_bytes()[:4] == b'\x89PNG'
  assert {path.name for path in folder.iterdir()} == {'rows.json', 'heads.png'}
  return found


def test_rows(rows):
  assert [row['num_kv_heads'] for row in rows] == [8, 1]
  for row in rows:
    cfg = network.config('one_layer', num_kv_heads=row['num_kv_heads'])
    step = formulas.decode_step(cfg, 2, 8, 4, num_beams=2)
    seconds = row['ms_per_step'] / 1e3
    nbytes = row['param_bytes_per_step'] + row['cache_bytes_per_step']
    assert (row['kind'], row['source']) == ('decode_benchmark', 'measured')
    # Where the rows went is not a part of it.
    assert row['command'] == (
      'python -m gqa_t5x.benchmark decode --size=one_layer --num_kv_heads=8,1'
      ' --batch_size=2 --input_length=8 --output_length=4 --num_beams=2 --repeats=5'
    )
    assert (nbytes, row['flops_per_step']) == (step.bytes, step.flops)
    expected = {
      'gb_per_s': nbytes / seconds / 1e9,
      'roofline_fraction': nbytes / seconds / 1e9 / row['stream_gb_per_s'],
      'roofline_ms': max(
        nbytes / row['stream_gb_per_s'] / 1e6,
        step.flops / row['matmul_gflop_per_s'] / 1e6,
      ),
      'roofline_time_fraction': row['roofline_ms'] / row['ms_per_step'],
      'seconds_per_sample': (row['encode_ms'] / 1e3 + 4 * seconds) / 2,
      'tokens_per_s': 2 / seconds,
      'matmul_gflop_per_s': 0.5,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row['encode_ms'] > 0
    assert row['stream_gb_per_s'] > 0
    assert row['versions']['jax'] == jax.__version__


def test_rows_of_a_run_that_is_stopped_are_kept(tmp_path, monkeypatch):
  def stopped(settings, repeats, *, command):
    yield {'ms_per_step': 1.5}
    raise KeyboardInterrupt

  monkeypatch.setattr(train_benchmark, 'measure', stopped)
  words = ['--size=tiny', f'--json={tmp_path}/rows.json']
  assert benchmark.main(['benchmark', 'train', *words]) == 130
  (left,) = tmp_path.iterdir()  # What is not whole has not the whole one's name.
  assert left.name == 'rows.json.partial'
  assert json.loads(left.read_text()) == [{'ms_per_step': 1.5}]


def test_table(rows, capsys):
  slow = {**rows[0], 'ms_per_step': 40.0, 'system': 't5x'}
  fast = {**rows[0], 'ms_per_step': 10.0}
  table_and_figure.print_table([fast, slow], decode_benchmark.COLUMNS)
  lines = capsys.readouterr().out.splitlines()
  numbers = '8 2 8 2'  # heads, batch, input, beams
  assert ' '.join(lines[1].split()[:7]) == f'one_layer {numbers} 10 {"█" * 6}'
  assert ' '.join(lines[2].split()[:8]) == f'one_layer (T5X) {numbers} 40 {"█" * 24}'


def test_heads_of_a_size_of_their_own_in_rows_and_table(rows, tmp_path, capsys):
  words = ['--size=one_layer', '--num_kv_heads=1', '--kv_head_dim=9', '--batch_size=2']
  words += ['--input_length=8', '--output_length=4', '--repeats=5']
  (row,) = write_rows('decode', tmp_path, *words, f'--png={tmp_path}/heads.png')
  assert (row['num_kv_heads'], row['kv_head_dim']) == (1, 9)
  cfg = network.config('one_layer', num_kv_heads=1, kv_head_dim=9)
  step = formulas.decode_step(cfg, 2, 8, 4)
  assert row['param_bytes_per_step'] + row['cache_bytes_per_step'] == step.bytes
  assert 'kv_head_dim' not in rows[0]
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[:3] for line in lines[:2]] == [
    ['model', 'K', 'R'],
    ['one_layer', '1', '9'],
  ]


def test_table_without_its_signs(rows, monkeypatch):
  out = io.TextIOWrapper(io.BytesIO(), 'ascii')
  monkeypatch.setattr(sys, 'stdout', out)
  table_and_figure.print_table(rows, decode_benchmark.COLUMNS)
  out.flush()
  assert b'  ##' in out.buffer.getvalue()


def test_training_rows(tmp_path, capsys):
  words = ['--size=one_layer', '--num_kv_heads=2', '--batch_size=2', '--repeats=5']
  words += ['--input_length=8', '--target_length=4']
  (row,) = write_rows('train', tmp_path, *words)
  cfg = network.config('one_layer', num_kv_heads=2)
  flops = formulas.training_step(cfg, 2, 8, 4).flops
  seconds = row['ms_per_step'] / 1e3
  expected = {
    'flops_per_step': flops,
    'tokens_per_s': 2 * (8 + 4) / seconds,
    'gflop_per_s': flops / seconds / 1e9,
    'matmul_fraction': flops / seconds / 1e9 / 0.5,
  }
  assert {name: row[name] for name in expected} == pytest.approx(expected)
  assert (row['kind'], row['source']) == ('train_benchmark', 'measured')
  assert capsys.readouterr().out.splitlines()[1].split()[:5] == (
    ['one_layer', '2', '2', '8', '4']
  )


def test_a_training_step_is_loss_and_gradients():
  """A step along the gradient lowers the loss by as much as its length says."""
  cfg = network.config('one_layer', num_kv_heads=2)
  params = workload.random_params(cfg, jnp.float32)
  tokens = jax.random.randint(jax.random.key(0), (2, 12), 2, 64)
  step = functools.partial(train_benchmark.loss_and_gradients, network.Transformer(cfg))
  loss, gradients = step(params, tokens[:, :8], tokens[:, 8:])
  squares = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(gradients))
  params = jax.tree.map(lambda p, g: p - 1e-3 / squares * g, params, gradients)
  lower, _ = step(params, tokens[:, :8], tokens[:, 8:])
  assert float(loss - lower) == pytest.approx(1e-3, rel=0.1)


def test_t5x_is_timed_where_a_setting_says_so():
  """What the command hands in is made of the setting, and measured."""
  made = []

  def network_of_t5x(cfg):
    made.append(cfg.self_kv)
    return network.Transformer(cfg)

  def decoder_of_t5x(cfg, params, inputs_BS, length, num_beams):
    made.append((inputs_BS.shape, length, num_beams))
    return decode_benchmark.decoder(cfg, params, inputs_BS, length, num_beams)

  training = train_benchmark.Setting('one_layer', 2, 2, 8, 4, 'float32', 't5x')
  decoding = Setting('one_layer', 8, 2, 8, 4, 'float32', 2, system='t5x')
  for module, setting, baseline in (
    (train_benchmark, training, network_of_t5x),
    (decode_benchmark, decoding, decoder_of_t5x),
  ):
    (row,) = module.measure([setting], 1, 'command', {'t5x': baseline})
    assert (row['system'], row['command']) == ('t5x', 'command')
  assert made == [2, ((2, 8), 4, 2)]


def test_conversion_rows(tmp_path, capsys):
  words = ['--size=tiny', '--num_kv_heads=2', '--compression=zstd', '--repeats=1']
  (row,) = write_rows('convert', tmp_path, *words, f'--work_dir={tmp_path}')
  assert {path.name for path in tmp_path.iterdir()} == {'rows.json'}
  before, after = (
    4 * formulas.num_parameters(network.config('tiny', num_kv_heads=K)) for K in (8, 2)
  )
  # A message, a manifest and chunks that are filled up come on top.
  assert before < row['input_bytes'] < 1.1 * before
  assert 0.5 * after < row['output_bytes'] < after
  expected = {
    'cp_fraction': row['cp_seconds'] / row['seconds'],
    'gb_per_s': row['input_bytes'] / row['seconds'] / 1e9,
  }
  assert {name: row[name] for name in expected} == pytest.approx(expected)
  assert 50 < row['peak_mb'] < 1000
  assert capsys.readouterr().out.splitlines()[1].split()[:4] == (
    ['tiny', '2', 'mean', 'zstd']
  )
