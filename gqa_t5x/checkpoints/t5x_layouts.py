"""Opens the checkpoints of T5X, legacy and Orbax, without T5X or Orbax.

  legacy   checkpoint_N/checkpoint             msgpack: the tree; small tensors, or all
           checkpoint_N/target.encoder...      TensorStore (zarr), one folder a tensor
  Orbax    checkpoint_N/state/_METADATA        JSON: the tree
           checkpoint_N/state/manifest.ocdbt   TensorStore (zarr) in one OCDBT database;
                                               older: one folder a tensor

Of what is in TensorStore, nothing is read but names and shapes. The msgpack is read
whole, as T5X reads it: T5X keeps only small tensors in it. Old or hand-made checkpoints
with all tensors in it need twice the file's size of memory, then its size.

T5X's scalable_t5 (umT5) scans its layers: each parameter of all layers of a stack is
one tensor, "decoder/decoder/mlp/wo/kernel", with the layers along axis 1. They are
opened as "decoder/layers_0/mlp/wo/kernel" and so on, without the optimizer's state.
"""

import ast
import json
import math
import re
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, StoredTensor
from gqa_t5x.checkpoints.tree import PARAM_STATES, flatten
from gqa_t5x.errors import BadInput, first_line

MSGPACK = 'checkpoint'
STATE = 'state'
METADATA = '_METADATA'
_OCDBT = 'manifest.ocdbt'
_SCANNED = re.compile(r'target/(encoder|decoder)/\1/(.*)')
_PLACEHOLDER = 'PLACEHOLDER://'
# What msgpack, NumPy and flax raise for a damaged msgpack.
_DAMAGE = (
  *(ValueError, TypeError, LookupError, AttributeError),
  *(ArithmeticError, RecursionError),
)


def kvstore(path: epath.Path) -> dict[str, Any]:
  """TensorStore's specification of a folder, local or gs://."""
  text = str(path)
  if text.startswith('gs://'):
    bucket, _, key = text.removeprefix('gs://').partition('/')
    return {'driver': 'gcs', 'bucket': bucket, 'path': key.rstrip('/') + '/'}
  return {'driver': 'file', 'path': text.rstrip('/') + '/'}


def _legacy_leaves(file: epath.Path) -> dict[str, Any]:
  """Reads the msgpack: path -> tensor, TensorStore spec, or Orbax placeholder."""
  start = b'model_checkpoint_path'
  with file.open('rb') as handle:
    if handle.read(len(start)) == start:
      raise BadInput(
        f"{file} is of a TensorFlow checkpoint: convert it first with T5X's"
        ' t5x/scripts/convert_tf_checkpoint.py'
      )
  from flax import serialization  # here: it imports JAX

  size = file.stat().length
  try:
    tree = serialization.msgpack_restore(file.read_bytes())
  except MemoryError as error:
    raise BadInput(
      f'{file} does not fit in memory: its tensors are in it, instead of in folders of'
      f' TensorStore, and to read its {size:,} bytes takes twice as much; use a machine'
      ' with more memory'
    ) from error
  except _DAMAGE as error:
    raise BadInput(
      f'{file} is truncated or damaged ({size} bytes): {_one_line(error)}'
    ) from error
  tree = tree.get('optimizer', tree) if isinstance(tree, dict) else tree
  if not isinstance(tree, dict):
    raise BadInput(f'{file} is damaged: it does not hold a tree of tensors')
  spec = {'driver', 'kvstore', 'metadata'}
  return dict(flatten(tree, is_leaf=lambda node: spec <= node.keys()))


def _orbax_leaves(file: epath.Path) -> dict[str, Any]:
  """Reads Orbax's _METADATA: path -> TensorStore spec relative to the folder."""
  try:
    metadata = json.loads(file.read_bytes())
    entries = metadata['tree_metadata']
    driver = 'zarr3' if metadata.get('use_zarr3') else 'zarr'
    keys = [ast.literal_eval(key) for key in entries]
    types = [entry['value_metadata']['value_type'] for entry in entries.values()]
    return {
      '/'.join(key): {'driver': driver, 'kvstore': {'path': '.'.join(key)}}
      for key, kind in zip(keys, types, strict=True)
      if kind not in ('None', 'Dict', 'List', 'Tuple', 'NamedTuple')
    }
  except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
    raise BadInput(f'{file} is truncated or damaged: {_one_line(error)}') from error


