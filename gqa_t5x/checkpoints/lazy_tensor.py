"""Tensors that are not in memory yet, so that a checkpoint converts as a stream."""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable

import numpy as np

from gqa_t5x.errors import BadInput


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """Shape and NumPy dtype of one tensor of a checkpoint."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Bytes, uncompressed."""
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """An uncompressed zarr array on a local disk: one file a chunk, all of one size.

  `name` is for messages; `chunks` is the shape of a chunk (those at the edges are
  filled up), and `file_bytes` are the bytes of each of the `num_files`.
  """

  name: str
  folder: str
  chunks: tuple[int, ...]
  num_files: int
  file_bytes: int

  def copy(self, folder: str) -> None:
    """Copies the files into a new folder; BadInput if one is missing or cut."""
    os.mkdir(folder)
    files = sorted(os.listdir(self.folder))
    chunks = [name for name in files if not name.startswith('.')]
    if len(chunks) != self.num_files:
      raise self._damaged(f'{len(chunks)} of {self.num_files} chunks are there')
    for name in files:
      source = os.path.join(self.folder, name)
      size = os.path.getsize(source)
      if name in chunks and size != self.file_bytes:
        raise self._damaged(f'{name} has {size:,} of {self.file_bytes:,} bytes')
      shutil.copyfile(source, os.path.join(folder, name))

  def _damaged(self, what: str) -> BadInput:
    return BadInput(f'cannot read the tensor {self.name} of {self.folder}: {what}')


@dataclasses.dataclass(frozen=True)
class LazyTensor(TensorSpec):
  """A tensor that `read` reads anew at every call.

  `stored` are its files, where they may be copied as they are.
  """

  read: Callable[[], np.ndarray]
  stored: StoredTensor | None = None

  @classmethod
  def of(cls, array: np.ndarray) -> 'LazyTensor':
    """Wraps an array that is in memory already."""
    return cls(tuple(array.shape), np.dtype(array.dtype), lambda: array)

  def checked(self, path: str) -> 'LazyTensor':
    """The same tensor; reading values that are not finite raises BadInput."""

    def read() -> np.ndarray:
      array = self.read()
      if not np.isfinite(array).all():
        count = array.size - np.count_nonzero(np.isfinite(array))
        raise BadInput(
          f'{path} has {count:,} values that are not finite, of {array.size:,}: this'
          ' checkpoint is of a run that diverged, or damaged; take an earlier one'
        )
      return array

    return LazyTensor(self.shape, self.dtype, read)


@dataclasses.dataclass(frozen=True)
class Unit:
  """The smallest piece of work: tensors that are converted together.

  One attention module with its moments, or one tensor that is copied. A converted
  checkpoint is a list of units: sizes are known before anything is read, peak memory
  is that of the largest unit, and units do not depend on each other. `compute` reads
  what it needs; `outputs` and what it returns go by the tensors' paths. `scratch` are
  bytes that it takes beside its inputs and outputs.
  """

  outputs: dict[str, TensorSpec]
  compute: Callable[[], dict[str, np.ndarray]]
  scratch: int = 0

  @property
  def nbytes(self) -> int:
    """Bytes of the outputs, uncompressed."""
    return sum(spec.nbytes for spec in self.outputs.values())
