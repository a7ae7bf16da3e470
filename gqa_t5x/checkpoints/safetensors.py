"""Finds the tensors in a safetensors file without reading them, and writes such files.

  8 bytes               length of the header, a little-endian integer
  header                JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]},
                          and "__metadata__", which holds no tensor
  data                  the tensors, C order, little-endian, without gaps; the offsets
                          count from here

The library safetensors reads local files alone; the format is small enough to be read
from wherever etils opens a file.

Source: the format's text, https://github.com/huggingface/safetensors#format.
"""

import functools
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, TensorSpec
from gqa_t5x.errors import BadInput, first_line

_DTYPES = {
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F32': np.dtype(np.float32),
  'F64': np.dtype(np.float64),
}
_KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
# The library's own bound: a damaged length must not fill the memory.
_MAX_HEADER_BYTES = 100_000_000


def read_index(file: epath.Path) -> dict[str, LazyTensor]:
  """Reads the header of a safetensors file; its tensors stay in the file.

  Returns:
    Name -> tensor. Each `read` opens the file anew, so threads may read together.

  Raises:
    BadInput: the file is truncated or damaged, or a tensor is not of floating point.
  """
  size = file.stat().length
  try:
    header, start = _read_header(file, size)
    _check_spans(header, size - start)
  except (ValueError, KeyError, TypeError) as error:
    raise BadInput(f'{file} is truncated or damaged ({size} bytes): {error}') from error
  tensors = {}
  for name, entry in header.items():
    dtype = dtype_of(file, name, entry['dtype'])
    spec = TensorSpec(tuple(entry['shape']), dtype)
    offset = start + entry['data_offsets'][0]
    read = functools.partial(_read_tensor, file, name, spec, offset)
    tensors[name] = LazyTensor(spec.shape, dtype, read)
  return tensors


def write(file: epath.Path, tensors: Mapping[str, LazyTensor]) -> None:
  """Writes a file of floating-point tensors, one of them in memory at a time."""
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # transformers wants it.
  end = 0
  for name, tensor in tensors.items():
    begin, end = end, end + tensor.nbytes
    header[name] = {
      'dtype': _KINDS[tensor.dtype],
      'shape': list(tensor.shape),
      'data_offsets': [begin, end],
    }
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % _LENGTH_BYTES)  # Aligns the tensors.
  with file.open('wb') as handle:
    handle.write(len(text).to_bytes(_LENGTH_BYTES, 'little') + text)
    for tensor in tensors.values():
      handle.write(np.ascontiguousarray(tensor.read()).tobytes())


def dtype_of(file: epath.Path, name: str, kind: str) -> np.dtype:
  """The NumPy dtype of the parameter `name`, of a `kind` as safetensors names it.

  Raises:
    BadInput: it is not of floating point.
  """
  if kind not in _DTYPES:
    raise BadInput(
      f'{file}: {name} is {kind}; parameters must be floating point, of 16 bits or more'
    )
  return _DTYPES[kind]


def _read_tensor(
  file: epath.Path, name: str, spec: TensorSpec, offset: int
) -> np.ndarray:
  try:
    with file.open('rb') as handle:
      handle.seek(offset)
      data = handle.read(spec.nbytes)
    if len(data) < spec.nbytes:
      raise EOFError(
        f'{spec.nbytes} bytes are expected at {offset}, {len(data)} are there; the file'
        ' changed after it was opened'
      )
  except Exception as error:  # each kind of file system has its own
    raise BadInput(
      f'cannot read the tensor {name} of {file}: {first_line(error)}'
    ) from error
  return np.ndarray(spec.shape, spec.dtype, data)


def _read_header(file: epath.Path, size: int) -> tuple[dict[str, Any], int]:
  """Returns the header without its metadata, and where the data begin."""
  with file.open('rb') as handle:
    first = handle.read(_LENGTH_BYTES)
    length = int.from_bytes(first, 'little')
    start = _LENGTH_BYTES + length
    if len(first) < _LENGTH_BYTES or length > _MAX_HEADER_BYTES or start > size:
      raise ValueError(f'its first 8 bytes announce a header of {length} bytes')
    header = json.loads(handle.read(length))
  if not isinstance(header, dict):
    raise ValueError('its header is no JSON object')
  header.pop('__metadata__', None)
  return header, start


def _check_spans(header: dict[str, Any], nbytes: int) -> None:
  """Raises ValueError unless the tensors follow each other and fill the data."""
  spans = []
  for name, entry in header.items():
    shape, (begin, end) = entry['shape'], entry['data_offsets']
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
      raise ValueError(f'{name} has shape {shape} at {begin} to {end}')
    dtype = _DTYPES.get(entry['dtype'])
    if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
      raise ValueError(
        f'{name}, {entry["dtype"]} of shape {tuple(shape)}, has {end - begin} bytes'
      )
    spans.append((begin, end, name))
  spans.sort()
  ends = itertools.chain([0], (end for _, end, _ in spans))
  for expected, (begin, _, name) in zip(ends, spans, strict=False):
    if begin != expected:
      raise ValueError(f'{name} begins at {begin} of the data, expected {expected}')
  filled = max((end for _, end, _ in spans), default=0)
  if filled != nbytes:
    raise ValueError(f'its tensors have {filled} bytes, {nbytes} are there')
