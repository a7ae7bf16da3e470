"""Configurations, and the pieces that train, eval and infer share."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
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
from t5x.data import (  # noqa: F401 (T5X has these here)
  DatasetConfig,
  get_dataset,
  get_training_eval_datasets,
  get_vocabulary,
  get_zeros_batch_like_dataset,
  import_module,
  prepare_train_iter,
  round_vocab_size_to_multiple,
  verify_matching_vocabs,
)

get_local_data = checkpoints.get_local_data


def _check_choice(owner: str, name: str, value: Any, choices: Sequence[Any]) -> None:
  if value not in choices:
    raise ValueError(f'{owner}.{name}={value!r}; choose one of {list(choices)}')


@dataclasses.dataclass
class SaveCheckpointConfig:
  """How checkpoints are saved.

  Attributes:
    dtype: of the saved parameters; None keeps theirs.
    period: steps between two checkpoints.
    keep: how many of the last checkpoints stay; None keeps all.
    save_dataset: whether the position in the training data is saved.
    state_transformation_fns: must be empty here.
  """

  dtype: str | None = 'float32'
  period: int | None = None
  keep: int | None = None
  save_dataset: bool = False
  state_transformation_fns: Sequence[Any] = ()

  def __post_init__(self):
    _check_choice(
      'SaveCheckpointConfig', 'dtype', self.dtype, (None, 'float32', 'bfloat16')
    )


@dataclasses.dataclass
class RestoreCheckpointConfig:
  """Which checkpoint is restored, and how.

  Attributes:
    path: of a checkpoint, or of the folder that holds it; empty for none.
    mode: specific (`path` is the checkpoint), latest (in the folder `path`), or all.
    strict: whether parameters that the model lacks are an error.
    fallback_to_scratch: whether missing parameters are initialised.
    dtype: of the restored parameters; None for the saved one.
    restore_dataset: whether the position in the training data is restored.
    state_transformation_fns: applied to the state dict in order, after reading.
  """

  path: str | Sequence[str] = ()
  mode: str = 'latest'
  strict: bool = True
  fallback_to_scratch: bool = False
  dtype: str | None = None
  restore_dataset: bool = False
  state_transformation_fns: Sequence[Any] = ()

  def __post_init__(self):
    owner = 'RestoreCheckpointConfig'
    _check_choice(owner, 'mode', self.mode, ('specific', 'latest', 'all'))
    dtypes = (None, 'float32', 'bfloat16', 'float16')
    _check_choice(owner, 'dtype', self.dtype, dtypes)


@dataclasses.dataclass
class CheckpointConfig:
  """How a run saves and restores; None for not at all."""

  save: SaveCheckpointConfig | None = None
  restore: RestoreCheckpointConfig | None = None


def create_learning_rate_scheduler(
  factors: str = 'constant * linear_warmup * rsqrt_decay',
  base_learning_rate: float = 0.5,
  warmup_steps: int = 1000,
  decay_factor: float = 0.5,
  steps_per_decay: int = 20000,
  steps_per_cycle: int = 100000,
  step_offset: int = 0,
  min_learning_rate: float = 1e-8,
) -> Callable[[jnp.ndarray], jnp.ndarray]:
  """Returns step -> learning rate, a product of named factors.

  Args:
    factors: names joined by `*`: constant, linear_warmup, linear_decay (which brings
      its own constant and warm-up), rsqrt_decay, rsqrt_normalized_decay, decay_every,
      cosine_decay.
    base_learning_rate: of constant and linear_decay.
    warmup_steps: of the warm-ups and the reciprocal square roots.
    decay_factor: of linear_decay (per step) and decay_every.
    steps_per_decay: of decay_every.
    steps_per_cycle: of cosine_decay.
    step_offset: the step that counts as 0.
    min_learning_rate: lower bound of the product.

  Raises:
    ValueError: if a factor is unknown.
  """
  w, every = warmup_steps, steps_per_decay

  def linear_decay(s):
    return base_learning_rate * jnp.minimum(s / w, 1.0 + decay_factor * (w - s))

  def cosine_decay(s):
    progress = jnp.maximum(0.0, (s - w) / float(steps_per_cycle)) % 1.0
    return jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))

  known = {
    'constant': lambda s: base_learning_rate,
    'linear_warmup': lambda s: jnp.minimum(1.0, s / w),
    'linear_decay': linear_decay,
    'rsqrt_decay': lambda s: 1.0 / jnp.sqrt(jnp.maximum(s, w)),
    'rsqrt_normalized_decay': lambda s: jnp.sqrt(w / jnp.maximum(s, w)),
    'decay_every': lambda s: decay_factor ** (s // every),
    'cosine_decay': cosine_decay,
  }
  names = [name.strip() for name in factors.split('*')]
  for name in names:
    _check_choice('create_learning_rate_scheduler', 'factors', name, list(known))

  def learning_rate(step: jnp.ndarray) -> jnp.ndarray:
    step = jnp.maximum(0, step - step_offset)
    rate = functools.reduce(lambda r, name: r * known[name](step), names, 1.0)
    return jnp.asarray(jnp.maximum(rate, min_learning_rate), jnp.float32)

  return learning_rate


def get_first_valid_restore_config_and_paths(
  restore_cfgs: Sequence[RestoreCheckpointConfig],
) -> tuple[RestoreCheckpointConfig | None, Sequence[str]]:
  """Returns the first configuration that names checkpoints, and their paths.

  Raises:
    ValueError: if a folder of checkpoints does not exist.
  """
  for cfg in restore_cfgs:
    paths = [cfg.path] if isinstance(cfg.path, str) else list(cfg.path or ())
    if cfg.mode == 'specific':
      return cfg, paths
    for folder in paths:
      if not tf.io.gfile.isdir(folder):
        raise ValueError(
          f'no folder {folder!r}, in which mode={cfg.mode!r} looks for checkpoints; '
          'mend RestoreCheckpointConfig.path'
        )
      steps = checkpoints.all_steps(folder)
      found = [checkpoints.get_checkpoint_dir(folder, step) for step in steps]
      if found:
        return cfg, found[-1:] if cfg.mode == 'latest' else found
  return None, []


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
    """Works out shapes and layout; see `EncoderDecoderModel.get_initial_variables`.

    Args:
      optimizer_def: None for a state without optimizer.
      init_fn: the model's `get_initial_variables`.
      input_shapes: of the whole batch.
      partitioner: lays the state out.
      input_types: of the batch.
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

  def from_path(self, path, cfg, init_rng=None, ds_iter=None):
    """Restores one checkpoint (a name of the stand-in's own).

    Raises:
      ValueError: if it is missing or does not fit the model.
    """
    fallback = None
    if cfg.fallback_to_scratch:
      if init_rng is None or not cfg.state_transformation_fns:
        raise ValueError(
          'fallback_to_scratch needs state_transformation_fns and a random seed'
        )
      fallback = self.from_scratch(init_rng).state_dict()
    logging.info('Restoring parameters from the checkpoint %s', path)
    state = checkpoints.restore_train_state(
      path,
      self.global_train_state_shape,
      self._partitioner,
      dtype=cfg.dtype,
      strict=cfg.strict,
      state_transformation_fns=cfg.state_transformation_fns,
      fallback_state=fallback,
    )
    if cfg.restore_dataset and ds_iter is not None:
      checkpoints.restore_dataset(path, ds_iter)
    return state


