"""Finds and reads T5X checkpoints of either layout, without T5X and without Orbax.

  legacy   checkpoint_N/checkpoint             msgpack: the tree; small tensors inside
           checkpoint_N/target.encoder...      TensorStore (zarr), one folder a tensor
  Orbax    checkpoint_N/state/_METADATA        JSON: the tree
           checkpoint_N/state/manifest.ocdbt   TensorStore (zarr) in one OCDBT database;
                                               older: one folder a tensor

Either way the result is path -> LazyTensor: nothing is read but names and shapes.
Paths are local or gs://.
"""

import ast
import json
import re
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x.conversion.errors import ConversionError
from gqa_t5x.conversion.params import flatten
from gqa_t5x.conversion.tensors import LazyTensor

MSGPACK = 'checkpoint'
_STATE = 'state'
_METADATA = '_METADATA'
_OCDBT = 'manifest.ocdbt'
_PLACEHOLDER = 'PLACEHOLDER://'
_STEP = re.compile(r'checkpoint_(\d+)')


def checkpoint_step(path: epath.Path) -> int | None:
  """The N of a folder named checkpoint_N, or None."""
  match = _STEP.fullmatch(path.name)
  return int(match[1]) if match else None


def list_checkpoints(folder: epath.Path) -> list[epath.Path]:
  """The checkpoint_N in a folder, by rising step."""
  found = folder.iterdir() if folder.is_dir() else ()
  return sorted(
    (p for p in found if checkpoint_step(p) is not None), key=checkpoint_step
  )


def find_checkpoint(path: epath.Path) -> epath.Path:
  """Finds the checkpoint that a path means.

  Args:
    path: a checkpoint folder, its msgpack file, or a model_dir (then the latest
      checkpoint_N in it).

  Returns:
    The checkpoint folder.

  Raises:
    ConversionError: there is none.
  """
  if not path.exists():
    raise ConversionError(f'there is no checkpoint at {path}: no such file or folder')
  if path.name == MSGPACK and not path.is_dir():
    path = path.parent
  if (path / MSGPACK).exists() or (path / _STATE).is_dir():
    return path
  checkpoints = list_checkpoints(path)
  if checkpoints:
    return find_checkpoint(checkpoints[-1])
  raise ConversionError(
    f'there is no T5X checkpoint in {path}: expected a file named checkpoint, a folder'
    ' named state, or folders named checkpoint_<step>; it may be only partly copied'
  )


def dataset_state(path: epath.Path) -> list[str]:
  """Names of the data pipeline's saved state in a checkpoint folder, if any."""
  files = [p.name for p in path.iterdir() if p.name.startswith('train_ds')]
  folder = path / 'dataset'
  if folder.is_dir():
    inside = (p.name for p in folder.iterdir())
    files += [f'dataset/{n}' for n in inside if n.startswith('train_ds')]
  return sorted(files)


def open_checkpoint(path: epath.Path) -> dict[str, LazyTensor]:
  """Opens a checkpoint folder of either layout.

  Args:
    path: the folder, local or gs://.

  Returns:
    "target/decoder/...", "state/step", "state/param_states/..." -> tensor.

  Raises:
    ConversionError: a part is missing or damaged; the message names file and tensor.
  """
  if (path / MSGPACK).exists():
    return _open_tree(path, _legacy_leaves(path / MSGPACK))
  state = path / _STATE
  if (state / _METADATA).exists():
    return _open_tree(state, _orbax_leaves(state / _METADATA))
  if (state / MSGPACK).exists():
    return _open_tree(state, _legacy_leaves(state / MSGPACK))
  raise ConversionError(
    f'{state} has neither {_METADATA} nor {MSGPACK}: the checkpoint is only partly'
    ' written or copied'
  )


def kvstore(path: epath.Path) -> dict[str, Any]:
  """TensorStore's specification of a folder, local or gs://."""
  text = str(path)
  if text.startswith('gs://'):
    bucket, _, key = text.removeprefix('gs://').partition('/')
    return {'driver': 'gcs', 'bucket': bucket, 'path': key.rstrip('/') + '/'}
  return {'driver': 'file', 'path': text.rstrip('/') + '/'}


