"""Finds the tensors in one of Flax's msgpack files without reading them.

T5X's legacy checkpoints may hold all tensors in one msgpack file of tens of GB, and
`flax.serialization.msgpack_restore` reads it whole. Here only headers are read, and
every length is checked against the others: a damaged file is refused when it is opened.

  map                   a level of the tree; keys are strings
  extension 1 and 3     an array, a NumPy scalar: [shape, dtype name, bytes] in msgpack
  extension 2           a complex number: [real, imaginary]
  map with the key      an array above 1 GiB: its shape, and flat arrays that follow
    __msgpack_chunked_array__   each other

Source: flax.serialization; msgpack's specification,
https://github.com/msgpack/msgpack/blob/master/spec.md.
"""

import dataclasses
import math
import struct
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.errors import BadInput

_NDARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = '__msgpack_chunked_array__'
_NUMPY_DTYPES = (
  *('bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64'),
  *('float16', 'float32', 'float64', 'complex64', 'complex128'),
)
_DTYPES = {
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  **{name: np.dtype(name) for name in _NUMPY_DTYPES},
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# First byte -> kind, and `struct`'s letter of the number or length that comes next.
_FOLLOWED = {
  first + i: (kind, letter)
  for first, kind, letters in (
    (0xC4, 'bytes', 'BHI'),
    (0xC7, 'extension', 'BHI'),
    (0xCA, 'value', 'fd'),
    (0xCC, 'value', 'BHIQ'),
    (0xD0, 'value', 'bhiq'),
    (0xD9, 'string', 'BHI'),
    (0xDC, 'list', 'HI'),
    (0xDE, 'map', 'HI'),
  )
  for i, letter in enumerate(letters)
}
# Read at once between two tensors: some dozens of headers.
_WINDOW_BYTES = 2**15
# Bounds on what is not a tensor, far above any checkpoint's: a damaged length must not
# fill the memory, nor a damaged tree the stack.
_MAX_LENGTH = 2**20
_MAX_DEPTH = 64


def read_tree(file: epath.Path) -> dict[str, Any]:
  """Reads the tree of a msgpack file; its tensors stay in the file.

  Args:
    file: local or gs://, as `flax.serialization.msgpack_serialize` writes it.

  Returns:
    Nested dicts as of `msgpack_restore`, with a LazyTensor for every array and NumPy
    scalar. Each `read` opens the file anew, so that threads may read at the same time.

  Raises:
    BadInput: the file is truncated or damaged.
  """
  size = file.stat().length
  with file.open('rb') as handle:
    scanner = _Scanner(handle, size)
    try:
      tree = scanner.value()
      if not isinstance(tree, dict):
        raise _DamagedError('it does not hold a tree of tensors')
      if scanner.position != size:
        raise _DamagedError(f'its tree ends after {scanner.position} bytes')
    except _DamagedError as error:
      place = f'in {"/".join(scanner.path)}: ' if scanner.path else ''
      raise BadInput(
        f'{file} is truncated or damaged ({size} bytes): {place}{error}'
      ) from error
  return _lazy(tree, file, '')


class _DamagedError(Exception):
  """What is wrong; `read_tree` adds where."""


@dataclasses.dataclass(frozen=True)
class _Stored:
  """An array in the file.

  Attributes:
    shape: of the array.
    dtype: of the array.
    spans: (offset, bytes) of its parts, in C order.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  spans: tuple[tuple[int, int], ...]


class _Scanner:
  """Walks over a msgpack file once.

  Attributes:
    position: bytes walked over.
    path: keys from the root down to what is being read; stays there on an error.
  """

  def __init__(self, handle: BinaryIO, size: int):
    self.position = 0
    self.path: list[str] = []
    self._handle = handle
    self._size = size
    self._window, self._window_start = b'', 0

  def value(self) -> Any:
    """Reads what comes next: a Python value, or where an array is."""
    kind, content = self._header()
    if kind == 'value':
      return content
    if kind == 'extension':
      return self._extension(content)
    if kind == 'string':
      return self._string(content)
    _check_length(content)
    if kind == 'bytes':
      return self._take(content)
    if len(self.path) >= _MAX_DEPTH:
      raise _DamagedError(f'more than {_MAX_DEPTH} levels')
    if kind == 'list':
      return [self._child(str(i)) for i in range(content)]
    return self._map(content)

  def _take(self, n: int) -> bytes:
    """The next n bytes; reads a window ahead, so that headers cost few reads."""
    start = self.position
    self._skip(n)
    if start < self._window_start or self.position > self._window_end:
      self._handle.seek(start)
      self._window = self._handle.read(max(n, _WINDOW_BYTES))
      self._window_start = start
      if self.position > self._window_end:
        raise _DamagedError('it became shorter while it was read')
    offset = start - self._window_start
    return self._window[offset : offset + n]

  @property
  def _window_end(self) -> int:
    return self._window_start + len(self._window)

  def _skip(self, n: int) -> None:
    left = self._size - self.position
    if n > left:
      raise _DamagedError(f'{n} bytes are expected, {left} are left')
    self.position += n

  def _number(self, letter: str) -> int | float:
    number = struct.Struct(f'>{letter}')
    return number.unpack(self._take(number.size))[0]

  def _header(self) -> tuple[str, Any]:
    """Reads up to the content: (kind, value or length)."""
    first = self._take(1)[0]
    if first < 0x80:
      return 'value', first
    if first < 0x90:
      return 'map', first - 0x80
    if first < 0xA0:
      return 'list', first - 0x90
    if first < 0xC0:
      return 'string', first - 0xA0
    if first >= 0xE0:
      return 'value', first - 0x100
    if first in _CONSTANTS:
      return 'value', _CONSTANTS[first]
    if first in _FOLLOWED:
      kind, letter = _FOLLOWED[first]
      return kind, self._number(letter)
    if 0xD4 <= first <= 0xD8:
      return 'extension', 2 ** (first - 0xD4)
    raise _DamagedError(f'the byte 0x{first:02x} is not of msgpack')

  def _expect(self, kind: str) -> Any:
    found, content = self._header()
    if found != kind:
      raise _DamagedError(f'a {kind} is expected, a {found} found')
    return content

  def _string(self, length: int) -> str:
    _check_length(length)
    try:
      return self._take(length).decode()
    except UnicodeDecodeError as error:
      raise _DamagedError('a string is not UTF-8') from error

  def _child(self, key: str) -> Any:
    self.path.append(key)
    value = self.value()
    self.path.pop()
    return value

  def _map(self, length: int) -> Any:
    tree: dict[str, Any] = {}
    for _ in range(length):
      key = self._string(self._expect('string'))
      if key in tree:
        raise _DamagedError(f'the key {key!r} comes twice')
      tree[key] = self._child(key)
    return _join(tree) if _CHUNKED in tree else tree

  def _extension(self, length: int) -> Any:
    code = self._take(1)[0]
    start = self.position
    if code in (_NDARRAY, _SCALAR):
      content = self._array()
    elif code == _COMPLEX:
      content = self._complex()
    else:
      raise _DamagedError(f'the extension type {code} is not of Flax')
    if code == _SCALAR and content.shape:
      raise _DamagedError(f'a scalar has shape {content.shape}')
    if self.position - start != length:
      raise _DamagedError(
        f'{self.position - start} bytes of tensor are in {length} bytes of space'
      )
    return content

  def _array(self) -> _Stored:
    if self._expect('list') != 3:
      raise _DamagedError('a tensor is not shape, dtype and bytes')
    length = self._expect('list')
    _check_length(length)
    shape = tuple(self._expect('value') for _ in range(length))
    if not all(type(n) is int and n >= 0 for n in shape):
      raise _DamagedError(f'{shape} is not a shape')
    name = self._string(self._expect('string'))
    if name not in _DTYPES:
      raise _DamagedError(f'the dtype {name!r} is unknown')
    nbytes = self._expect('bytes')
    expected = math.prod(shape) * _DTYPES[name].itemsize
    if nbytes != expected:
      raise _DamagedError(f'{name} {shape} is {expected} bytes, {nbytes} are there')
    start = self.position
    self._skip(nbytes)
    return _Stored(shape, _DTYPES[name], ((start, nbytes),))

  def _complex(self) -> complex:
    if self._expect('list') != 2:
      raise _DamagedError('a complex number is not two numbers')
    parts = self._expect('value'), self._expect('value')
    if not all(type(part) is float for part in parts):
      raise _DamagedError(f'{parts} is not a complex number')
    return complex(*parts)


def _check_length(length: int) -> None:
  if length > _MAX_LENGTH:
    raise _DamagedError(f'the length {length} of a part that is not a tensor')


def _join(tree: dict[str, Any]) -> _Stored:
  """Makes one array of the parts that Flax cut an array above 1 GiB into."""
  shape, chunks = (_numbered(tree.get(name)) for name in ('shape', 'chunks'))
  whole = all(type(n) is int and n >= 0 for n in shape)
  flat = all(isinstance(c, _Stored) and len(c.shape) == 1 for c in chunks)
  if not (whole and flat and len({c.dtype for c in chunks}) == 1):
    raise _DamagedError('the parts of a chunked tensor do not belong together')
  size = sum(chunk.shape[0] for chunk in chunks)
  if size != math.prod(shape):
    raise _DamagedError(f'{size} elements in the chunks of a tensor of shape {shape}')
  return _Stored(shape, chunks[0].dtype, tuple(s for c in chunks for s in c.spans))


def _numbered(node: Any) -> tuple:
  """{"0": x, "1": y} -> (x, y): how Flax keeps a tuple."""
  if not isinstance(node, dict) or node.keys() != {str(i) for i in range(len(node))}:
    raise _DamagedError('a chunked tensor lacks a part')
  return tuple(node[str(i)] for i in range(len(node)))


def _lazy(node: Any, file: epath.Path, path: str) -> Any:
  if isinstance(node, dict):
    return {key: _lazy(child, file, f'{path}/{key}') for key, child in node.items()}
  if not isinstance(node, _Stored):
    return node
  return LazyTensor.in_file(file, path[1:], node.shape, node.dtype, node.spans)
