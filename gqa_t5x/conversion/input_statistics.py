"""Second moments of what attention modules read: their file, and what stands in for it.

Of the inputs x, not of heads: one file of a checkpoint serves every number of
key/value heads and every grouping. It is an .npz (np.load reads it) of float32 arrays
and an index.json, which says which array belongs to which module, and where they are
from. An array that modules share (all cross-attention layers read one encoder output)
is stored once. `gqa_t5x.calibrate` writes the file.
"""

import contextlib
import dataclasses
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from gqa_t5x import files
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.checkpoints.tree import TARGET, norms_before
from gqa_t5x.errors import BadInput, first_line

_INDEX = 'index.json'
_FORMAT = 1
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError)


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
  """Writes the file, whole or not at all, one array at a time.

  Args:
    path: the file; replaced if it exists.
    statistics: by the module's path. An array that occurs twice (the same object) is
      written once.
    info: where they are from, for JSON.

  Raises:
    BadInput: a moment is not finite. Nothing is left behind.
  """
  with (
    files.whole(path) as temporary,
    temporary.open('wb') as file,
    zipfile.ZipFile(file, 'w') as archive,
  ):
    index = {'format': _FORMAT, 'info': dict(info)}
    index['modules'] = _write_arrays(archive, statistics)
    archive.writestr(_INDEX, json.dumps(index, indent=1))


def _write_arrays(
  archive: zipfile.ZipFile, statistics: Mapping[str, InputStatistics]
) -> dict[str, dict[str, str]]:
  """Writes the arrays; returns module -> moment -> name in the archive."""
  names: dict[int, str] = {}
  modules: dict[str, dict[str, str]] = {}
  for module, of_module in statistics.items():
    modules[module] = {}
    for moment in _NAMES:
      array = getattr(of_module, moment)
      if id(array) not in names:
        if not np.isfinite(array).all():
          raise BadInput(
            f'the {moment} moments of {module} are not finite: check the loss of the'
            ' checkpoint'
          )
        names[id(array)] = f'{module}/{moment}.npy'
        # force_zip64: the size is not known before, and may be above 2 GiB.
        with archive.open(names[id(array)], 'w', force_zip64=True) as member:
          np.lib.format.write_array(member, np.asarray(array, np.float32))
      modules[module][moment] = names[id(array)]
  return modules


@dataclasses.dataclass(frozen=True)
class StatisticsFile:
  """A file of statistics; arrays are read when asked for.

  Attributes:
    info: where they are from: checkpoint, step, task, split, num_sequences, ...
    modules: module -> moment -> name of the array in the file.
  """

  path: epath.Path
  info: Mapping[str, Any]
  modules: Mapping[str, Mapping[str, str]]

  def check(self, module: str, width: int) -> None:
    """Raises BadInput unless the file has a module of a model of width D.

    Nothing but the shapes of its arrays is read.
    """
    for name in self._names(module):
      with self._member(module, name) as member:
        np.lib.format.read_magic(member)
        shape, _, _ = np.lib.format.read_array_header_1_0(member)
      if shape not in ((width,), (width, width)):
        raise BadInput(
          f'{self.path}: the statistics of {module} are of shape {shape}, expected'
          f' [D, D] or [D] with D={width}, the width of the model: they are of another'
          ' checkpoint'
        )

  def read(self, module: str) -> InputStatistics:
    """Reads the statistics of one attention module, float32 [D, D] each.

    Raises:
      BadInput: the module is missing, or the file is damaged or not finite.
    """
    arrays: dict[str, np.ndarray] = {}
    for name in self._names(module):
      with self._member(module, name) as member:
        arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
      if not np.isfinite(arrays[name]).all():
        raise BadInput(
          f'{self.path} has values that are not finite in {name}, of {module}; make it'
          ' anew from a checkpoint that has none'
        )
    names = self.modules[module]
    return InputStatistics(**{moment: arrays[names[moment]] for moment in _NAMES})

  def _names(self, module: str) -> set[str]:
    """Names of a module's arrays in the file."""
    if module not in self.modules:
      raise BadInput(
        f'{self.path} has no statistics of {module}; it has {len(self.modules)} modules'
        f' of step {self.info.get("step")} of {self.info.get("checkpoint")}. Make them'
        ' anew from your checkpoint: python -m gqa_t5x.calibrate --help'
      )
    with _damage(self.path, f'the statistics of {module}'):
      return {self.modules[module][moment] for moment in _NAMES}

  @contextlib.contextmanager
  def _member(self, module: str, name: str) -> Iterator[BinaryIO]:
    with (
      _damage(self.path, f'the statistics of {module}'),
      self.path.open('rb') as file,
      zipfile.ZipFile(file) as archive,
      archive.open(name) as member,
    ):
      yield member


def open_statistics(path: epath.PathLike) -> StatisticsFile:
  """Opens a file of statistics; reads its index alone.

  Raises:
    BadInput: it is missing, damaged, or something else.
  """
  path = epath.Path(path)
  if not path.exists() or path.is_dir():
    raise BadInput(
      f'there is no file of statistics at {path}; make one: python -m gqa_t5x.calibrate'
      ' --help'
    )
  with _damage(path, 'its index'):
    with path.open('rb') as file, zipfile.ZipFile(file) as archive:
      index = json.loads(archive.read(_INDEX))
    if index['format'] != _FORMAT:
      raise ValueError(f'format {index["format"]}, expected {_FORMAT}')
    return StatisticsFile(path, dict(index['info']), dict(index['modules']))


@contextlib.contextmanager
def _damage(path: epath.Path, part: str) -> Iterator[None]:
  """Turns what a damaged file raises into one clear message."""
  try:
    yield
  except _DAMAGE as error:
    raise BadInput(
      f'{path} is truncated, damaged or no file of statistics: cannot read {part}'
      f' ({first_line(error)})'
    ) from error
