"""Finds and opens checkpoints of any layout, without T5X, Orbax or transformers.

  legacy   checkpoint_N/checkpoint             msgpack: the tree; small tensors, or all
           checkpoint_N/target.encoder...      TensorStore (zarr), one folder a tensor
  Orbax    checkpoint_N/state/_METADATA        JSON: the tree
           checkpoint_N/state/manifest.ocdbt   TensorStore (zarr) in one OCDBT database;
                                               older: one folder a tensor
  Hugging Face   any_name/config.json          with safetensors or PyTorch files

Either way the result is path -> LazyTensor: nothing is read but names and shapes.
Paths are local or gs:// (pytorch_model.bin: local).
"""

import ast
import json
import math
import re
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x.conversion import huggingface, msgpack_index
from gqa_t5x.conversion.errors import ConversionError
from gqa_t5x.conversion.params import flatten
from gqa_t5x.conversion.tensors import LazyTensor, StoredTensor

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
    path: a checkpoint folder, a file in it that says what it is (`checkpoint`,
      `model.safetensors`), or a model_dir (then the latest checkpoint_N in it).

  Returns:
    The checkpoint folder.

  Raises:
    ConversionError: there is none, or two in one folder.
  """
  if not path.exists():
    raise ConversionError(f'there is no checkpoint at {path}: no such file or folder')
  names = {MSGPACK, huggingface.CONFIG, *sum(huggingface.WEIGHTS, ())}
  if path.name in names and not path.is_dir():
    path = path.parent
  if _entry(path) is not None or (path / _STATE).is_dir():
    return path
  checkpoints = list_checkpoints(path)
  if checkpoints:
    return find_checkpoint(checkpoints[-1])
  raise ConversionError(
    f'there is no T5X checkpoint in {path}: expected a file named checkpoint, a folder'
    ' named state, or folders named checkpoint_<step>; nor is there a Hugging Face'
    ' model: model.safetensors or pytorch_model.bin, or an index of such files; it may'
    ' be only partly copied'
  )


def step_is_known(path: epath.Path) -> bool:
  """Whether a checkpoint folder keeps its step; Hugging Face's do not, and read as 0.

  Args:
    path: what `find_checkpoint` returned.
  """
  return huggingface.weights_file(path) is None


def _entry(path: epath.Path) -> epath.Path | None:
  """The file that lists a checkpoint's tensors; None if there is none.

  Raises:
    ConversionError: there are two, of different layouts.
  """
  orbax = [path / _STATE / name for name in (_METADATA, MSGPACK)]
  # Orbax itself wrote both for a while.
  orbax = [file for file in orbax if file.exists()][:1]
  found = [file for file in (path / MSGPACK, *orbax) if file.exists()]
  weights = huggingface.weights_file(path)
  found += [weights] if weights else []
  if len(found) > 1:
    raise ConversionError(
      f'{path} has two checkpoints, {found[0]} and {found[1]}; keep one'
    )
  return found[0] if found else None


def dataset_state(path: epath.Path) -> list[str]:
  """Names of the data pipeline's saved state in a checkpoint folder, if any."""
  files = [p.name for p in path.iterdir() if p.name.startswith('train_ds')]
  folder = path / 'dataset'
  if folder.is_dir():
    inside = (p.name for p in folder.iterdir())
    files += [f'dataset/{n}' for n in inside if n.startswith('train_ds')]
  return sorted(files)


def open_checkpoint(path: epath.Path) -> dict[str, LazyTensor]:
  """Opens a checkpoint folder of any layout.

  Args:
    path: the folder, local or gs://.

  Returns:
    "target/decoder/...", "state/step", "state/param_states/..." -> tensor.

  Raises:
    ConversionError: a part is missing or damaged; the message names file and tensor.
  """
  file = _entry(path)
  if file is None:
    raise ConversionError(
      f'{path / _STATE} has neither {_METADATA} nor {MSGPACK}: the checkpoint is only'
      ' partly written or copied'
    )
  if file.name == MSGPACK:
    return _open_tree(file, _legacy_leaves(file))
  if file.name == _METADATA:
    return _open_tree(file, _orbax_leaves(file))
  return huggingface.open_folder(file)


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
      raise ConversionError(
        f"{file} is of a TensorFlow checkpoint: convert it first with T5X's"
        ' t5x/scripts/convert_tf_checkpoint.py'
      )
  tree = msgpack_index.read_tree(file)
  tree = tree.get('optimizer', tree)
  if not isinstance(tree, dict):
    raise ConversionError(f'{file} is damaged: optimizer is no tree of tensors')
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
    return {
      '/'.join(key): {'driver': driver, 'kvstore': {'path': '.'.join(key)}}
      for key, kind in zip(keys, types, strict=True)
      if kind not in ('None', 'Dict', 'List', 'Tuple', 'NamedTuple')
    }
  except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
    raise ConversionError(
      f'{file} is truncated or damaged: {_one_line(error)}'
    ) from error


def _open_tree(file: epath.Path, leaves: dict[str, Any]) -> dict[str, LazyTensor]:
  """Opens every leaf, all at once; reads no tensor.

  Args:
    file: where the leaves are listed; TensorStore's folders are beside it.
    leaves: path -> tensor, number, TensorStore spec, or Orbax placeholder.
  """
  import tensorstore as ts

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
    elif isinstance(leaf, LazyTensor):
      tensors[path] = leaf
    elif isinstance(leaf, int | float):
      tensors[path] = LazyTensor.of(np.asarray(leaf))
    else:
      raise ConversionError(
        f'{file}: {path} is of type {type(leaf).__name__}, not an array'
      )
  for path, (leaf, future) in opening.items():
    try:
      array = future.result()
      _check_shape(leaf, array.shape)
      tensors[path] = _lazy(path, folder, array)
    except ValueError as error:
      unreadable.append(f'{path} ({_one_line(error)})')
  if unreadable:
    raise ConversionError(
      f'{folder} is only partly written or copied: cannot open'
      f' {len(unreadable)} of {len(leaves)} tensors: {", ".join(unreadable)}'
    )
  return tensors


def _tensor_folder(leaf: dict) -> str:
  """Where a spec says that its tensor is, relative to the checkpoint."""
  store = leaf['kvstore']
  # Old TensorStore versions kept the path beside the kvstore.
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


def _lazy(path: str, folder: epath.Path, array: Any) -> LazyTensor:
  def read():
    try:
      return array.read(order='C').result()
    except ValueError as error:
      raise ConversionError(
        f'cannot read the tensor {path} of {folder}: {_one_line(error)}'
      ) from error

  dtype = np.dtype(array.dtype.numpy_dtype)
  return LazyTensor(tuple(array.shape), dtype, read, _stored(path, array, dtype))


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
  text = str(error) or type(error).__name__
  return text.splitlines()[0].split(' [tensorstore_spec=')[0].split(' [source ')[0]
