"""Checkpoints: writes T5X's Orbax layout, reads that and T5X's legacy layout.

Orbax: `checkpoint_<step>/state/` (one tree: `target`, `state/step`,
`state/param_states`) and `checkpoint_<step>/dataset/train_ds-000-of-001*`.
Legacy: `checkpoint_<step>/checkpoint`, a msgpack file whose larger arrays are
TensorStore specs, and next to it their folders `target.*` and `state.*`.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from etils import epath
from flax import serialization, traverse_util

from t5x import partitioning
from t5x import train_state as train_state_lib

_PREFIX = 'checkpoint'
_DATASET_FILE = 'train_ds-000-of-001'


def get_local_data(x):
  """Returns this host's copy of a (replicated) array; other values unchanged."""
  if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
    return np.asarray(x.addressable_data(0))
  return x


def all_steps(checkpoints_dir: str) -> Sequence[int]:
  """Returns the steps of the finished checkpoints in a folder, in order."""
  matches = (
    re.fullmatch(rf'{_PREFIX}_(\d+)', path.name)
    for path in epath.Path(checkpoints_dir).iterdir()
  )
  return sorted(int(m[1]) for m in matches if m)


def latest_step(checkpoints_dir: str) -> int | None:
  """Returns the last of `all_steps`, or None."""
  return max(all_steps(checkpoints_dir), default=None)


def get_checkpoint_dir(checkpoints_dir: str, step: int) -> str:
  """Returns the folder of a step's checkpoint."""
  return os.path.join(checkpoints_dir, f'{_PREFIX}_{step}')


def _find(path: str, step: int | None) -> epath.Path:
  """Returns the folder of a checkpoint, given it, its msgpack file or its parent."""
  folder = epath.Path(path)
  if folder.name == _PREFIX and folder.is_file():
    return folder.parent
  if folder.is_dir() and (step is not None or latest_step(path) is not None):
    step = latest_step(path) if step is None else step
    folder = epath.Path(get_checkpoint_dir(path, step))
  if not (folder / _PREFIX).is_file() and not (folder / 'state').is_dir():
    raise ValueError(
      f"no checkpoint at {folder}: it has neither a folder 'state' (Orbax) nor a file "
      f"'{_PREFIX}' (legacy T5X). Give the path of a finished checkpoint_<step>"
    )
  return folder


def _read_tensorstore(folder: epath.Path, spec: Mapping[str, Any]) -> np.ndarray:
  """Reads the array of a legacy spec, whose path is relative to the checkpoint."""
  relative = (spec['kvstore'].get('path') or spec['path']).rstrip('/')
  path = os.fspath(folder / os.path.basename(relative))
  if path.startswith('gs://'):
    bucket, _, path = path.removeprefix('gs://').partition('/')
    kvstore = {'driver': 'gcs', 'bucket': bucket, 'path': f'{path}/'}
  else:
    kvstore = {'driver': 'file', 'path': f'{path}/'}
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
  return traverse_util.unflatten_dict(
    {
      k: _read_tensorstore(folder, v) if isinstance(v, dict) else np.asarray(v)
      for k, v in flat.items()
    }
  )


def _read_orbax(folder: epath.Path, with_moments: bool) -> dict[str, Any]:
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
    tree = checkpointer.metadata(folder / 'state').item_metadata.tree
    item = {'target': tree['target'], 'state': dict(tree['state'])}
    if not with_moments:
      item['state'].pop('param_states', None)
    args = ocp.args.PyTreeRestore(
      item=item,
      restore_args=jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item
      ),
      partial_restore=True,
    )
    return checkpointer.restore(folder / 'state', args)


def load_t5x_checkpoint(
  path: str,
  step: int | None = None,
  state_transformation_fns: Sequence[Any] = (),
  remap: bool = True,
  restore_dtype: Any = None,
  lazy_parameters: bool = False,
  with_moments: bool = True,
) -> dict[str, Any]:
  """Reads a checkpoint of either layout without a model.

  Args:
    path: a checkpoint's folder, its msgpack file, or (with `step`, or for the last
      step) its parent folder.
    step: which checkpoint of a parent folder.
    state_transformation_fns: each is called as `fn(state_dict, {})`.
    remap: accepted for T5X's sake.
    restore_dtype: dtype of `target`, or None for the saved one.
    lazy_parameters: must be False here.
    with_moments: whether the optimizer's moments are read (not in T5X).

  Returns:
    Nested dicts of NumPy arrays: `target`, `state/step`, `state/param_states`.

  Raises:
    ValueError: if there is no such checkpoint, or it is incomplete.
  """
  del remap
  if lazy_parameters:
    raise ValueError('lazy_parameters needs the real T5X')
  folder = _find(path, step)
  legacy = (folder / _PREFIX).is_file()
  state = _read_legacy(folder) if legacy else _read_orbax(folder, with_moments)
  for fn in state_transformation_fns:
    state = fn(state, {})
  if restore_dtype is not None:
    state['target'] = jax.tree.map(lambda x: x.astype(restore_dtype), state['target'])
  return state


def _check_fit(path: str, found, expected, strict: bool) -> None:
  """Raises a ValueError that lists what is missing, too much or of another shape."""
  problems = [f'{k}: missing' for k in sorted(expected.keys() - found.keys())]
  if strict:
    extra = sorted(k for k in found.keys() - expected.keys() if k.startswith('target/'))
    problems += [f'{k}: not in the model' for k in extra]
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


def _flatten(tree) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')


