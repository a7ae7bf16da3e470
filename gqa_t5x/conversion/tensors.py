"""Tensors that are not in memory yet, so that a checkpoint converts as a stream."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """Shape and NumPy dtype of one tensor of a checkpoint."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def size(self) -> int:
    """Elements."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes, uncompressed."""
    return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class LazyTensor(TensorSpec):
  """A tensor that is read when asked for.

  Attributes:
    read: () -> the array, read anew at every call.
  """

  read: Callable[[], np.ndarray]

  @classmethod
  def of(cls, array: np.ndarray) -> 'LazyTensor':
    """Wraps an array that is in memory already."""
    return cls(tuple(array.shape), np.dtype(array.dtype), lambda: array)


@dataclasses.dataclass(frozen=True)
class Unit:
  """The smallest piece of work: tensors that are converted together.

  One attention module with its moments, or one tensor that is copied. A converted
  checkpoint is a list of units: sizes are known before anything is read, peak memory
  is that of the largest unit, and units do not depend on each other.

  Attributes:
    outputs: path -> shape and dtype of each tensor it makes.
    compute: () -> path -> array; reads what it needs.
  """

  outputs: dict[str, TensorSpec]
  compute: Callable[[], dict[str, np.ndarray]]

  @property
  def nbytes(self) -> int:
    """Bytes of the outputs, uncompressed."""
    return sum(spec.nbytes for spec in self.outputs.values())