def create_checkpoint_manager_and_restore(
  train_state_initializer: TrainStateInitializer,
  partitioner: partitioning.PjitPartitioner,
  restore_checkpoint_cfg: RestoreCheckpointConfig | None,
  restore_path: str | None,
  fallback_init_rng: Any,
  save_checkpoint_cfg: SaveCheckpointConfig | None = None,
  model_dir: str | None = None,
  ds_iter: Any = None,
  use_orbax: bool = True,
):
  """Returns a restored state (or None), and what saves checkpoints (or None).

  Raises:
    ValueError: if the checkpoint is missing or does not fit, or for `use_orbax=False`.
  """
  del partitioner
  if not use_orbax:
    raise ValueError('use_orbax=False (writing the legacy layout) needs the real T5X')
  state = None
  if restore_path:
    state = train_state_initializer.from_path(
      restore_path, restore_checkpoint_cfg, fallback_init_rng, ds_iter
    )
  manager = None
  if save_checkpoint_cfg is not None and model_dir:
    manager = checkpoints.OrbaxCheckpointManagerInterface(
      model_dir,
      dataset_iterator=ds_iter if save_checkpoint_cfg.save_dataset else None,
      save_dtype=save_checkpoint_cfg.dtype,
      keep=save_checkpoint_cfg.keep,
      period=save_checkpoint_cfg.period,
    )
  return state, manager


