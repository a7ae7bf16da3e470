"""The command: what it writes, and one clear line for every kind of bad input."""

import re
import subprocess
import sys

import numpy as np
import pytest

from gqa_t5x.checkpoints import folders, writer
from gqa_t5x.conversion.run import _group_layers
from helpers.trees import (
  D,
  H,
  N,
  convert,
  flat,
  nest,
  read,
  tiny_shapes,
  tiny_state,
  write_msgpack,
  write_orbax,
)
from helpers.trees import run_convert as run

KEY = 'target/decoder/layers_1/self_attention/key/kernel'


@pytest.fixture
def mha(tmp_path):
  return write_msgpack(tmp_path / 'mha' / 'checkpoint_1000', tiny_state())


@pytest.fixture
def three_layers(tmp_path):
  tree = tiny_state(moments=False, decoder_layers=3)
  source = write_msgpack(tmp_path / 'mha' / 'checkpoint_1000', tree)
  (source / 'train_ds-000-of-001.index').write_text('')
  return source


@pytest.mark.parametrize(
  ('make', 'num_kv_heads'),
  [(write_msgpack, 1), (write_msgpack, 4), (write_orbax, 2)],
)
def test_converts_each_layout(make, num_kv_heads, tmp_path, capsys):
  source = make(tmp_path / 'mha' / 'checkpoint_1000', tiny_state())
  output = tmp_path / 'gqa'
  got = read(convert(source, output, f'--num_kv_heads={num_kv_heads}', '--method=mean'))
  before = dict(flat(tiny_state()))
  assert got['state/step'] == 1000
  assert set(got) == set(before)
  for path, expected in before.items():
    if re.fullmatch('target/decoder/layers.*/(key|value)/kernel', path):
      split_DKGH = expected.reshape(D, num_kv_heads, -1, H)
      expected = split_DKGH.mean(axis=2).reshape(D, -1)
    if path.startswith('target'):
      np.testing.assert_allclose(got[path], expected, rtol=1e-6, atol=1e-7)
  out = capsys.readouterr().out
  old = sum(a.size for p, a in before.items() if p.startswith('target/'))
  new = old - 8 * D * H * (4 - num_kv_heads)
  assert f'Converted by mean: {old:,} -> {new:,} parameters' in out
  # 2 (K and V) * 2 layers * K * 2 * 2 bytes.
  cache = f'64 -> {16 * num_kv_heads} bytes'
  assert f'{cache} per output token, {cache} per input token' in out
  assert out.endswith(f"INITIAL_CHECKPOINT_PATH = '{output}/checkpoint_1000'\n")
  assert [p.name for p in output.iterdir()] == ['checkpoint_1000']


@pytest.mark.parametrize('method', ['mean', 'svd', 'refit', 'procrustes'])
@pytest.mark.parametrize(
  'path',
  [
    KEY,
    KEY.replace('self_attention/key', 'encoder_decoder_attention/out'),
    'target/decoder/layers_0/pre_self_attention_layer_norm/scale',
    'target/token_embedder/embedding',  # copied
    KEY.replace('target/', 'state/param_states/') + '/v',
  ],
)
def test_what_is_not_finite_is_refused(method, path, tmp_path, capsys):
  arrays = dict(flat(tiny_state()))
  arrays[path] = arrays[path].copy()
  arrays[path].flat[[1, 3]] = np.nan, -np.inf
  source = write_msgpack(tmp_path / 'bad' / 'checkpoint_1000', nest(arrays))
  flags = (f'--input={source}', f'--output={tmp_path}/new', f'--method={method}')
  assert run(*flags, '--num_kv_heads=2') == 1
  error = capsys.readouterr().err.splitlines()[-1]
  message = f'error: {path} has 2 values that are not finite, of {arrays[path].size}: '
  assert error.startswith(message)
  assert [folder.name for folder in tmp_path.iterdir()] == ['bad']