def _legacy_leaves(file: epath.Path) -> dict[str, Any]:
  """Reads the msgpack: path -> array, TensorStore spec, or Orbax placeholder."""
  from flax import serialization  # here: it imports JAX

  data = file.read_bytes()
  if data.startswith(b'model_checkpoint_path'):
    raise ConversionError(
      f"{file} is of a TensorFlow checkpoint: convert it first with T5X's"
      ' t5x/scripts/convert_tf_checkpoint.py'
    )
  try:
    tree = serialization.msgpack_restore(data)
    tree = tree.get('optimizer', tree)
  except Exception as error:
    raise ConversionError(
      f'{file} is truncated or damaged ({len(data)} bytes): {_one_line(error)}'
    ) from error
  return dict(flatten(tree, is_leaf=_is_spec))


def _is_spec(node: Any) -> bool:
  return {'driver', 'kvstore', 'metadata'} <= node.keys()


def _orbax_leaves(file: epath.Path) -> dict[str, Any]:
  """Reads Orbax's _METADATA: path -> TensorStore spec relative to the folder."""
  try:
    metadata = json.loads(file.read_text())
    entries = metadata['tree_metadata']
    driver = 'zarr3' if metadata.get('use_zarr3') else 'zarr'
    keys = [ast.literal_eval(key) for key in entries]
    types = [entry['value_metadata']['value_type'] for entry in entries.values()]
  except (ValueError, KeyError, TypeError, SyntaxError) as error:
    raise ConversionError(
      f'{file} is truncated or damaged: {_one_line(error)}'
    ) from error
  return {
    '/'.join(key): {'driver': driver, 'kvstore': {'path': '.'.join(key)}}
    for key, kind in zip(keys, types, strict=True)
    if kind not in ('None', 'Dict', 'List', 'Tuple', 'NamedTuple')
  }


def _open_tree(folder: epath.Path, leaves: dict[str, Any]) -> dict[str, LazyTensor]:
  """Opens every leaf, all at once; reads no tensor that is not in the msgpack."""
  import tensorstore as ts

  base = kvstore(folder)
  ocdbt = (folder / _OCDBT).exists()
  context = ts.Context({'cache_pool': {'total_bytes_limit': 100_000_000}})
  tensors: dict[str, LazyTensor | None] = {}
  opening = {}
  for path, leaf in leaves.items():
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
      name = leaf.removeprefix(_PLACEHOLDER)
      leaf = {'driver': 'zarr', 'kvstore': {'path': name}}
    if isinstance(leaf, dict):
      spec = _absolute_spec(leaf, base, ocdbt)
      opening[path] = ts.open(spec, open=True, read=True, context=context)
      tensors[path] = None  # keeps the order of the tree
    elif isinstance(leaf, np.ndarray | np.generic | int | float):
      tensors[path] = LazyTensor.of(np.asarray(leaf))
    else:
      raise ConversionError(
        f'{folder / MSGPACK}: {path} is of type {type(leaf).__name__}, not an array'
      )
  unreadable = []
  for path, future in opening.items():
    try:
      tensors[path] = _lazy(path, folder, future.result())
    except ValueError as error:
      unreadable.append(f'{path} ({_one_line(error)})')
  if unreadable:
    raise ConversionError(
      f'{folder} is only partly written or copied: cannot open'
      f' {len(unreadable)} of {len(leaves)} tensors: {", ".join(unreadable)}'
    )
  return tensors


def _absolute_spec(leaf: dict, base: dict, ocdbt: bool) -> dict[str, Any]:
  """Points a tensor's relative TensorStore spec at the checkpoint's folder.

  A missing chunk must be an error: TensorStore's default is to read it as zeros.
  """
  # Old TensorStore versions kept the path beside the kvstore.
  name = (leaf['kvstore'].get('path') or leaf['path']).strip('/') + '/'
  if ocdbt:
    store = {'driver': 'ocdbt', 'base': base, 'path': name}
  else:
    store = {**base, 'path': base['path'] + name}
  return {'driver': leaf['driver'], 'kvstore': store, 'fill_missing_data_reads': False}


def _lazy(path: str, folder: epath.Path, array: Any) -> LazyTensor:
  def read():
    try:
      return array.read(order='C').result()
    except ValueError as error:
      raise ConversionError(
        f'cannot read the tensor {path} of {folder}: {_one_line(error)}'
      ) from error

  return LazyTensor(tuple(array.shape), np.dtype(array.dtype.numpy_dtype), read)


def _one_line(error: Exception) -> str:
  """The first line of an error, without TensorStore's appendix of source places."""
  text = str(error) or type(error).__name__
  return text.splitlines()[0].split(' [tensorstore_spec=')[0].split(' [source ')[0]
