"""Configurations, and the pieces that train, eval and infer share."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from absl import logging
from flax import traverse_util
from flax.core import unfreeze

from t5x import checkpoints, partitioning
from t5x import train_state as train_state_lib
from t5x.data import DatasetConfig as DatasetConfig  # T5X has these here
from t5x.data import get_dataset as get_dataset
from t5x.data import get_vocabulary as get_vocabulary
from t5x.data import verify_matching_vocabs as verify_matching_vocabs


@dataclasses.dataclass
class SaveCheckpointConfig:
  """How checkpoints are saved: with parameters of `dtype` (None: as they are).

  `period` is in steps; the last `keep` checkpoints stay (None: all).
  """

  dtype: str | None = 'float32'
  period: int | None = None
  keep: int | None = None
  save_dataset: bool = False


@dataclasses.dataclass
class RestoreCheckpointConfig:
  """Which checkpoint is restored, and how.

  Attributes are T5X's; the mode is specific (`path` is the checkpoint) or latest (in
  the folder `path`). An empty path is for none. Training has no use for the manager.
  """

  path: Any = ()
  mode: str = 'latest'
  dtype: str | None = None
  restore_dataset: bool = False
  checkpoint_manager_cls: Callable[..., Any] = (
    checkpoints.OrbaxCheckpointManagerInterface
  )

  def __post_init__(self):
    if self.mode not in ('specific', 'latest'):
      raise ValueError(f"mode={self.mode!r}; choose one of 'specific', 'latest'")
    if self.path and not isinstance(self.path, str):
      raise ValueError(f'path={self.path!r}; give the path of one checkpoint')

  def find(self) -> str | None:
    """Returns the checkpoint's folder, or None (not in T5X)."""
    if self.mode == 'specific' or not self.path:
      return self.path or None
    steps = checkpoints.all_steps(self.path)
    return checkpoints.get_checkpoint_dir(self.path, steps[-1]) if steps else None


@dataclasses.dataclass
class CheckpointConfig:
  """How a run saves and restores; None for not at all."""

  save: SaveCheckpointConfig | None = None
  restore: RestoreCheckpointConfig | None = None


def create_learning_rate_scheduler(
  factors: str,
  base_learning_rate: float = 0.5,
  warmup_steps: int = 1000,
  steps_per_cycle: int = 100000,
) -> Callable[[jnp.ndarray], jnp.ndarray]:
  """Returns step -> learning rate, a product of factors joined by `*`, named below."""

  def cosine_decay(s):
    progress = jnp.maximum(0.0, (s - warmup_steps) / float(steps_per_cycle)) % 1.0
    return jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))

  known = {
    'constant': lambda s: base_learning_rate,
    'rsqrt_decay': lambda s: 1.0 / jnp.sqrt(jnp.maximum(s, warmup_steps)),
    'cosine_decay': cosine_decay,
  }
  names = [name.strip() for name in factors.split('*')]
  unknown = [name for name in names if name not in known]
  if unknown:
    raise ValueError(
      f'factors={factors!r}: this stand-in for T5X has no {", ".join(unknown)}; choose'
      f' among {", ".join(known)}'
    )

  def learning_rate(step: jnp.ndarray) -> jnp.ndarray:
    rate = functools.reduce(lambda r, name: r * known[name](step), names, 1.0)
    return jnp.asarray(jnp.maximum(rate, 1e-8), jnp.float32)  # T5X's least rate.

  return learning_rate