def restore_train_state(
  path: str,
  train_state: train_state_lib.TrainState,
  partitioner: partitioning.PjitPartitioner,
  *,
  dtype: Any = None,
  strict: bool = True,
  state_transformation_fns: Sequence[Any] = (),
  fallback_state: Mapping[str, Any] | None = None,
) -> train_state_lib.TrainState:
  """Restores a state onto the devices.

  Args:
    path: a checkpoint's folder, in either layout.
    train_state: shapes (`jax.ShapeDtypeStruct`) of what is wanted.
    partitioner: lays the arrays out.
    dtype: dtype of the parameters, or None for the saved one.
    strict: whether parameters that the model lacks are an error.
    state_transformation_fns: each is called as `fn(state_dict, wanted_state_dict)`.
    fallback_state: a state dict that fills in what the checkpoint lacks.

  Raises:
    ValueError: if the checkpoint is missing, incomplete, or does not fit.
  """
  wanted = train_state.state_dict()
  with_moments = 'param_states' in wanted['state']
  state = load_t5x_checkpoint(path, with_moments=with_moments)
  for fn in state_transformation_fns:
    state = fn(state, wanted)
  found, expected = _flatten(state), _flatten(wanted)
  if fallback_state is not None:
    found = _flatten(fallback_state) | found
  _check_fit(path, found, expected, strict)
  specs = _flatten(partitioner.get_mesh_axes(train_state).state_dict())

  def place(key, like):
    x = np.asarray(found[key])
    if key.startswith('target/'):
      x = x if dtype is None else x.astype(jnp.dtype(dtype))
    else:
      x = x.astype(like.dtype)
    return jax.device_put(x, partitioner.sharding(specs[key]))

  placed = {k: place(k, like) for k, like in expected.items()}
  return train_state.restore_state(traverse_util.unflatten_dict(placed, sep='/'))


class DatasetHandler(ocp.CheckpointHandler):
  """Saves and restores a CLU dataset iterator; without one, an empty folder."""

  def save(self, directory: epath.Path, args: 'DatasetArgs'):
    if args.item is not None:
      args.item.save(os.fspath(directory / _DATASET_FILE))

  def restore(self, directory: epath.Path, args: 'DatasetArgs'):
    args.item.restore(os.fspath(directory / _DATASET_FILE))
    return args.item


@ocp.args.register_with_handler(DatasetHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DatasetArgs(ocp.args.CheckpointArgs):
  """A dataset iterator, or None."""

  item: Any = None


def restore_dataset(path: str, ds_iter: Any) -> None:
  """Moves a dataset iterator to where it was when the checkpoint was written.

  A legacy checkpoint without dataset state is passed over, as in T5X.

  Raises:
    ValueError: if an Orbax checkpoint holds no dataset state.
  """
  folder = _find(path, None)
  if (folder / _PREFIX).is_file():
    logging.info('%s is a legacy checkpoint: the dataset starts anew', folder)
    return
  if not (folder / 'dataset' / f'{_DATASET_FILE}.index').is_file():
    raise ValueError(
      f'{folder} holds no dataset state (dataset/{_DATASET_FILE}.index); set '
      'restore_dataset = False, and SaveCheckpointConfig.save_dataset = False if this '
      'run continues a run without it'
    )
  DatasetHandler().restore(folder / 'dataset', DatasetArgs(ds_iter))


class OrbaxCheckpointManagerInterface:
  """Writes checkpoints of one run, in the background, and removes old ones."""

  def __init__(
    self,
    directory: str,
    dataset_iterator: Any = None,
    save_dtype: Any = None,
    keep: int | None = None,
    period: int | None = 1,
  ):
    """Opens (and cleans up after a crash) the folder of a run.

    Args:
      directory: the run's folder; it must exist.
      dataset_iterator: saved along if given.
      save_dtype: dtype of the saved parameters, or None for their own.
      keep: how many checkpoints stay, or None for all.
      period: steps between two (the caller decides when to save).
    """
    self._dataset_iterator = dataset_iterator
    self._save_dtype = save_dtype
    self._manager = ocp.CheckpointManager(
      epath.Path(directory).absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        save_interval_steps=period or 1,
        step_prefix=_PREFIX,
        cleanup_tmp_directories=True,
      ),
      item_handlers={
        'state': ocp.PyTreeCheckpointHandler(use_ocdbt=True),
        'dataset': DatasetHandler(),
      },
    )

    self.directory = self._manager.directory
    self.all_steps = self._manager.all_steps
    self.latest_step = self._manager.latest_step
    self.wait_until_finished = self._manager.wait_until_finished
    self.close = self._manager.close

  def _check_space(self, state: Any) -> None:
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    if os.path.isdir(self.directory):
      free = shutil.disk_usage(self.directory).free
      if free < needed:
        raise OSError(
          f'no disk space for a checkpoint in {self.directory}: it takes {needed:,} '
          f'bytes, {free:,} are free. Free some, or lower SaveCheckpointConfig.keep'
        )

  def save(
    self,
    train_state: train_state_lib.TrainState,
    state_transformation_fns: Sequence[Any] = (),
    force: bool = True,
  ) -> bool:
    """Starts to write a checkpoint (to a temporary name, renamed when complete).

    Raises:
      OSError: if it does not fit on the disk.
      ValueError: if transformations are asked for.
    """
    if state_transformation_fns:
      raise ValueError('state_transformation_fns at saving need the real T5X')
    state = train_state.state_dict()
    self._check_space(state)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(), state)
    if self._save_dtype is not None:
      cast = ocp.SaveArgs(dtype=jnp.dtype(self._save_dtype))
      save_args['target'] = jax.tree.map(lambda _: cast, state['target'])
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state, save_args=save_args),
      dataset=DatasetArgs(self._dataset_iterator),
    )
    step = int(get_local_data(train_state.step))
    return self._manager.save(step, args=args, force=force)
