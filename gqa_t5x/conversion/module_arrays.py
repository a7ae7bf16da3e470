"""Files of arrays about the attention modules of one checkpoint.

An .npz (np.load reads it) of float32 arrays and an index.json, which says which array
belongs to which module, and where they are from. An array that modules share (all
cross-attention layers read one encoder output) is stored once. Some values of the
checkpoint's kernels are there, too: by them another checkpoint is known.
"""

import contextlib
import dataclasses
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from gqa_t5x import files
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.errors import BadInput, first_line

_INDEX = 'index.json'
_FORMAT = 1
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError)
_SAMPLED = ('key', 'out')  # Every conversion changes the one, refitting the other.
_SAMPLES = 8
_TOLERANCE = 0.01  # Relative: above the rounding of 16 bits.


def samples(
  params: Mapping[str, LazyTensor], modules: Iterable[str]
) -> dict[str, dict[str, list[float]]]:
  """Some values of the kernels of attention modules, as `ArraysFile.info` holds them.

  Args:
    params: path ("decoder/layers_0/...") -> parameter.
    modules: their paths.

  Returns:
    Module -> 'key' or 'out' -> values.
  """
  return {
    module: {n: _sample(params[f'{module}/{n}/kernel'].read()) for n in _SAMPLED}
    for module in modules
  }


def _sample(kernel: np.ndarray) -> list[float]:
  places = np.linspace(0, kernel.size - 1, _SAMPLES).astype(int)
  return [float(value) for value in kernel.reshape(-1)[places]]


def write(
  path: epath.PathLike,
  what: str,
  arrays: Mapping[str, Mapping[str, np.ndarray]],
  info: Mapping[str, Any],
) -> None:
  """Writes the file, whole or not at all, one array at a time.

  Args:
    path: the file; replaced if it exists.
    what: the arrays are, e.g. 'statistics'; for messages, and `ArraysFile.open`.
    arrays: module -> name -> array. One that occurs twice (the same object) is written
      once.
    info: where they are from, for JSON; `kernels` is what `samples` returned.

  Raises:
    BadInput: a value is not finite. Nothing is left behind.
  """
  with (
    files.whole(path) as temporary,
    temporary.open('wb') as file,
    zipfile.ZipFile(file, 'w') as archive,
  ):
    index = {'format': _FORMAT, 'what': what, 'info': dict(info)}
    index['modules'] = _write_arrays(archive, what, arrays)
    archive.writestr(_INDEX, json.dumps(index, indent=1))


def _write_arrays(
  archive: zipfile.ZipFile, what: str, arrays: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, str]]:
  """Writes the arrays; returns module -> name -> its name in the archive."""
  names: dict[int, str] = {}
  modules: dict[str, dict[str, str]] = {}
  for module, of_module in arrays.items():
    modules[module] = {}
    for name, array in of_module.items():
      if id(array) not in names:
        if not np.isfinite(array).all():
          raise BadInput(
            f'the {name} {what} of {module} are not finite: check the loss of the'
            ' checkpoint'
          )
        names[id(array)] = f'{module}/{name}.npy'
        # force_zip64: the size is not known before, and may be above 2 GiB.
        with archive.open(names[id(array)], 'w', force_zip64=True) as member:
          np.lib.format.write_array(member, np.asarray(array, np.float32))
      modules[module][name] = names[id(array)]
  return modules


@dataclasses.dataclass(frozen=True)
class ArraysFile:
  """A file that `write` made; arrays are read when asked for.

  Attributes:
    what: its arrays are.
    info: where they are from: checkpoint, step, task, split, num_sequences, ...
    modules: module -> name -> name of the array in the file.
  """

  path: epath.Path
  what: str
  info: Mapping[str, Any]
  modules: Mapping[str, Mapping[str, str]]

  @classmethod
  def open(cls, path: epath.PathLike, what: str) -> 'ArraysFile':
    """Opens a file; reads its index alone.

    Raises:
      BadInput: it is missing, damaged, or something else.
    """
    path = epath.Path(path)
    if not path.exists() or path.is_dir():
      raise BadInput(
        f'there is no file of {what} at {path}; make one: python -m gqa_t5x.calibrate'
        ' --help'
      )
    with _damage(path, what, 'its index'):
      with path.open('rb') as file, zipfile.ZipFile(file) as archive:
        index = json.loads(archive.read(_INDEX))
      if index['format'] != _FORMAT:
        raise ValueError(f'format {index["format"]}, expected {_FORMAT}')
      if index['what'] != what:
        raise ValueError(f'it has {index["what"]}')
      return cls(path, what, dict(index['info']), dict(index['modules']))

  def shape(self, module: str, name: str) -> tuple[int, ...]:
    """The shape of an array, which is not read."""
    names = self._names(module)
    with _damage(self.path, self.what, f'the {self.what} of {module}'):
      place = names[name]
    with self._member(module, place) as member:
      np.lib.format.read_magic(member)
      return np.lib.format.read_array_header_1_0(member)[0]

  def arrays(self, module: str) -> dict[str, np.ndarray]:
    """Reads the arrays of one attention module, float32.

    Raises:
      BadInput: the module is missing, or the file is damaged or not finite.
    """
    read: dict[str, np.ndarray] = {}
    for name in set(self._names(module).values()):
      with self._member(module, name) as member:
        read[name] = np.lib.format.read_array(member, allow_pickle=False)
      if not np.isfinite(read[name]).all():
        raise BadInput(
          f'{self.path} has values that are not finite in {name}, of {module}; make it'
          ' anew from a checkpoint that has none'
        )
    return {name: read[place] for name, place in self.modules[module].items()}

  def check_kernels(self, module: str, kernels: Mapping[str, np.ndarray]) -> None:
    """Raises BadInput unless kernels of a module are those that the file is of."""
    for name, there in self.info.get('kernels', {}).get(module, {}).items():
      if not np.allclose(_sample(kernels[name]), there, rtol=_TOLERANCE, atol=1e-6):
        raise BadInput(
          f'{self.path} is of another checkpoint, step {self.info.get("step")} of'
          f' {self.info.get("checkpoint")}: {module}/{name}/kernel has other values.'
          ' Make it anew from yours: python -m gqa_t5x.calibrate --help'
        )

  def _names(self, module: str) -> Mapping[str, str]:
    """Name -> name in the file, of a module's arrays."""
    if module not in self.modules:
      raise BadInput(
        f'{self.path} has no {self.what} of {module}; it has {len(self.modules)}'
        f' modules of step {self.info.get("step")} of {self.info.get("checkpoint")}.'
        ' Make them anew from your checkpoint: python -m gqa_t5x.calibrate --help'
      )
    return self.modules[module]

  @contextlib.contextmanager
  def _member(self, module: str, name: str) -> Iterator[BinaryIO]:
    with (
      _damage(self.path, self.what, f'the {self.what} of {module}'),
      self.path.open('rb') as file,
      zipfile.ZipFile(file) as archive,
      archive.open(name) as member,
    ):
      yield member


@contextlib.contextmanager
def _damage(path: epath.Path, what: str, part: str) -> Iterator[None]:
  """Turns what a damaged file raises into one clear message."""
  try:
    yield
  except _DAMAGE as error:
    raise BadInput(
      f'{path} is truncated, damaged or no file of {what}: cannot read {part}'
      f' ({first_line(error)})'
    ) from error