def test_model_dir_means_its_latest_checkpoint(mha, tmp_path, capsys):
  write_msgpack(mha.parent / 'checkpoint_200', tiny_state())
  (mha.parent / 'checkpoint_3000.tmp-1').mkdir()
  flags = ('--cross_attention_num_kv_heads=1', '--encoder_num_kv_heads=1', '--verbose')
  got = read(convert(mha.parent, tmp_path / 'gqa' / 'checkpoint_1000', *flags))
  out = capsys.readouterr().out
  assert f'Reading {mha}\n' in out
  path = KEY.removeprefix('target/')
  assert f'moments of {path}: v (6, 8) -> v (6, 4), summed over each group' in out
  assert 'Adafactor moments of 10 kernels: summed over each group' in out
  assert got[KEY].shape == (D, 2 * H)
  cross = KEY.replace('self_attention', 'encoder_decoder_attention')
  assert got[cross].shape == (D, H)
  assert got['target/encoder/layers_0/attention/key/kernel'].shape == (D, H)


def test_output_names_the_step_of_a_source_without_one(tmp_path, monkeypatch):
  tree = tiny_state(moments=False)
  tree['state']['step'] = np.asarray(0, np.int32)
  source = write_msgpack(tmp_path / 'model', tree)
  monkeypatch.setattr(folders, 'step_is_known', lambda path: path != source)
  for name, step in (('checkpoint_1000000', 1_000_000), ('checkpoint_0', 0), ('', 0)):
    output = tmp_path / f'out{name}' / name
    convert(source, output)
    folder = output if name else output / 'checkpoint_0'
    got = read(folder)
    assert (got['state/step'], got['state/step'].dtype) == (step, np.int32)
    assert run(f'--verify={folder}') == 0


def test_what_is_not_there_or_not_copied_is_said(three_layers, tmp_path, capsys):
  convert(three_layers, tmp_path / 'gqa')
  out = capsys.readouterr().out
  assert "no optimizer state: Adafactor's is added as it starts" in out
  assert 'Not copied: the state of the data pipeline (train_ds-000-of-001.index)' in out


def test_help_teaches(capsys):
  assert run('--help') == 0
  out = capsys.readouterr().out
  assert 'python -m gqa_t5x.convert --input=/models/mha --output=/models/gqa2' in out
  flags = ('num_kv_heads', 'method', 'encoder_num_kv_heads', 'seed', 'statistics')
  for flag in (*flags, 'kv_head_dim', 'refit_outputs'):
    assert f'--{flag}:' in out
  for flag in ('--dry_run', '--verify=', '--compression=none', '/t5-v1_1-base'):
    assert flag in out[: out.index('Flags:')]
  assert '--grouping: Which heads share. contiguous: neighbours; similarity:' in out
  assert '--compression: <none|zstd|gzip>:' in out


