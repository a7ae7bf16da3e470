"""The command: what it writes, and one clear line for every kind of bad input."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from gqa_t5x import convert
from gqa_t5x.checkpoints import folders, writer
from helpers.trees import (
  D,
  H,
  flat,
  tiny_params,
  tiny_state,
  write_msgpack,
  write_orbax,
)

KEY = 'target/decoder/layers_1/self_attention/key/kernel'


@pytest.fixture
def mha(tmp_path):
  return write_msgpack(tmp_path / 'mha' / 'checkpoint_1000', tiny_state())


def run(*flags):
  return convert.main(['convert', *map(str, flags)])


def read(folder):
  tensors = folders.open_checkpoint(epath.Path(folder))
  return {path: tensor.read() for path, tensor in tensors.items()}


@pytest.mark.parametrize('num_kv_heads', [1, 2, 4])
@pytest.mark.parametrize('make', [write_msgpack, write_orbax])
def test_converts_each_layout(make, num_kv_heads, tmp_path, capsys):
  source = make(tmp_path / 'mha' / 'checkpoint_1000', tiny_state())
  output = tmp_path / 'gqa'
  flags = (f'--input={source}', f'--output={output}', f'--num_kv_heads={num_kv_heads}')
  assert run(*flags, '--method=mean') == 0
  got = read(output / 'checkpoint_1000')
  before = dict(flat(tiny_state()))
  assert got['state/step'] == 1000
  assert set(got) == set(before)
  split_DKGH = before[KEY].reshape(D, num_kv_heads, -1, H)
  expected = split_DKGH.mean(axis=2).reshape(D, -1)
  np.testing.assert_allclose(got[KEY], expected, rtol=1e-6, atol=1e-7)
  out = capsys.readouterr().out
  old = sum(a.size for p, a in before.items() if p.startswith('target/'))
  new = old - 8 * D * H * (4 - num_kv_heads)
  assert f'Converted by mean: {old:,} -> {new:,} parameters' in out
  # 2 (K and V) * 2 layers * K * 2 * 2 bytes.
  cache = f'64 -> {16 * num_kv_heads} bytes'
  assert f'{cache} per output token, {cache} per input token' in out
  assert out.endswith(f"INITIAL_CHECKPOINT_PATH = '{output}/checkpoint_1000'\n")
  assert [p.name for p in output.iterdir()] == ['checkpoint_1000']


def test_model_dir_means_its_latest_checkpoint(mha, tmp_path, capsys):
  write_msgpack(mha.parent / 'checkpoint_200', tiny_state())
  (mha.parent / 'checkpoint_3000.tmp-1').mkdir()
  output = tmp_path / 'gqa' / 'checkpoint_1000'
  flags = (f'--input={mha.parent}', f'--output={output}', '--num_kv_heads=2')
  assert run(*flags, '--verbose') == 0
  out = capsys.readouterr().out
  assert f'Reading {mha}\n' in out
  path = 'decoder/layers_1/self_attention/key/kernel'
  assert f'moments of {path}: v (6, 8) -> v (6, 4), summed over each group' in out
  assert 'Adafactor moments of 8 kernels: summed over each group' in out
  assert read(output)[KEY].shape == (D, 2 * H)


def test_flags_for_each_kind_of_attention(mha, tmp_path):
  flags = ('--num_kv_heads=2', '--cross_attention_num_kv_heads=1')
  output = f'--output={tmp_path / "gqa"}'
  assert run(f'--input={mha}', output, *flags, '--encoder_num_kv_heads=1') == 0
  got = read(tmp_path / 'gqa' / 'checkpoint_1000')
  assert got[KEY].shape == (D, 2 * H)
  cross = KEY.replace('self_attention', 'encoder_decoder_attention')
  assert got[cross].shape == (D, H)
  assert got['target/encoder/layers_0/attention/key/kernel'].shape == (D, H)


def test_output_names_the_step_of_a_source_without_one(tmp_path, monkeypatch):
  tree = tiny_state(moments=False)
  tree['state']['step'] = np.asarray(0, np.int32)
  source = write_msgpack(tmp_path / 'model', tree)
  monkeypatch.setattr(folders, 'step_is_known', lambda path: path != source)
  flags = (f'--input={source}', '--num_kv_heads=2')
  for name, step in (('checkpoint_1000000', 1_000_000), ('checkpoint_0', 0), ('', 0)):
    output = tmp_path / f'out{name}' / name
    assert run(*flags, f'--output={output}') == 0
    folder = output if name else output / 'checkpoint_0'
    got = read(folder)
    assert (got['state/step'], got['state/step'].dtype) == (step, np.int32)
    assert run(f'--verify={folder}') == 0


def test_seed_of_random(mha, tmp_path):
  got = []
  for i, seed in enumerate((0, 0, 1)):
    flags = (f'--output={tmp_path / str(i)}', '--num_kv_heads=2', f'--seed={seed}')
    assert run(f'--input={mha}', *flags, '--method=random') == 0
    got.append(read(tmp_path / str(i) / 'checkpoint_1000'))
  np.testing.assert_array_equal(got[0][KEY], got[1][KEY])
  assert not np.allclose(got[0][KEY], got[2][KEY])
  moments = KEY.replace('target', 'state/param_states')
  np.testing.assert_array_equal(got[0][f'{moments}/v'], np.zeros((D, 2 * H)))


def test_what_is_not_there_or_not_copied_is_said(tmp_path, capsys):
  tree = tiny_state(moments=False)
  source = write_msgpack(tmp_path / 'mha' / 'checkpoint_1000', tree)
  (source / 'train_ds-000-of-001.index').write_text('')
  flags = (f'--input={source}', f'--output={tmp_path / "gqa"}', '--num_kv_heads=2')
  assert run(*flags) == 0
  out = capsys.readouterr().out
  assert 'The checkpoint has no optimizer state: none was written' in out
  assert 'Not copied: the state of the data pipeline (train_ds-000-of-001.index)' in out


def test_help_teaches(capsys):
  assert run('--help') == 0
  out = capsys.readouterr().out
  assert 'python -m gqa_t5x.convert --input=/models/mha --output=/models/gqa2' in out
  for flag in ('num_kv_heads', 'method', 'encoder_num_kv_heads', 'seed', 'statistics'):
    assert f'--{flag}:' in out
  for flag in ('--dry_run', '--verify=', '--compression=none', '/t5-v1_1-base'):
    assert flag in out[: out.index('Flags:')]
  assert '--grouping: Which heads share. contiguous: neighbours; similarity:' in out
  assert '--compression: <none|zstd|gzip>:' in out


def damaged_msgpack(source):
  (source / 'checkpoint').write_bytes((source / 'checkpoint').read_bytes()[:4000])


def emptied(source):
  (source / 'checkpoint').unlink()


BAD = {
  'heads': (
    ['--num_kv_heads=3'],
    'num_heads=4 is not divisible by num_kv_heads=3; choose one of 1, 2, 4',
  ),
  'too many heads': (
    ['--num_kv_heads=8'],
    'num_heads=4 is not divisible by num_kv_heads=8; choose one of 1, 2, 4',
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
    's.npz was given, but method=mean uses none',
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
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_gets_one_line(case, mha, tmp_path, capsys):
  (mha.parent / 'empty').mkdir()
  write_msgpack(tmp_path / 'other' / 'checkpoint_30', tiny_state(moments=False))
  flags, message = BAD[case]
  before = sorted(tmp_path.rglob('*'))
  given = [f'--input={mha}', f'--output={tmp_path / "gqa"}', *flags]
  assert run(*(flag.format(tmp=tmp_path) for flag in given)) == 1
  err = capsys.readouterr().err
  assert err.startswith('error: ')
  assert message.format(tmp=tmp_path) in err
  assert err.count('\n') == 1
  assert sorted(tmp_path.rglob('*')) == before


def test_more_heads_than_the_checkpoint_has(tmp_path, capsys):
  source = write_msgpack(tmp_path / 'gqa' / 'checkpoint_1000', tiny_state(2))
  flags = (f'--input={source}', f'--output={tmp_path / "out"}', '--num_kv_heads=4')
  assert run(*flags) == 1
  assert "num_kv_heads=4 is more than the checkpoint's 2" in capsys.readouterr().err


def test_explicit_output_that_exists(mha, tmp_path, capsys):
  target = tmp_path / 'gqa' / 'checkpoint_1000'
  flags = (f'--input={mha}', f'--output={target}', '--num_kv_heads=2')
  assert run(*flags) == 0
  before = {p: p.stat().st_mtime_ns for p in target.rglob('*')}
  assert run(*flags) == 1
  assert f'{target} exists already' in capsys.readouterr().err
  assert {p: p.stat().st_mtime_ns for p in target.rglob('*')} == before


@pytest.mark.parametrize('damage', [damaged_msgpack, emptied])
def test_damaged_checkpoint(damage, mha, tmp_path, capsys):
  damage(mha)
  flags = (f'--input={mha}', f'--output={tmp_path / "gqa"}', '--num_kv_heads=2')
  assert run(*flags) == 1
  assert str(mha) in capsys.readouterr().err
  assert not (tmp_path / 'gqa').exists()


def test_chunk_that_is_missing_is_found_while_converting(mha, tmp_path, capsys):
  first = tmp_path / 'first' / 'checkpoint_1000'
  assert run(f'--input={mha}', f'--output={first}', '--num_kv_heads=2') == 0
  (first / KEY.replace('/', '.') / '0.0').unlink()
  flags = (f'--input={first}', f'--output={tmp_path / "gqa"}', '--num_kv_heads=1')
  capsys.readouterr()
  assert run(*flags) == 1
  err = capsys.readouterr().err
  assert f'cannot read the tensor {KEY} of {first}' in err
  assert err.count('\n') == 1
  assert not (tmp_path / 'gqa').exists()


def test_tree_that_is_not_t5_1_1(tmp_path, capsys):
  tree = {'target': {'params': {'w': np.ones(3)}}, 'state': {'step': np.int32(1000)}}
  source = write_msgpack(tmp_path / 'x' / 'checkpoint_1000', tree)
  flags = (f'--input={source}', f'--output={tmp_path / "gqa"}', '--num_kv_heads=2')
  assert run(*flags) == 1
  err = capsys.readouterr().err
  assert 'not a T5.1.1 checkpoint: 29 missing: ' in err
  assert err.endswith('1 extra: params/w\n')


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
  code = (
    'import sys, gqa_t5x.convert\n'
    "print([m for m in ('tensorflow', 't5x', 'seqio', 'gin') if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout == '[]\n'


# Slows the writing down, so that a signal falls into the middle of it.
SLOW = """
import signal, sys, time
from gqa_t5x import convert
from gqa_t5x.checkpoints import writer
# What runs in the background of a shell ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
write = writer._TensorWriter.__call__
def slow(*args):
  time.sleep(0.2)
  return write(*args)
