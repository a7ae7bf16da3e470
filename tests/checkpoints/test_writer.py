"""The stream: jobs side by side within a budget; the same files, whatever ends first.

What it takes from the system, and leaves when killed: test_conversion_process.py.
"""

import itertools
import json
import os
import pathlib
import random
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from gqa_t5x import convert
from gqa_t5x.checkpoints import folders, writer
from gqa_t5x.checkpoints.jobs import Job, run_jobs
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, Unit
from gqa_t5x.conversion import manifest
from gqa_t5x.conversion.kernels import AttentionModule
from gqa_t5x.conversion.methods import convert_module
from helpers.trees import flat, tiny_shapes, tiny_state, write_msgpack

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


# --- What is written ----------------------------------------------------------


def files(folder) -> dict[str, bytes]:
  """Path -> content of every file but the manifest, which tells the time."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(pathlib.Path(folder).rglob('*'))
    if path.is_file() and path.name != manifest.NAME
  }


def run(*args):
  return convert.main(['convert', *map(str, args)])


def read(folder):
  tensors = folders.open_checkpoint(epath.Path(folder))
  return {path: tensor.read() for path, tensor in tensors.items()}


@pytest.fixture
def mha(tmp_path):
  return write_msgpack(tmp_path / 'mha' / 'checkpoint_1000', tiny_state())


def test_files_do_not_depend_on_timing(mha, tmp_path, monkeypatch):
  """Byte for byte: with one thread, and with four that end in a random order."""
  write = writer._TensorWriter.__call__

  def jittery(*args):
    time.sleep(random.random() / 100)
    return write(*args)

  found = []
  for processors in (1, 4, 4):
    monkeypatch.setattr(writer._TensorWriter, '__call__', jittery)
    monkeypatch.setattr(os, 'cpu_count', lambda n=processors: n)
    output = tmp_path / f'out{len(found)}'
    assert run(f'--input={mha}', f'--output={output}', '--num_kv_heads=2') == 0
    found.append(files(output / 'checkpoint_1000'))
  assert len(found[0]) == 2 * NUM_ARRAYS + 1
  assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
  ('compression', 'metadata'),
  [
    ('none', None),
    ('zstd', {'id': 'zstd', 'level': 1}),
    ('gzip', {'id': 'gzip', 'level': 1}),
  ],
)
def test_compression(compression, metadata, mha, tmp_path):
  flags = ('--num_kv_heads=4', f'--compression={compression}')
  assert run(f'--input={mha}', f'--output={tmp_path / "out"}', *flags) == 0
  folder = tmp_path / 'out' / 'checkpoint_1000'
  arrays = list(folder.glob('*/.zarray'))
  assert len(arrays) == NUM_ARRAYS
  assert all(json.loads(a.read_text())['compressor'] == metadata for a in arrays)
  got = read(folder)
  for path, value in flat(tiny_state()):
    np.testing.assert_array_equal(got[path], value)


@pytest.fixture
def uncompressed(mha, tmp_path, monkeypatch):
  """An uncompressed checkpoint in chunks unlike those that the converter makes."""
  flags = ('--num_kv_heads=4', '--compression=none')
  with monkeypatch.context() as patch:
    patch.setattr(writer, '_CHUNK_BYTES', 50)
    assert run(f'--input={mha}', f'--output={tmp_path / "cut"}', *flags) == 0
  return tmp_path / 'cut' / 'checkpoint_1000'


KEPT = 'target.encoder.layers_0.mlp.wo.kernel'


def test_files_of_unchanged_tensors_are_copied_as_they_are(uncompressed, tmp_path):
  flags = ('--num_kv_heads=2', '--compression=none')
  assert run(f'--input={uncompressed}', f'--output={tmp_path / "out"}', *flags) == 0
  result = tmp_path / 'out' / 'checkpoint_1000'
  chunks = files(uncompressed / KEPT)
  assert len(chunks) == 5  # 2 x 2, and .zarray
  assert files(result / KEPT) == chunks
  old, new = read(uncompressed), read(result)
  changed = {path for path in old if old[path].shape != new[path].shape}
  assert {path.split('/')[-2] for path in changed} == {'key', 'value', 'kernel'}
  for path in old.keys() - changed:
    np.testing.assert_array_equal(new[path], old[path], err_msg=path)
  assert run(f'--verify={result}') == 0


@pytest.mark.parametrize(
  ('compression', 'kept'), [('none', False), ('zstd', True), ('gzip', True)]
)
def test_unchanged_tensors_are_read_where_that_is_needed(
  compression, kept, uncompressed, tmp_path, monkeypatch
):
  names, write = [], writer._TensorWriter.__call__

  def spy(self, name, array):
    names.append(name.replace('/', '.'))
    return write(self, name, array)

  monkeypatch.setattr(writer._TensorWriter, '__call__', spy)
  flags = ('--num_kv_heads=2', f'--compression={compression}')
  assert run(f'--input={uncompressed}', f'--output={tmp_path / "out"}', *flags) == 0
  assert (KEPT in names) == kept


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
  assert run(f'--input={mha}', f'--output={target}', '--num_kv_heads=2') == 0
  assert run(f'--verify={target}') == 0


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
    assert run(*self.flags(mha, tmp_path)) == 0
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
    assert run(*self.flags(mha, tmp_path)) == 0
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


def test_no_more_is_read_than_is_written(tmp_path):
  """A tensor is read when its turn comes, not before, and is not kept."""
  alive, most, lock = set(), [], threading.Lock()

  class Tracked(np.ndarray):
    def __del__(self):
      alive.discard(id(self))

  def make(i):
    array = np.zeros(250_000, np.float32).view(Tracked)
    with lock:
      alive.add(id(array))
      most.append(len(alive))
    return {f'target/t{i}': array}

  spec = LazyTensor.of(np.zeros(250_000, np.float32))
  units = [Unit({f'target/t{i}': spec}, lambda i=i: make(i)) for i in range(40)]
  writer.write_checkpoint(epath.Path(tmp_path / 'checkpoint_1'), units, lambda n: None)
  assert len(most) == 40
  assert max(most) <= 2 * min(2 * os.cpu_count(), 8)


# --- From GQA to GQA ----------------------------------------------------------


def mean_of(kernels, source_heads, num_kv_heads):
  module = AttentionModule(
    path='decoder/layers_0/self_attention',
    num_heads=64,
    source_num_kv_heads=source_heads,
    num_kv_heads=num_kv_heads,
    head_dim=4,
  )
  return convert_module(kernels, module, 'mean')


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('steps', [(64, 16, 8), (64, 32, 16, 8, 4, 2, 1), (64, 8, 1)])
def test_mean_in_steps_is_the_mean_at_once(steps, dtype):
  """Bit for bit, although the means between are rounded to be saved."""
  rng = np.random.default_rng(0)
  values = rng.standard_normal((2, 6, 64 * 4)).astype(dtype)
  kernels = dict(zip(('key', 'value'), values, strict=True))
  stepped = kernels
  for before, after in itertools.pairwise(steps):
    stepped = mean_of(stepped, before, after)
  at_once = mean_of(kernels, 64, steps[-1])
  for name, kernel in kernels.items():
    assert stepped[name].dtype == at_once[name].dtype == dtype
    np.testing.assert_array_equal(stepped[name], at_once[name])
    # It is the mean: six roundings to at most half a unit in the last place each.
    exact = kernel.astype(np.float64).reshape(6, steps[-1], -1, 4).mean(axis=2)
    error = np.abs(at_once[name].astype(np.float64) - exact.reshape(6, -1)).max()
    assert error <= 6 * float(ml_dtypes.finfo(dtype).eps)
