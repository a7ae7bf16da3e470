"""Second moments of what attention modules read: their file, and what stands in for it.

Of the inputs x, not of heads: one file of a checkpoint serves every number of
key/value heads and every grouping. `gqa_t5x.calibrate` writes it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.checkpoints.tree import TARGET, norms_before
from gqa_t5x.conversion import module_arrays
from gqa_t5x.errors import BadInput

_WHAT = 'statistics'


@dataclasses.dataclass(frozen=True)
class InputStatistics:
  """Second moments of the inputs of one attention module, after the layer norm.

  Each is [D, D], or [D] where it is diagonal: without data, the squared scale of the
  layer norm stands in for it (docs/conversion.md).

  Attributes:
    query: E[x^T x] of the inputs of the queries, a row vector x.
    key: the same of the keys' inputs, less their mean over the sequence: a constant
      added to all logits of a query does not change attention.
    value: E[x^T x] of the values' inputs.
  """

  query: np.ndarray
  key: np.ndarray
  value: np.ndarray


_NAMES = tuple(field.name for field in dataclasses.fields(InputStatistics))


def from_norms(
  tensors: Mapping[str, LazyTensor], kind: str, module: str
) -> InputStatistics:
  """What the weights alone say of a module's inputs: as if white before the layer norm.

  Args:
    tensors: of the checkpoint, by path.
    kind: of attention, a key of tree.KINDS.
    module: its path, e.g. "decoder/layers_0/self_attention".

  Returns:
    float64 [D] each: the squared scales of the layer norms in front of it.
  """
  query, key = (
    np.square(tensors[TARGET + norm].read(), dtype=np.float64)
    for norm in norms_before(kind, module)
  )
  return InputStatistics(query=query, key=key, value=key)


def write_statistics(
  path: epath.PathLike,
  statistics: Mapping[str, InputStatistics],
  info: Mapping[str, Any],
) -> None:
  """Writes the file, whole or not at all; arguments are those of `module_arrays.write`.

  Raises:
    BadInput: a moment is not finite. Nothing is left behind.
  """
  arrays = {
    module: {name: getattr(of_module, name) for name in _NAMES}
    for module, of_module in statistics.items()
  }
  module_arrays.write(path, _WHAT, arrays, info)


class StatisticsFile(module_arrays.ArraysFile):
  """A file of statistics."""

  def check(self, module: str, width: int) -> None:
    """Raises BadInput unless the file has a module of a model of width D.

    Nothing but the shapes of its arrays is read.
    """
    for name in _NAMES:
      shape = self.shape(module, name)
      if shape not in ((width,), (width, width)):
        raise BadInput(
          f'{self.path}: the statistics of {module} are of shape {shape}, expected'
          f' [D, D] or [D] with D={width}, the width of the model: they are of another'
          ' checkpoint'
        )

  def check_tokens(self, least: int, why: str) -> None:
    """Raises BadInput if it is known to be of fewer tokens, of inputs or of targets."""
    tokens = min(self.info.get('num_tokens', {'': least}).values())
    if tokens < least:
      raise BadInput(
        f'{self.path} is of {tokens} tokens, fewer than {why}: that many directions'
        ' cannot be told apart. Make it anew from more texts'
      )

  def read(self, module: str) -> InputStatistics:
    """Reads the statistics of one attention module, float32 [D, D] each.

    Raises:
      BadInput: the module is missing, or the file is damaged or not finite.
    """
    return InputStatistics(**self.arrays(module))


def open_statistics(path: epath.PathLike) -> StatisticsFile:
  """Opens a file of statistics; reads its index alone.

  Raises:
    BadInput: it is missing, damaged, or something else.
  """
  return StatisticsFile.open(path, _WHAT)
