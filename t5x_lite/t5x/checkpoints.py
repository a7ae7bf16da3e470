"""Checkpoints: writes T5X's Orbax layout, reads that and T5X's legacy layout.

Orbax: `checkpoint_<step>/state/` (one tree: `target`, `state/step`,
`state/param_states`) and `checkpoint_<step>/dataset/train_ds-000-of-001*` (of several
hosts: `dataset/process_0-of-2/train_ds-000-of-002*`).
Legacy: `checkpoint_<step>/checkpoint`, a msgpack file whose larger arrays are
TensorStore specs, and next to it their folders `target.*` and `state.*`.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from etils import epath
from flax import serialization, traverse_util

import gin
from t5x import partitioning
from t5x import train_state as train_state_lib

_PREFIX = 'checkpoint'


def all_steps(checkpoints_dir: str) -> list[int]:
  """Returns the steps of the finished checkpoints in a folder, in order."""
  names = (path.name for path in epath.Path(checkpoints_dir).iterdir())
  matches = (re.fullmatch(rf'{_PREFIX}_(\d+)', name) for name in names)
  return sorted(int(m[1]) for m in matches if m)


def get_checkpoint_dir(checkpoints_dir: str, step: int) -> str:
  """Returns the folder of a step's checkpoint."""
  return os.path.join(checkpoints_dir, f'{_PREFIX}_{step}')


def _read_tensorstore(folder: epath.Path, spec: Mapping[str, Any]) -> np.ndarray:
  """Reads the array of a legacy spec, whose path is relative to the checkpoint."""
  relative = (spec['kvstore'].get('path') or spec['path']).rstrip('/')
  path = f'{os.fspath(folder / os.path.basename(relative))}/'
  kvstore = path if '://' in path else {'driver': 'file', 'path': path}
  try:
    store = ts.open({'driver': spec['driver'], 'kvstore': kvstore}).result()
    return store.read().result()
  except ValueError as e:
    raise ValueError(f'the checkpoint {folder} is incomplete: {path}: {e}') from e


def _read_legacy(folder: epath.Path) -> dict[str, Any]:
  contents = serialization.msgpack_restore((folder / _PREFIX).read_bytes())
  if contents.get('version', 0) < 2:
    raise ValueError(f"{folder} is older than version 2 of T5X's checkpoints")
  flat = traverse_util.flatten_dict(
    contents['optimizer'], is_leaf=lambda _, v: {'driver', 'kvstore'} <= set(v)
  )
  for key, x in flat.items():
    is_spec = isinstance(x, dict)
    flat[key] = _read_tensorstore(folder, x) if is_spec else np.asarray(x)
  return traverse_util.unflatten_dict(flat)


def _read_orbax(folder: epath.Path, with_moments: bool) -> dict[str, Any]:
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
    tree = checkpointer.metadata(folder / 'state').item_metadata.tree
    item = {'target': tree['target'], 'state': dict(tree['state'])}
    if not with_moments:
      item['state'].pop('param_states', None)
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    restore_args = jax.tree.map(lambda _: as_numpy, item)
    args = ocp.args.PyTreeRestore(item, restore_args, partial_restore=True)
    return checkpointer.restore(folder / 'state', args)


def load_t5x_checkpoint(path: str, with_moments: bool = True) -> dict[str, Any]:
  """Reads a checkpoint's folder, of either layout.

  Returns:
    Nested dicts of NumPy arrays: `target`, `state/step`, `state/param_states`; Orbax's
    without the latter unless `with_moments` (not in T5X).

  Raises:
    ValueError: if there is no such checkpoint, or it is incomplete.
  """
  folder = epath.Path(path)
  if (folder / _PREFIX).is_file():
    return _read_legacy(folder)
  if (folder / 'state').is_dir():
    return _read_orbax(folder, with_moments)
  raise ValueError(
    f"no checkpoint at {folder}: it has neither a folder 'state' (Orbax) nor a file "
    f"'{_PREFIX}' (legacy T5X). Give the path of a finished checkpoint_<step>"
  )


def _check_fit(path: str, found, expected) -> None:
  """Raises a ValueError that lists what is missing, too much or of another shape."""
  missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
  problems = [f'{k}: missing' for k in sorted(missing)]
  problems += [f'{k}: not in the model' for k in sorted(extra) if 'target/' in k]
  for k in sorted(expected.keys() & found.keys()):
    has, wants = np.shape(found[k]), tuple(expected[k].shape)
    if has != wants:
      problems.append(f'{k}: {has} in the checkpoint, {wants} in the model')
  if problems:
    more = f'\n  and {len(problems) - 20} more' if len(problems) > 20 else ''
    raise ValueError(
      f"the checkpoint {path} does not fit the model; check the model's sizes, its "
      'number of heads and layers, or the path:\n  ' + '\n  '.join(problems[:20]) + more
    )