class TrainStateInitializer:
  """Makes a state on the devices, from scratch or from a checkpoint.

  Attributes:
    global_train_state_shape: the state with `jax.ShapeDtypeStruct`s for arrays.
    train_state_axes: the state with `PartitionSpec`s (or None) for arrays.
  """

  def __init__(
    self,
    optimizer_def,
    init_fn: Callable[..., Any],
    input_shapes: Mapping[str, Any],
    partitioner: partitioning.PjitPartitioner,
    input_types: Mapping[str, Any] | None = None,
  ):
    """Works out shapes and layout of a state (without optimizer if that is None).

    `init_fn` is `EncoderDecoderModel.get_initial_variables`; see there.
    """

    def initialize(rng):
      variables = init_fn(rng=rng, input_shapes=input_shapes, input_types=input_types)
      if optimizer_def is None:
        return train_state_lib.InferenceState.create(variables)
      return train_state_lib.FlaxOptimTrainState.create(optimizer_def, variables)

    self._initialize, self._partitioner = initialize, partitioner
    self.global_train_state_shape = jax.eval_shape(initialize, jax.random.PRNGKey(0))
    self.train_state_axes = partitioner.get_mesh_axes(self.global_train_state_shape)

  def from_scratch(self, init_rng) -> train_state_lib.TrainState:
    """Initialises the state."""
    logging.info('Initializing parameters from scratch.')
    fn = self._partitioner.partition(self._initialize, None, self.train_state_axes)
    return fn(init_rng)

  def from_checkpoint(self, path: str, dtype=None) -> train_state_lib.TrainState:
    """Restores one checkpoint; see `checkpoints.restore_train_state`."""
    shape = self.global_train_state_shape
    return checkpoints.restore_train_state(path, shape, self._partitioner, dtype)

  def log_model_info(self, folder: str) -> None:
    """Logs and writes (model-info.txt) every array's size, shape and layout."""
    state = self.global_train_state_shape
    trees = (state, state.as_logical_axes(), self.train_state_axes)
    shapes, names, specs = (flatten_dict_string_keys(t.state_dict()) for t in trees)
    lines, total = [], sum(x.size for x in jax.tree.leaves(state.params))
    for key, x in shapes.items():
      name = key.partition('/')[2]
      axes = '' if names[key] is None else f' axes {tuple(names[key])}'
      spec = None if specs[key] is None else tuple(specs[key])
      lines.append(
        f'Variable {name:<80} size {x.size:<12} shape {x.shape!s:<20}{axes} '
        f'partition spec {spec}'
      )
    text = '\n'.join([*lines, f'Total number of parameters: {total}', ''])
    logging.info('%s', text)
    if jax.process_index() > 0:
      return
    with tf.io.gfile.GFile(os.path.join(folder, 'model-info.txt'), 'w') as f:
      f.write(text)


def restore_for_inference(model, partitioner, shapes, types, cfg, output_dir: str):
  """Returns a state without optimizer, and its layout (not in T5X).

  `shapes` and `types` are those of a batch; `cfg` is a `RestoreCheckpointConfig`.
  """
  initializer = TrainStateInitializer(
    None, model.get_initial_variables, shapes, partitioner, types
  )
  initializer.log_model_info(output_dir)
  path = cfg.find()
  if path is None:
    raise ValueError(f'no checkpoint: RestoreCheckpointConfig.path is {cfg.path!r}')
  shape = initializer.global_train_state_shape
  manager = cfg.checkpoint_manager_cls(
    path, shape, partitioner, restore_dtype=cfg.dtype
  )
  state = manager.restore(path=path)
  manager.close()
  return state, initializer.train_state_axes


def get_infer_fn(
  infer_step: Callable[..., Any],
  batch_size: int,
  train_state_axes: train_state_lib.TrainState,
  partitioner: partitioning.PjitPartitioner,
):
  """Returns a function that runs a model's method over an enumerated dataset.

  It takes (ds, train_state, rng=None), and returns a list of (index, output), and with
  auxiliary outputs also a dict of name -> list. The last batch is filled up.
  """
  with_rng = 'rng' in inspect.signature(infer_step).parameters

  def step_fn(params, batch, rng):
    return infer_step(params, batch, rng) if with_rng else infer_step(params, batch)

  partitioner.check_batch_size(batch_size)
  in_axes = (train_state_axes.params, partitioner.data_partition_spec, None)
  step = partitioner.partition(step_fn, in_axes, None)
  rows = partitioner.sharding(partitioner.data_partition_spec)

  def infer_fn(ds: tf.data.Dataset, train_state, rng=None):
    indices, outputs = [], []
    for index, batch in ds.batch(batch_size).as_numpy_iterator():
      step_rng = None
      if rng is not None:
        step_rng, rng = jax.random.split(rng)
      full = {k: np.resize(v, (batch_size, *v.shape[1:])) for k, v in batch.items()}
      # Every host reads all rows, and puts its part on its devices.
      full = {
        k: jax.make_array_from_callback(v.shape, rows, lambda i, v=v: v[i])
        for k, v in full.items()
      }
      output = jax.device_get(step(train_state.params, full, step_rng))
      outputs.append(jax.tree.map(lambda x: x[: len(index)], output))  # noqa: B023
      indices.extend(index.tolist())
    if not outputs:
      raise ValueError('the dataset to infer on is empty; check its split and filters')
    joined = jax.tree.map(lambda *xs: np.concatenate(xs).tolist(), *outputs)
    if isinstance(joined, tuple):
      return list(zip(indices, joined[0], strict=True)), joined[1]
    return list(zip(indices, joined, strict=True))

  return infer_fn


def flatten_dict_string_keys(x) -> dict[str, Any]:
  """Flattens nested dicts to keys joined by `/`."""
  return traverse_util.flatten_dict(unfreeze(x), sep='/')