writer._TensorWriter.__call__ = slow
sys.exit(convert.main(sys.argv))
"""


@pytest.mark.parametrize(
  ('number', 'code'),
  [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
)
def test_signal_in_the_middle_leaves_no_checkpoint(number, code, mha, tmp_path):
  output = tmp_path / 'gqa'
  flags = [f'--input={mha}', f'--output={output}', '--num_kv_heads=2']
  temporary = output / 'checkpoint_1000.tmp-convert'
  process = subprocess.Popen(
    [sys.executable, '-c', SLOW, *flags], stderr=subprocess.PIPE, text=True
  )
  for _ in range(200):
    if temporary.exists() and len(os.listdir(temporary)) > 1:
      break
    time.sleep(0.1)
  process.send_signal(number)
  err = process.communicate(timeout=30)[1]
  assert process.returncode == code
  assert not (output / 'checkpoint_1000').exists()
  if number == signal.SIGKILL:
    assert temporary.exists()  # nobody could clean up; the next run does
  else:
    assert not output.exists()
    assert re.fullmatch('stopped; nothing was written\n', err)
  assert run(*flags) == 0
  assert os.listdir(output) == ['checkpoint_1000']


def test_peak_of_open_tensors_does_not_grow_with_the_layers(monkeypatch):
  """Streaming: no more than one attention module's tensors are read for a unit."""
  from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
  from gqa_t5x.checkpoints.tree import flatten
  from gqa_t5x.conversion.plan import plan_conversion

  most = []
  for layers in (1, 5):
    reads = itertools.count(1)
    tensors = {
      f'target/{path}': LazyTensor(
        a.shape, a.dtype, lambda a=a, r=reads: (next(r), a)[1]
      )
      for path, a in flatten(tiny_params(decoder_layers=layers))
    }
    plan = plan_conversion(tensors, num_kv_heads=2, method='mean')
    assert next(reads) == 1  # planning read nothing
    counts = []
    for unit in plan.units:
      start = next(reads)
      unit.compute()
      counts.append(next(reads) - start - 1)
    most.append(max(counts))
  assert most == [2, 2]  # key and value of one module