def open_tree(file: epath.Path) -> dict[str, LazyTensor]:
  """Opens a checkpoint of T5X.

  Args:
    file: where its tensors are listed: the msgpack, or Orbax's _METADATA.

  Raises:
    BadInput: a part is missing or damaged, or the msgpack does not fit in memory; the
      message names file and tensor.
  """
  import tensorstore as ts

  leaves = _legacy_leaves(file) if file.name == MSGPACK else _orbax_leaves(file)
  if any(_SCANNED.fullmatch(path) for path in leaves):
    leaves = {p: x for p, x in leaves.items() if not p.startswith(PARAM_STATES)}
  folder = file.parent
  base = kvstore(folder)
  ocdbt = (folder / _OCDBT).exists()
  context = ts.Context({'cache_pool': {'total_bytes_limit': 100_000_000}})
  tensors: dict[str, LazyTensor | None] = {}
  opening, unreadable, users = {}, [], {}
  for path, leaf in leaves.items():
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
      name = leaf.removeprefix(_PLACEHOLDER)
      leaf = {'driver': 'zarr', 'kvstore': {'path': name}}
    if isinstance(leaf, dict):
      tensors[path] = None  # keeps the order of the tree
      try:
        name = _tensor_folder(leaf)
        if (other := users.setdefault(name, path)) != path:
          raise ValueError(f'{name} is the folder of {other}')
        spec = _absolute_spec(leaf, name, base, ocdbt)
        opening[path] = leaf, ts.open(spec, open=True, read=True, context=context)
      except ValueError as error:
        unreadable.append(f'{path} ({_one_line(error)})')
    elif isinstance(leaf, np.ndarray | np.generic | int | float):
      layers = _by_layer(path, np.asarray(leaf))
      tensors |= {name: LazyTensor.of(array) for name, array in layers.items()}
    else:
      raise BadInput(f'{file}: {path} is of type {type(leaf).__name__}, not an array')
  for path, (leaf, future) in opening.items():
    try:
      array = future.result()
      _check_shape(leaf, array.shape)
      layers = _by_layer(path, array)
      if path not in layers:
        del tensors[path]
      for name, part in layers.items():
        tensors[name] = _lazy(name, folder, part, whole=name == path)
    except ValueError as error:
      unreadable.append(f'{path} ({_one_line(error)})')
  if unreadable:
    raise BadInput(
      f'{folder} is only partly written or copied: cannot open'
      f' {len(unreadable)} of {len(leaves)} tensors: {", ".join(unreadable)}'
    )
  return tensors


def _by_layer(path: str, array: Any) -> dict[str, Any]:
  """An array under its path; of scanned layers, each layer's part under its own."""
  match = _SCANNED.fullmatch(path)
  if not match:
    return {path: array}
  stack, name = match.groups()
  layers = range(array.shape[1] if len(array.shape) > 1 else 0)
  return {f'target/{stack}/layers_{i}/{name}': array[:, i] for i in layers}


def _tensor_folder(leaf: dict) -> str:
  """Where a spec says that its tensor is, relative to the checkpoint."""
  store = leaf['kvstore']
  # Old TensorStore versions kept the path outside of the kvstore.
  name = store.get('path') if isinstance(store, dict) else None
  name = name or leaf.get('path')
  if not isinstance(name, str):
    raise ValueError(f'damaged specification: no path in {store!r}')
  return name.strip('/') + '/'


def _absolute_spec(leaf: dict, name: str, base: dict, ocdbt: bool) -> dict[str, Any]:
  """Points a tensor's relative TensorStore spec at the checkpoint's folder.

  A missing chunk must be an error: TensorStore's default is to read it as zeros. Each
  tensor is read once: chunks kept in the cache (OCDBT's nodes are) would waste memory.
  """
  if ocdbt:
    store = {'driver': 'ocdbt', 'base': base, 'path': name}
  else:
    store = {**base, 'path': base['path'] + name}
  return {
    'driver': leaf['driver'],
    'kvstore': store,
    'fill_missing_data_reads': False,
    'cache_pool': {'total_bytes_limit': 0},
  }


def _check_shape(leaf: dict, shape: tuple[int, ...]) -> None:
  """Raises if the tensor is not the one that the checkpoint's tree speaks of."""
  metadata = leaf.get('metadata')
  listed = metadata.get('shape') if isinstance(metadata, dict) else None
  if listed is not None and listed != list(shape):
    raise ValueError(f'it has shape {tuple(shape)}, and {listed} in the file {MSGPACK}')


def _lazy(path: str, folder: epath.Path, array: Any, whole: bool) -> LazyTensor:
  def read():
    try:
      return array.read(order='C').result()
    except ValueError as error:
      raise BadInput(
        f'cannot read the tensor {path} of {folder}: {_one_line(error)}'
      ) from error

  dtype = np.dtype(array.dtype.numpy_dtype)
  stored = _stored(path, array, dtype) if whole else None
  return LazyTensor(tuple(array.shape), dtype, read, stored)


def _stored(path: str, array: Any, dtype: np.dtype) -> StoredTensor | None:
  """Describes the files of a tensor that may be copied as they are, or None."""
  spec = array.spec().to_json()
  metadata = spec['metadata']
  if spec['driver'] != 'zarr' or spec['kvstore']['driver'] != 'file':
    return None
  if metadata['compressor'] or metadata['filters'] or not array.shape:
    return None
  chunks = tuple(metadata['chunks'])
  grid = [-(-n // chunk) for n, chunk in zip(array.shape, chunks, strict=True)]
  return StoredTensor(
    name=path,
    folder=spec['kvstore']['path'],
    chunks=chunks,
    num_files=math.prod(grid),
    file_bytes=math.prod(chunks) * dtype.itemsize,
  )


def _one_line(error: Exception) -> str:
  """The first line of an error, without TensorStore's appendix of source places."""
  return first_line(error).split(' [tensorstore_spec=')[0].split(' [source ')[0]
