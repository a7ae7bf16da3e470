"""The writer: T5X's layout, jobs within a budget, whole or not at all.

What it takes from the system, and leaves when killed: tests/test_convert_process.py.
"""

import json
import os
import pathlib
import threading
import time

import numpy as np
import pytest
from etils import epath

from gqa_t5x.checkpoints import writer
from gqa_t5x.checkpoints.jobs import Job, run_jobs
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, Unit
from gqa_t5x.conversion import manifest
from gqa_t5x.errors import BadInput
from helpers.trees import (
  STEP,
  convert,
  flat,
  read,
  tiny_shapes,
  tiny_state,
  write_msgpack,
  write_t5x,
)
from helpers.trees import run_convert as run

NUM_ARRAYS = 2 * len(tiny_shapes())  # the parameters and their moments v

# --- Jobs ---------------------------------------------------------------------


@pytest.mark.parametrize('num_threads', [1, 3, None])
def test_results_are_in_order_whatever_ends_first(num_threads):
  seconds = [0.05, 0.0, 0.02, 0.01, 0.0]

  def job(i):
    time.sleep(seconds[i])
    return i * i

  jobs = [Job(lambda i=i: job(i), 1) for i in range(5)]
  done = []
  results = run_jobs(
    jobs,
    lambda i: done.append((i, threading.current_thread())),
    num_threads=num_threads,
  )
  assert results == [0, 1, 4, 9, 16]
  assert sorted(i for i, _ in done) == [0, 1, 2, 3, 4]
  assert {thread for _, thread in done} == {threading.current_thread()}


@pytest.mark.parametrize(
  ('sizes', 'most_together'),
  [
    ([4] * 9, 2),  # 8 of 10 bytes
    ([5] * 9, 2),
    ([1] * 9, 4),  # as many as threads
    ([30, 30, 30], 1),  # above the budget: each alone
    ([1, 30, 1, 1], 2),  # the second waits for the first, the last two for the second
  ],
)
def test_jobs_that_run_together_fit_the_budget(sizes, most_together):
  lock, running, seen = threading.Lock(), [], []

  def job(size):
    with lock:
      running.append(size)
      seen.append(list(running))
    time.sleep(0.03)
    with lock:
      running.remove(size)

  jobs = [Job(lambda size=size: job(size), size) for size in sizes]
  run_jobs(jobs, budget=10, num_threads=4)
  assert len(seen) == len(sizes)
  assert all(sum(together) <= 10 or len(together) == 1 for together in seen)
  assert max(map(len, seen)) == most_together


@pytest.mark.parametrize('error', [ValueError('x'), KeyboardInterrupt()])
@pytest.mark.parametrize('place', ['job', 'caller'])
def test_error_stops_what_has_not_begun_and_waits_for_the_rest(error, place):
  started, ended = [], []

  def job(i):
    started.append(i)
    time.sleep(0.0 if i == 0 else 0.1)
    if i == 0 and place == 'job':
      raise error
    ended.append(i)

  def on_done(i):
    raise error

  jobs = [Job(lambda i=i: job(i), 1) for i in range(50)]
  with pytest.raises(type(error)):
    run_jobs(jobs, on_done, num_threads=2)
  assert len(started) <= 4
  assert sorted(ended) == sorted(set(started) - ({0} if place == 'job' else set()))


# --- T5X's layout, whole or not at all -----------------------------------------


def test_layout_written_is_that_of_t5x(tmp_path):
  from flax import serialization

  folder = write_t5x(tmp_path / 'checkpoint_1000', tiny_state())
  tree = serialization.msgpack_restore((folder / 'checkpoint').read_bytes())
  assert set(tree) == {'version', 'optimizer'}
  assert tree['version'] == 3
  assert set(tree['optimizer']) == {'target', 'state'}
  assert tree['optimizer']['state']['step'] == np.int32(STEP)
  attention = tree['optimizer']['target']['decoder']['layers_0']['self_attention']
  name = 'target.decoder.layers_0.self_attention.key.kernel'
  assert attention['key']['kernel'] == {
    'driver': 'zarr',
    'dtype': 'float32',
    'kvstore': {'driver': 'file', 'path': f'{name}/'},
    'metadata': {
      'shape': [6, 8],
      'chunks': [6, 8],
      'compressor': {'id': 'zstd', 'level': 1},
    },
  }
  zarray = json.loads((folder / name / '.zarray').read_text())
  assert zarray['shape'] == [6, 8]
  assert zarray['dtype'] == '<f4'
  moments = tree['optimizer']['state']['param_states']['decoder']['decoder_norm']
  assert moments['scale']['v']['driver'] == 'zarr'
  for name in ('m', 'v_row', 'v_col'):
    np.testing.assert_array_equal(moments['scale'][name], [0.0])