BAD = {
  'heads': (
    ['--num_kv_heads=3'],
    'num_heads=4 is not divisible by num_kv_heads=3; choose one of 1, 2, 4',
  ),
  'method': (
    ['--num_kv_heads=2', '--method=avg'],
    "unknown method 'avg'; choose one of mean, first, random",
  ),
  'grouping': (
    ['--num_kv_heads=2', '--grouping=alike'],
    "unknown grouping 'alike'; choose one of contiguous, similarity",
  ),
  'compression': (
    ['--num_kv_heads=2', '--compression=brotli'],
    'flag --compression=brotli: value should be one of <none|zstd|gzip>',
  ),
  'statistics': (
    ['--num_kv_heads=2', '--statistics=~/s.npz'],
    's.npz was given, but method=mean uses none; leave it out, or choose one of'
    ' procrustes, procrustes_rms, refit, svd',
  ),
  'nothing to verify': (
    ['--verify={tmp}/mha'],
    '{tmp}/mha/checkpoint_1000 has no gqa_t5x_manifest.json',
  ),
  'unknown flag': (['--num_kv_head=2'], "Unknown command line flag 'num_kv_head'"),
  'not a number': (['--num_kv_heads=two'], 'flag --num_kv_heads=two: '),
  'stray argument': (['--num_kv_heads=2', 'x'], "unexpected argument 'x'"),
  'no heads': ([], '--num_kv_heads is missing; see --help for an example'),
  'no input': (['--num_kv_heads=2', '--input='], '--input is missing'),
  'missing': (
    ['--num_kv_heads=2', '--input={tmp}/nowhere'],
    'there is no checkpoint at {tmp}/nowhere: no such file or folder',
  ),
  'empty folder': (
    ['--num_kv_heads=2', '--input={tmp}/mha/empty'],
    'there is no T5X checkpoint in {tmp}/mha/empty: expected a file named checkpoint',
  ),
  'output is input': (
    ['--num_kv_heads=2', '--output={tmp}/mha/checkpoint_1000'],
    '--input and --output are the same checkpoint, {tmp}/mha/checkpoint_1000; choose',
  ),
  "output is the input's model_dir": (
    ['--num_kv_heads=2', '--output={tmp}/mha'],
    '--input and --output are the same checkpoint, {tmp}/mha/checkpoint_1000; choose',
  ),
  'output inside input': (
    ['--num_kv_heads=2', '--output={tmp}/mha/checkpoint_1000/gqa'],
    '--output={tmp}/mha/checkpoint_1000/gqa is inside the input',
  ),
  'other step': (
    ['--num_kv_heads=2', '--output={tmp}/gqa/checkpoint_5'],
    '--output names step 5, but {tmp}/mha/checkpoint_1000 is of step 1000;'
    ' use --output={tmp}/gqa/checkpoint_1000',
  ),
  'output holds a checkpoint': (
    ['--num_kv_heads=2', '--output={tmp}/other'],
    '{tmp}/other/checkpoint_30 exists already; choose another --output, or delete it',
  ),
  'output is a checkpoint': (
    ['--num_kv_heads=2', '--output={tmp}/other/checkpoint_1000'],
    '{tmp}/other/checkpoint_1000 exists already; choose another --output',
  ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_gets_one_line(case, mha, tmp_path, capsys):
  (mha.parent / 'empty').mkdir()
  for step in (30, 1000):
    write_msgpack(tmp_path / 'other' / f'checkpoint_{step}', tiny_state(moments=False))
  flags, message = BAD[case]
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
  given = [f'--input={mha}', f'--output={tmp_path / "gqa"}', *flags]
  assert run(*(flag.format(tmp=tmp_path) for flag in given)) == 1
  err = capsys.readouterr().err
  assert err.startswith('error: ')
  assert message.format(tmp=tmp_path) in err
  assert err.count('\n') == 1
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before


def test_disk_without_room(mha, tmp_path, capsys, monkeypatch):
  usage = type('usage', (), {'free': 1234})
  monkeypatch.setattr(writer.shutil, 'disk_usage', lambda path: usage)
  flags = (f'--input={mha}', f'--output={tmp_path / "gqa"}', '--num_kv_heads=4')
  assert run(*flags) == 1
  nbytes = sum(a.nbytes for _, a in flat(tiny_state()))
  message = f'checkpoint_1000: {nbytes:,} bytes are needed, 1,234 are free'
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'gqa').exists()


def test_bucket_out_of_reach(tmp_path, capsys, monkeypatch):
  error = type('OpError', (Exception,), {'__module__': 'tensorflow.python.errors'})

  def unreachable(path):
    raise error(f'Could not resolve host\n\t when reading {path}')

  monkeypatch.setattr(folders, 'find_checkpoint', unreachable)
  assert run('--input=gs://b/c', f'--output={tmp_path}', '--num_kv_heads=2') == 1
  err = capsys.readouterr().err
  assert err == 'error: Could not resolve host when reading gs://b/c\n'


def test_imports_nothing_heavy():
  """And whoever only looks for checkpoints needs neither JAX nor TensorStore."""
  code = (
    'import sys\n'
    'def loaded(*names): print([name for name in names if name in sys.modules])\n'
    'import gqa_t5x.checkpoints.folders\n'
    "loaded('jax', 'flax', 'tensorstore')\n"
    'import gqa_t5x.convert\n'
    "loaded('jax', 'tensorflow', 't5x', 'seqio', 'gin')\n"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout == '[]\n[]\n'


# --- Only said: --dry_run ------------------------------------------------------


def test_dry_run_says_what_would_be_done(three_layers, tmp_path, capsys, monkeypatch):
  usage = type('usage', (), {'free': 123_456})
  monkeypatch.setattr(writer.shutil, 'disk_usage', lambda path: usage)
  before = sorted(tmp_path.rglob('*'))
  output = tmp_path / 'new' / 'gqa'
  flags = (f'--input={three_layers}', f'--output={output}', '--num_kv_heads=1')
  assert run(*flags, '--dry_run') == 0
  assert sorted(tmp_path.rglob('*')) == before
  lines = capsys.readouterr().out.splitlines()
  module = 'decoder/layers_{0..2}/%s/%s/kernel  [6, 8] -> [6, 2]  mean'
  names = ('encoder_decoder_attention', 'self_attention')
  assert lines[:5] == [
    f'Converted: 12 tensors, {12 * D * H * 4:,} bytes',
    *('  ' + module % (name, part) for name in names for part in ('key', 'value')),
  ]
  # The bytes of a model of N and of 1 heads, and 4 of the step.
  old, new = (
    4 + 4 * sum(int(np.prod(s)) for s in tiny_shapes(k, decoder_layers=3).values())
    for k in (N, 1)
  )
  kept = new - 12 * D * H * 4
  count = len(tiny_shapes(decoder_layers=3)) - 12 + 1  # and the step
  assert lines[5] == f'Kept: {count} tensors, {kept:,} bytes'
  assert '  decoder/layers_{0..2}/mlp/wi_0/kernel  [6, 5]' in lines
  assert '  encoder/layers_0/attention/key/kernel  [6, 8]' in lines
  assert '  token_embedder/embedding  [11, 6]' in lines
  assert '  state/step  []' in lines
  assert lines[-6:] == [
    "The checkpoint has no optimizer state: Adafactor's is added as it starts",
    'Dropped: train_ds-000-of-001.index',
    f'Checkpoint: {old:,} -> {new:,} bytes uncompressed, {old - new:,} saved',
    f'{old // 4 - 1:,} -> {new // 4 - 1:,} parameters; decode cache in bfloat16'
    # K and V, 3 layers, 4 or 1 heads of 2, 2 bytes.
    ' 96 -> 24 bytes per output token, 96 -> 24 bytes per input token',
    f'Disk at {output}/checkpoint_1000: {new:,} bytes needed at most, 123,456 free',
    'Nothing was written',
  ]


def test_without_an_output_and_with_moments(mha, capsys):
  assert run(f'--input={mha}', '--num_kv_heads=2', '--dry_run') == 0
  out = capsys.readouterr().out.splitlines()
  kernel = 'decoder/layers_{0..1}/self_attention/key/kernel'
  how = 'v (6, 8) -> v (6, 4), summed over each group'
  assert f'  moments of {kernel}  {how}' in out
  others = len(tiny_shapes()) - 8  # K and V of self- and cross-attention, two layers
  assert f'  moments of these, {4 * others} tensors' in out
  assert not [line for line in out if 'param_states' in line or 'Disk at' in line]


def test_dry_run_reads_shapes_only(three_layers, tmp_path):
  """Lost chunks are not noticed."""
  source = convert(three_layers, tmp_path / 'new', '--num_kv_heads=4')
  chunks = list(source.glob('target.*/[0-9]*'))
  assert len(chunks) == len(list(flat(tiny_state(moments=False, decoder_layers=3)))) - 1
  for chunk in chunks:
    chunk.unlink()
  assert run(f'--input={source}', '--num_kv_heads=2', '--dry_run') == 0


def test_layers_that_are_alike_are_one_line():
  entries = {f'target/a/layers_{i}/w': '[2]' for i in (0, 1, 10, 2)}
  entries |= {'target/b/layers_0/w': '[2]', 'target/a/layers_3/w': '[3]'}
  entries |= {'target/b/layers_5/w': '[2]', 'target/c': '[1]'}
  assert _group_layers(entries) == [
    'a/layers_{0,1,2,10}/w  [2]',
    'b/layers_{0,5}/w  [2]',
    'a/layers_3/w  [3]',
    'c  [1]',
  ]