def restore_train_state(
  path: str,
  train_state: train_state_lib.TrainState,
  partitioner: partitioning.PjitPartitioner,
  dtype: Any = None,
) -> train_state_lib.TrainState:
  """Restores a state, given as `jax.ShapeDtypeStruct`s, onto the devices.

  Parameters get `dtype`; None keeps the saved one.

  Raises:
    ValueError: if the checkpoint is missing, incomplete, or does not fit.
  """
  logging.info('Restoring from the checkpoint %s', path)
  axes = partitioner.get_mesh_axes(train_state)
  wanted = train_state.state_dict()
  saved = load_t5x_checkpoint(path, with_moments='param_states' in wanted['state'])
  found, expected, specs = (
    traverse_util.flatten_dict(tree, sep='/')
    for tree in (saved, wanted, axes.state_dict())
  )
  _check_fit(path, found, expected)

  def place(key, like):
    to = like.dtype if key.startswith('state/') else dtype or found[key].dtype
    x = np.asarray(found[key]).astype(jnp.dtype(to), copy=False)
    sharding = partitioner.sharding(specs[key])
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  placed = {k: place(k, like) for k, like in expected.items()}
  return train_state.restore_state(traverse_util.unflatten_dict(placed, sep='/'))


def _dataset_file(folder: epath.Path) -> epath.Path:
  """Returns where this host keeps its position in the data."""
  index, count = jax.process_index(), jax.process_count()
  if count > 1:
    folder = folder / f'process_{index}-of-{count}'
  return folder / f'train_ds-{index:03}-of-{count:03}'


class DatasetHandler(ocp.CheckpointHandler):
  """Saves and restores a CLU dataset iterator; without one, an empty folder."""

  def save(self, directory: epath.Path, args: 'DatasetArgs'):
    if args.item is not None:
      file = _dataset_file(directory)
      file.parent.mkdir(exist_ok=True)
      args.item.save(os.fspath(file))

  def restore(self, directory: epath.Path, args: 'DatasetArgs'):
    args.item.restore(os.fspath(_dataset_file(directory)))


@ocp.args.register_with_handler(DatasetHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DatasetArgs(ocp.args.CheckpointArgs):
  """A dataset iterator, or None."""

  item: Any = None


def restore_dataset(path: str, ds_iter: Any) -> None:
  """Moves a dataset iterator to where it was when the checkpoint was written.

  As in T5X, a legacy checkpoint is passed over. Raises ValueError if an Orbax one holds
  no dataset state.
  """
  folder = epath.Path(path)
  if (folder / _PREFIX).is_file():
    logging.info('%s is a legacy checkpoint: the dataset starts anew', folder)
    return
  index = _dataset_file(folder / 'dataset').with_suffix('.index')
  if not index.is_file():
    raise ValueError(
      f'{folder} holds no dataset state ({index.relative_to(folder)}); set '
      'restore_dataset = False, and SaveCheckpointConfig.save_dataset = False if this '
      'run continues a run without it'
    )
  DatasetHandler().restore(folder / 'dataset', DatasetArgs(ds_iter))


@gin.configurable
class OrbaxCheckpointManagerInterface(ocp.CheckpointManager):
  """Writes checkpoints of one run, in the background, and removes old ones.

  It restores one as well; to train, `TrainStateInitializer` does.
  """

  def __init__(
    self,
    directory: str,
    train_state: train_state_lib.TrainState | None = None,
    partitioner: partitioning.PjitPartitioner | None = None,
    dataset_iterator: Any = None,
    save_dtype: Any = None,
    restore_dtype: Any = None,
    keep: int | None = None,
    force_keep_period: int | None = None,
  ):
    """Opens (and cleans up after a crash) the folder of a run, which must exist.

    See `SaveCheckpointConfig`; any step that `force_keep_period` divides stays, too.
    The state, of shapes, and the partitioner are those of `restore`.
    """
    self._like = train_state, partitioner, restore_dtype
    self._dataset_iterator, self._save_dtype = dataset_iterator, save_dtype
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      keep_period=force_keep_period,
      step_prefix=_PREFIX,
      cleanup_tmp_directories=True,
    )
    state_handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
    handlers = {'state': state_handler, 'dataset': DatasetHandler()}
    folder = epath.Path(directory).absolute()
    super().__init__(folder, options=options, item_handlers=handlers)

  def save(self, train_state: train_state_lib.TrainState) -> bool:
    """Starts to write a checkpoint (to a temporary name, renamed when complete)."""
    state = train_state.state_dict()
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(), state)
    if self._save_dtype is not None:
      cast = ocp.SaveArgs(dtype=jnp.dtype(self._save_dtype))
      save_args['target'] = jax.tree.map(lambda _: cast, state['target'])
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state, save_args=save_args),
      dataset=DatasetArgs(self._dataset_iterator),
    )
    return super().save(int(train_state.step), args=args, force=True)

  def restore(self, path: str) -> train_state_lib.TrainState:
    """Returns the state of the checkpoint; see `restore_train_state`."""
    return restore_train_state(path, *self._like)