@pytest.mark.parametrize(
  ('shape', 'expected'),
  [
    ((4096, 4096), [4096, 4096]),  # 64 MiB in float32: one chunk
    ((32128, 4096), [4016, 4096]),
    ((4096, 10240), [4096, 2560]),
    ((), []),
    ((7,), [7]),
  ],
)
def test_chunks_hold_at_most_64_mib(shape, expected):
  assert writer._chunks(shape, 4) == expected


def failing(error, after=3):
  """Units of which the fourth raises."""
  tensors = {p: LazyTensor.of(a) for p, a in flat(tiny_state())}

  def fail():
    raise error

  units = [Unit({p: t}, lambda p=p, t=t: {p: t.read()}) for p, t in tensors.items()]
  path, tensor = next(iter(tensors.items()))
  return [*units[:after], Unit({path: tensor}, fail)]


@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('bug')])
def test_any_exception_leaves_nothing(error, tmp_path):
  target = epath.Path(tmp_path / 'new' / 'sub' / 'checkpoint_1000')
  with pytest.raises(type(error)):
    writer.write_checkpoint(target, failing(error), lambda n: None)
  assert list(tmp_path.iterdir()) == []


FULL = '1,064 bytes are needed, [0-9,]+ are free'


@pytest.mark.parametrize(
  ('error', 'message'),
  [
    (OSError(28, 'No space left on device'), FULL),
    (ValueError('RESOURCE_EXHAUSTED: "0.0": No space left on device [code=28]'), FULL),
    (ValueError("OUT_OF_RANGE: File too large [os_error_code='27']"), 'too large'),
  ],
)
def test_disk_that_takes_no_more(error, message, tmp_path):
  target = epath.Path(tmp_path / 'checkpoint_1000')
  start = 'no disk space for' if message is FULL else 'cannot write'
  with pytest.raises(BadInput, match=f'^{start} {target}: .*{message}'):
    writer.write_checkpoint(target, failing(error), lambda n: None)
  assert list(tmp_path.iterdir()) == []


def test_two_conversions_do_not_write_the_same_checkpoint(tmp_path):
  target = epath.Path(tmp_path / 'checkpoint_1000')
  inner = []

  def second():
    with pytest.raises(BadInput, match='another process is writing'):
      writer.write_checkpoint(target, [], inner.append)
    return {'target/x': np.ones(3, np.float32)}

  spec = LazyTensor.of(np.ones(3, np.float32))
  writer.write_checkpoint(target, [Unit({'target/x': spec}, second)], inner.append)
  assert inner == [12]
  np.testing.assert_array_equal(read(target)['target/x'], np.ones(3))


# --- What is written ----------------------------------------------------------