def log_model_info(log_file, full_train_state, partitioner) -> None:
  """Logs every array's size, shape and layout, and the number of parameters.

  Args:
    log_file: written as well, unless None.
    full_train_state: the state, or its shapes.
    partitioner: knows the layout.
  """
  lines, total = [], 0
  logical = partitioner.get_logical_axes(full_train_state)
  mesh = partitioner.get_mesh_axes(full_train_state)
  trees = [full_train_state.state_dict(), logical.state_dict(), mesh.state_dict()]
  shapes, names, specs = map(flatten_dict_string_keys, trees)
  for key, x in shapes.items():
    shape, size = tuple(x.shape), int(np.prod(x.shape))
    total += size if key.startswith('target/') else 0
    if names[key] is not None:
      pairs = zip(names[key], shape, strict=True)
      shape = f'({", ".join(f"{n}={d}" for n, d in pairs)})'
    spec = None if specs[key] is None else tuple(specs[key])
    name = key.partition('/')[2]
    lines.append(
      f'Variable {name:<80} size {size:<12} shape {shape!s:<40} partition spec {spec}'
    )
  lines.append(f'Total number of parameters: {total}')
  for line in lines:
    logging.info('%s', line)
  if log_file is not None:
    with tf.io.gfile.GFile(log_file, 'w') as f:
      f.write('\n'.join(lines) + '\n')


def inference_initializer(cls, model, partitioner, shapes, types, output_dir):
  """Returns an initializer of states without optimizer (not in T5X)."""
  initializer = cls(
    optimizer_def=None,
    init_fn=model.get_initial_variables,
    input_shapes=shapes,
    input_types=types,
    partitioner=partitioner,
  )
  log_file = os.path.join(output_dir, 'model-info.txt')
  log_model_info(log_file, initializer.global_train_state_shape, partitioner)
  return initializer


def get_infer_fn(
  infer_step: Callable[..., Any],
  batch_size: int,
  train_state_axes: train_state_lib.TrainState,
  partitioner: partitioning.PjitPartitioner,
  keep_aux_as_numpy: bool = False,
):
  """Returns a function that runs a model's method over an enumerated dataset.

  Args:
    infer_step: `predict_batch`, `predict_batch_with_aux` or `score_batch`.
    batch_size: examples per call; the last batch is padded with its first example.
    train_state_axes: layout of the state.
    partitioner: partitions the step.
    keep_aux_as_numpy: whether auxiliary outputs stay arrays.

  Returns:
    `fn(ds, train_state, rng=None)` -> a list of (index, output), and with auxiliary
    outputs also a dict of name -> list.
  """
  with_rng = 'rng' in inspect.signature(infer_step).parameters

  def step_fn(params, batch, rng):
    return infer_step(params, batch, rng) if with_rng else infer_step(params, batch)

  data = partitioner.data_partition_spec
  partitioner.get_data_layout(batch_size)  # raises if the batch cannot be split
  step = partitioner.partition(step_fn, (train_state_axes.params, data, None), None)

  def run_batch(params, batch, rng):
    rows = len(next(iter(batch.values())))
    padding = batch_size - rows
    if padding:
      pad = [0] * padding
      batch = {k: np.concatenate([v, v[pad]]) for k, v in batch.items()}
    return jax.tree.map(lambda x: np.asarray(x)[:rows], step(params, batch, rng))

  def infer_fn(ds: tf.data.Dataset, train_state, rng=None):
    indices, outputs = [], []
    for index, batch in ds.batch(batch_size).as_numpy_iterator():
      step_rng = None
      if rng is not None:
        step_rng, rng = jax.random.split(rng)
      indices.extend(int(i) for i in index)
      outputs.append(run_batch(train_state.params, batch, step_rng))
    if not outputs:
      raise ValueError('the dataset to infer on is empty; check its split and filters')
    joined = jax.tree.map(lambda *xs: np.concatenate(xs), *outputs)
    aux = None
    if (
      isinstance(joined, tuple) and len(joined) == 2 and isinstance(joined[1], Mapping)
    ):
      joined, aux = joined
    rows = [jax.tree.map(lambda x: x[i].tolist(), joined) for i in range(len(indices))]  # noqa: B023
    pairs = list(zip(indices, rows, strict=True))
    if aux is None:
      return pairs
    return pairs, jax.tree.map(list if keep_aux_as_numpy else np.ndarray.tolist, aux)

  return infer_fn


def flatten_dict_string_keys(x) -> dict[str, Any]:
  """Flattens nested dicts to keys joined by `/`."""
  return traverse_util.flatten_dict(unfreeze(x), sep='/')
