"""Writes T5X's legacy layout, whole or not at all.

Everything goes into a temporary folder beside the result, which is renamed at the very
end: whatever happens before that, there is no folder that T5X would take for a
checkpoint.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x.conversion.checkpoint import MSGPACK, kvstore
from gqa_t5x.conversion.errors import ConversionError
from gqa_t5x.conversion.params import TARGET, unflatten
from gqa_t5x.conversion.tensors import TensorSpec, Unit

# T5X's checkpoints.VERSION.
_VERSION = 3
_CHUNK_BYTES = 64 * 2**20
_COMPRESSOR = {'id': 'zstd', 'level': 1}
_SUFFIX = '.tmp-convert'


def write_checkpoint(
  path: epath.Path, units: Sequence[Unit], on_written: Callable[[int], None]
) -> None:
  """Runs the units one after the other and writes what they make.

  Args:
    path: the checkpoint folder to make.
    units: the work.
    on_written: called with the bytes (uncompressed) of each unit once written.

  Raises:
    ConversionError: no space, or a part of the source cannot be read. Nothing is left.
  """
  nbytes = sum(unit.nbytes for unit in units)
  with _clear_errors(path, nbytes), _whole_or_nothing(path) as folder:
    tree: dict[str, Any] = {}
    for unit in units:
      for name, array in unit.compute().items():
        tree[name] = _write_tensor(folder, name, array)
      on_written(unit.nbytes)
    _write_msgpack(folder / MSGPACK, tree)


def check_space(path: epath.Path, nbytes: int) -> None:
  """Raises unless a local disk has room for `nbytes` at `path`."""
  if str(path).startswith('gs://'):
    return
  if nbytes > _free_bytes(path):
    raise _no_space(path, nbytes)


def _free_bytes(path: epath.Path) -> int:
  return shutil.disk_usage(next(p for p in path.parents if p.exists())).free


def _no_space(path: epath.Path, nbytes: int, detail: str = '') -> ConversionError:
  return ConversionError(
    f'no disk space for {path}: {detail}{nbytes:,} bytes are needed,'
    f' {_free_bytes(path):,} are free; free some, or choose another --output'
  )


@contextlib.contextmanager
def _clear_errors(path: epath.Path, nbytes: int) -> Iterator[None]:
  """Turns what a full or unwritable disk raises into one clear message."""
  try:
    yield
  except ConversionError:
    raise
  except (OSError, ValueError) as error:  # TensorStore raises ValueError
    text = str(error).splitlines()[0]
    if 'No space left on device' in text or 'Disk quota exceeded' in text:
      raise _no_space(path, nbytes, 'it ran out while writing, ') from error
    if isinstance(error, OSError) or 'os_error_code' in text:
      raise ConversionError(f'cannot write {path}: {text}') from error
    raise


@contextlib.contextmanager
def _whole_or_nothing(path: epath.Path) -> Iterator[epath.Path]:
  """Gives a temporary sibling of `path`; renames it on success, else removes it."""
  local = not str(path).startswith('gs://')
  folder = path.parent / (path.name + _SUFFIX)
  made = [p for p in path.parents if not p.exists()] if local else []
  lock = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if local:
      lock = _lock(folder)
    else:
      folder.mkdir(parents=True, exist_ok=True)
    _remove_contents(folder)
    yield folder
    folder.rename(path)
  except BaseException:
    # `lock` is None here if another conversion holds the folder: then it is not ours.
    if not local or lock is not None:
      folder.rmtree(missing_ok=True)
    for parent in made:
      with contextlib.suppress(OSError):
        os.rmdir(parent)
    raise
  finally:
    if lock is not None:
      os.close(lock)


def _lock(folder: epath.Path) -> int:
  """Makes the temporary folder ours; the system frees it when the process ends."""
  import fcntl

  folder.mkdir(exist_ok=True)
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    os.close(handle)
    raise ConversionError(
      f'another conversion is writing {folder}; wait for it, or choose another --output'
    ) from error
  return handle


def _remove_contents(folder: epath.Path) -> None:
  """Clears what a killed run left behind."""
  for entry in folder.iterdir():
    if entry.is_dir():
      entry.rmtree()
    else:
      entry.unlink()


def _write_tensor(folder: epath.Path, name: str, array: np.ndarray) -> Any:
  """Writes one tensor, if T5X keeps it in TensorStore.

  Args:
    folder: of the checkpoint.
    name: "target/decoder/...".
    array: the tensor.

  Returns:
    What the msgpack holds: a TensorStore spec with a relative path, or the array.
  """
  if not _in_tensorstore(name, TensorSpec(array.shape, array.dtype)):
    return np.asarray(array)
  import tensorstore as ts

  key = name.replace('/', '.') + '/'
  store = kvstore(folder)
  spec = {
    'driver': 'zarr',
    'dtype': array.dtype.name,
    'metadata': {
      'shape': list(array.shape),
      'chunks': _chunks(array.shape, array.dtype.itemsize),
      'compressor': _COMPRESSOR,
    },
  }
  absolute = {**spec, 'kvstore': {**store, 'path': store['path'] + key}}
  opened = ts.open(
    {**absolute, 'store_data_equal_to_fill_value': True}, create=True
  ).result()
  opened.write(array).result()
  if store['driver'] == 'gcs':
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