def files(folder) -> dict[str, bytes]:
  """Path -> content of every file but the manifest, which tells the time."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(pathlib.Path(folder).rglob('*'))
    if path.is_file() and path.name != manifest.NAME
  }


@pytest.fixture
def mha(tmp_path):
  return write_msgpack(tmp_path / 'mha' / 'checkpoint_1000', tiny_state())


@pytest.fixture
def uncompressed(mha, tmp_path, monkeypatch):
  """An uncompressed checkpoint in chunks unlike those that the converter makes."""
  with monkeypatch.context() as patch:
    patch.setattr(writer, '_CHUNK_BYTES', 50)
    return convert(mha, tmp_path / 'cut', '--num_kv_heads=4', '--compression=none')


KEPT = 'target.encoder.layers_0.mlp.wo.kernel'


@pytest.mark.parametrize(
  ('compression', 'metadata'),
  [
    ('none', None),
    ('zstd', {'id': 'zstd', 'level': 1}),
    ('gzip', {'id': 'gzip', 'level': 1}),
  ],
)
def test_unchanged_tensors_are_read_only_to_be_compressed(
  compression, metadata, uncompressed, tmp_path
):
  """Otherwise their files are copied as they are."""
  result = convert(uncompressed, tmp_path / 'out', f'--compression={compression}')
  chunks = files(uncompressed / KEPT)
  assert len(chunks) == 5  # 2 x 2, and .zarray
  assert (files(result / KEPT) == chunks) == (compression == 'none')
  arrays = list(result.glob('*/.zarray'))
  assert len(arrays) == NUM_ARRAYS
  assert all(json.loads(a.read_text())['compressor'] == metadata for a in arrays)
  old, new = read(uncompressed), read(result)
  changed = {path for path in old if old[path].shape != new[path].shape}
  assert {path.split('/')[-2] for path in changed} == {'key', 'value', 'kernel'}
  for path in old.keys() - changed:
    np.testing.assert_array_equal(new[path], old[path], err_msg=path)
  assert run(f'--verify={result}') == 0


@pytest.mark.parametrize(
  ('spoil', 'said'),
  [
    (lambda file: file.unlink(), 'chunks are there'),
    (lambda file: file.write_bytes(file.read_bytes()[:-1]), 'of 36 bytes'),
  ],
)
def test_damaged_files_are_not_copied(spoil, said, uncompressed, tmp_path, capsys):
  spoil(uncompressed / KEPT / '1.0')
  flags = ('--num_kv_heads=2', '--compression=none')
  assert run(f'--input={uncompressed}', f'--output={tmp_path / "out"}', *flags) == 1
  error = capsys.readouterr().err.splitlines()[-1]
  assert f'cannot read the tensor {KEPT.replace(".", "/")} of {uncompressed}' in error
  assert said in error
  assert not (tmp_path / 'out').exists()


def test_empty_folder_at_the_output_is_replaced(mha, tmp_path):
  target = tmp_path / 'out' / 'checkpoint_1000'
  target.mkdir(parents=True)
  assert run(f'--verify={convert(mha, target)}') == 0


class TestBucket:
  """In a bucket no folder is renamed: here a local folder is taken for one."""

  @pytest.fixture(autouse=True)
  def _bucket(self, monkeypatch):
    monkeypatch.setattr(writer, '_is_bucket', lambda path: True)

  def flags(self, mha, tmp_path):
    return f'--input={mha}', f'--output={tmp_path / "out"}', '--num_kv_heads=2'

  def test_msgpack_comes_last(self, mha, tmp_path, monkeypatch):
    target, seen = tmp_path / 'out' / 'checkpoint_1000', []
    write = writer._write_msgpack

    def watched(file, tree):
      seen.append((str(file), len(list(target.glob('*/.zarray')))))
      seen.append((target / manifest.NAME).exists())
      return write(file, tree)

    monkeypatch.setattr(writer, '_write_msgpack', watched)
    assert convert(mha, tmp_path / 'out') == target
    assert seen == [(str(target / 'checkpoint'), NUM_ARRAYS), True]
    assert not (target / 'gqa_t5x_unfinished').exists()
    assert run(f'--verify={target}') == 0

  def test_failure_leaves_nothing(self, mha, tmp_path, monkeypatch, capsys):
    def full(file, tree):
      raise OSError(28, 'No space left on device')

    monkeypatch.setattr(writer, '_write_msgpack', full)
    assert run(*self.flags(mha, tmp_path)) == 1
    assert 'it ran out while writing' in capsys.readouterr().err
    assert not (tmp_path / 'out' / 'checkpoint_1000').exists()

  def test_remains_of_a_killed_run_are_cleared(self, mha, tmp_path):
    target = tmp_path / 'out' / 'checkpoint_1000'
    (target / 'target.other').mkdir(parents=True)
    (target / 'gqa_t5x_unfinished').write_text('')
    convert(mha, tmp_path / 'out')
    assert not (target / 'target.other').exists()
    assert run(f'--verify={target}') == 0

  def test_other_files_are_not_touched(self, mha, tmp_path, capsys):
    target = tmp_path / 'out' / 'checkpoint_1000'
    target.mkdir(parents=True)
    (target / 'notes').write_text('mine')
    assert run(*self.flags(mha, tmp_path)) == 1
    assert f'{target} exists already' in capsys.readouterr().err
    assert os.listdir(target) == ['notes']


def test_output_that_cannot_be_written(mha, tmp_path, capsys):
  (tmp_path / 'file').write_text('mine')
  flags = (f'--output={tmp_path / "file" / "out"}', '--num_kv_heads=2')
  before = sorted(tmp_path.rglob('*'))
  assert run(f'--input={mha}', *flags) == 1
  err = capsys.readouterr().err
  assert err.startswith(f'error: cannot write {tmp_path}/file/out/checkpoint_1000: ')
  assert err.count('\n') == 1
  assert sorted(tmp_path.rglob('*')) == before
