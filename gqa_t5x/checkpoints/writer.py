"""Writes T5X's legacy layout, whole or not at all.

On a local disk everything goes into a temporary folder next to the result, which is
renamed at the very end. In a bucket a folder cannot be renamed at once, so tensors go
to their final place, and the msgpack, without which T5X sees no checkpoint, goes last.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x import files
from gqa_t5x.checkpoints.jobs import BUDGET, Job, run_jobs
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, TensorSpec, Unit
from gqa_t5x.checkpoints.t5x_layouts import MSGPACK, kvstore
from gqa_t5x.checkpoints.tree import TARGET, unflatten
from gqa_t5x.errors import BadInput, first_line

# What T5X, by TensorStore, reads in tensors; gzip is what it writes itself.
COMPRESSORS = {
  'none': None,
  'zstd': {'id': 'zstd', 'level': 1},
  'gzip': {'id': 'gzip'},
}
# T5X's checkpoints.VERSION.
_VERSION = 3
_CHUNK_BYTES = 64 * 2**20
_UNFINISHED = 'gqa_t5x_unfinished'

# path -> `describe_tensor` of each tensor that is not a copy.
Changed = Mapping[str, Mapping[str, Any]]


def write_checkpoint(
  path: epath.Path,
  units: Sequence[Unit],
  on_written: Callable[[int], None],
  *,
  source: Mapping[str, TensorSpec] | None = None,
  compression: str = 'zstd',
  add_files: Callable[[epath.Path, Changed], None] | None = None,
) -> None:
  """Runs the units, several at a time, and writes what they make.

  Args:
    path: the checkpoint folder to make.
    units: what to write.
    on_written: called with the bytes (uncompressed) of each unit once written.
    source: the tensors of the checkpoint that is read, by path. A unit whose output is
      one of these very tensors copies it.
    compression: a key of COMPRESSORS.
    add_files: called at the end with the folder, under its temporary name on a local
      disk, and the tensors that are not copies: writes what else belongs there.

  Raises:
    BadInput: no space, or a part of the source cannot be read. Nothing is left.
  """
  source = source or {}
  nbytes = sum(unit.nbytes for unit in units)
  # What is written appears at `path` on success only.
  whole_or_nothing = _in_bucket if _is_bucket(path) else files.whole_folder
  with _clear_errors(path, nbytes), whole_or_nothing(path) as folder:
    write = _TensorWriter(folder, compression)
    jobs = [_unit_job(unit, source, write) for unit in units]
    # Room for the largest tensor twice, so that large ones overlap as well.
    budget = BUDGET + 2 * max((unit.nbytes for unit in units), default=0)
    results = run_jobs(jobs, lambda i: on_written(units[i].nbytes), budget=budget)
    tree, changed = {}, {}
    for leaves, descriptions in results:
      tree |= leaves
      changed |= descriptions
    if add_files:
      add_files(folder, changed)
    _write_msgpack(folder / MSGPACK, tree)


def write_tensors(
  path: epath.Path,
  tensors: Mapping[str, LazyTensor],
  add_files: Callable[[epath.Path, Changed], None],
) -> None:
  """Writes tensors by their paths as a checkpoint; see `write_checkpoint`."""

  def unit(name: str, tensor: LazyTensor) -> Unit:
    return Unit({name: tensor}, lambda: {name: tensor.read()})

  units = [unit(*item) for item in tensors.items()]
  check_space(path, sum(unit.nbytes for unit in units))
  write_checkpoint(path, units, lambda _: None, add_files=add_files)


def _unit_job(
  unit: Unit, source: Mapping[str, TensorSpec], write: '_TensorWriter'
) -> Job:
  """The work on one unit, from reading to writing.

  Its memory, roughly: a copy holds the tensor, and again its chunks on their way in or
  out, but nothing if files are copied. What is converted holds its input in float32 and
  float64, and its output.
  """
  changed = {p for p, spec in unit.outputs.items() if spec is not source.get(p)}
  read = sum(source[p].nbytes for p in unit.outputs if p in source)
  nbytes = 3 * read + 2 * unit.nbytes if changed else 2 * unit.nbytes
  nbytes += unit.scratch

  if not changed and all(write.can_copy(p, source[p]) for p in unit.outputs):
    return Job(lambda: ({p: write.copy(p, source[p]) for p in unit.outputs}, {}), 0)

  def run() -> tuple[dict[str, Any], dict[str, Mapping]]:
    arrays = unit.compute()
    described = {p: describe_tensor(a) for p, a in arrays.items() if p in changed}
    return {name: write(name, array) for name, array in arrays.items()}, described

  return Job(run, nbytes)


def describe_tensor(array: np.ndarray) -> dict[str, Any]:
  """What can be checked later of a tensor, as it is written.

  Returns:
    Its shape, its dtype, and the SHA-256 of its elements: row by row, little-endian.
  """
  flat = np.ascontiguousarray(array).reshape(-1)
  return {
    'shape': list(array.shape),
    'dtype': array.dtype.name,
    'sha256': hashlib.sha256(flat.view(np.uint8)).hexdigest(),
  }


def check_space(path: epath.Path, nbytes: int) -> None:
  """Raises unless a local disk has room for `nbytes` at `path`."""
  if not _is_bucket(path) and nbytes > free_bytes(path):
    raise _no_space(path, nbytes)


def free_bytes(path: epath.Path) -> int:
  """Bytes that are free on the local disk of a folder that need not exist yet."""
  return shutil.disk_usage(next(p for p in path.parents if p.exists())).free


def _no_space(path: epath.Path, nbytes: int, detail: str = '') -> BadInput:
  return BadInput(
    f'no disk space for {path}: {detail}{nbytes:,} bytes are needed,'
    f' {free_bytes(path):,} are free; free some, or choose another --output'
  )


@contextlib.contextmanager
def _clear_errors(path: epath.Path, nbytes: int) -> Iterator[None]:
  """Turns what a full or unwritable disk raises into one clear message."""
  try:
    yield
  except BadInput:
    raise
  except (OSError, ValueError) as error:  # TensorStore raises ValueError
    text = first_line(error)
    if 'No space left on device' in text or 'Disk quota exceeded' in text:
      raise _no_space(path, nbytes, 'it ran out while writing, ') from error
    if isinstance(error, OSError) or 'os_error_code' in text:
      raise BadInput(f'cannot write {path}: {text}') from error
    raise


def is_unfinished(path: epath.Path) -> bool:
  """Says whether a checkpoint folder is what a killed run left in a bucket."""
  return (path / _UNFINISHED).exists() and not (path / MSGPACK).exists()


def _is_bucket(path: epath.Path) -> bool:
  return str(path).startswith('gs://')


@contextlib.contextmanager
def _in_bucket(path: epath.Path) -> Iterator[epath.Path]:
  """Gives `path` itself, marked as unfinished; clears it if anything fails."""
  path.mkdir(parents=True, exist_ok=True)
  files.remove_contents(path)
  (path / _UNFINISHED).write_text('Being written by gqa_t5x.convert.\n', 'utf-8')
  try:
    yield path
    (path / _UNFINISHED).unlink()
  except BaseException:
    (path / MSGPACK).unlink(missing_ok=True)
    path.rmtree(missing_ok=True)
    raise


class _TensorWriter:
  """Writes tensors into the folder of a checkpoint; may be called by many threads."""

  def __init__(self, folder: epath.Path, compression: str):
    """Leaves flushing to the end: after each file, it would take half as long again."""
    import tensorstore as ts

    self._store = kvstore(folder)
    self._compressor = COMPRESSORS[compression]
    self._context = ts.Context({'file_io_sync': False})

  def __call__(self, name: str, array: np.ndarray) -> Any:
    """Writes one tensor, if T5X keeps it in TensorStore.

    Returns:
      What the msgpack holds: a TensorStore spec with a relative path, or the array.
    """
    if not _in_tensorstore(name, TensorSpec(array.shape, array.dtype)):
      return np.asarray(array)
    import tensorstore as ts

    spec, key = self._spec(name, array, _chunks(array.shape, array.dtype.itemsize))
    place = {**self._store, 'path': self._store['path'] + key}
    opened = ts.open(
      {**spec, 'kvstore': place, 'store_data_equal_to_fill_value': True},
      create=True,
      context=self._context,
    ).result()
    # Nobody changes the array any more: without this, TensorStore copies it first.
    opened.write(array, can_reference_source_data_indefinitely=True).result()
    return self._listed(spec, key)

  def can_copy(self, name: str, tensor: TensorSpec) -> bool:
    """Says whether the tensor's files may be copied as they are."""
    stored = getattr(tensor, 'stored', None)
    return (
      stored is not None
      and self._compressor is None
      and self._store['driver'] == 'file'
      and _in_tensorstore(name, tensor)
    )

  def copy(self, name: str, tensor: LazyTensor) -> Any:
    """Copies a tensor's files; returns what the msgpack holds."""
    spec, key = self._spec(name, tensor, tensor.stored.chunks)
    tensor.stored.copy(os.path.join(self._store['path'], key))
    return self._listed(spec, key)

  def _spec(
    self, name: str, tensor: Any, chunks: Sequence[int]
  ) -> tuple[dict[str, Any], str]:
    """TensorStore's specification of a tensor, and its folder in the checkpoint."""
    metadata = {
      'shape': list(tensor.shape),
      'chunks': list(chunks),
      'compressor': self._compressor,
    }
    spec = {'driver': 'zarr', 'dtype': tensor.dtype.name, 'metadata': metadata}
    return spec, name.replace('/', '.') + '/'

  def _listed(self, spec: dict[str, Any], key: str) -> dict[str, Any]:
    """The specification as the msgpack holds it: with a relative path."""
    if self._store['driver'] == 'gcs':
      # T5X puts the bucket in when it restores, so that checkpoints can be moved.
      relative = {'driver': 'gcs', 'bucket': 't5x-dummy-bucket', 'path': key}
    else:
      relative = {'driver': 'file', 'path': key}
    return {**spec, 'kvstore': relative}


def _in_tensorstore(name: str, spec: TensorSpec) -> bool:
  """T5X's rule: what is partitioned. Vectors v_row and v_col, step and unused are not.

  T5X reads a tensor without partitioning from the msgpack only.
  """
  return name.startswith(TARGET) or (
    name.rpartition('/')[2] in ('v', 'm') and spec.shape != (1,)
  )


def _chunks(shape: tuple[int, ...], itemsize: int) -> list[int]:
  """Halves the longest side until a chunk has at most 64 MiB, as T5X aims at."""
  chunks = [max(n, 1) for n in shape]
  while int(np.prod(chunks)) * itemsize > _CHUNK_BYTES:
    longest = int(np.argmax(chunks))
    chunks[longest] = -(-chunks[longest] // 2)
  return chunks


def _write_msgpack(file: epath.Path, tree: dict[str, Any]) -> None:
  from flax import serialization  # here: it imports JAX

  # A spec is a dict: flattened paths end at it, so it nests where it belongs.
  contents = {'version': _VERSION, 'optimizer': unflatten(tree)}
  file.write_bytes(serialization.msgpack_serialize(contents))
