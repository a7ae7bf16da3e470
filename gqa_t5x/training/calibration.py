"""Runs a function of parameters and batches over a task, laid out as in training."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import seqio
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from t5x import models, partitioning, utils

from gqa_t5x.checkpoints import folders, tree
from gqa_t5x.checkpoints.tree import TARGET
from gqa_t5x.model import network
from gqa_t5x.training import restore

Array = jax.Array
Batch = Mapping[str, np.ndarray]


def map_batches(
  function: Callable[..., Any],
  *,
  model: models.BaseTransformerModel,
  dataset_cfg: utils.DatasetConfig,
  restore_checkpoint_cfg: utils.RestoreCheckpointConfig,
  partitioner: partitioning.PjitPartitioner,
  num_sequences: int,
  original: tuple[models.BaseTransformerModel, str] | None = None,
) -> tuple[int, Iterator[tuple[int, Any]]]:
  """Applies a function to a checkpoint's parameters and each batch of a task.

  Args:
    function: (parameters, batch of model features) -> arrays; it is compiled. With an
      original, its parameters come in between.
    model: of `gqa_t5x.training.models`.
    dataset_cfg: the data.
    restore_checkpoint_cfg: the checkpoint, mode "specific".
    partitioner: T5X's.
    num_sequences: rows to read, at most.
    original: another model and its checkpoint.

  Returns:
    The checkpoint's step, and an iterator of (rows, what the function returned); the
    rest of a batch is padding.

  Raises:
    ValueError: the vocabularies differ, or the checkpoint cannot be read.
  """
  utils.verify_matching_vocabs(dataset_cfg, model)
  path, dtype = restore_checkpoint_cfg.path, restore_checkpoint_cfg.dtype
  values, layout, step = _restore_params(model, partitioner, path, dtype)
  values, layouts = [values], [layout]
  if original is not None:
    more, layout, _ = _restore_params(original[0], partitioner, original[1], dtype)
    values.append(more)
    layouts.append(layout)
  batch_spec = partitioner.data_partition_spec
  compiled = partitioner.partition(function, (*layouts, batch_spec), None)
  sharding = NamedSharding(partitioner.mesh, batch_spec)

  def to_devices(x: np.ndarray) -> Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return step, (
    (rows, compiled(*values, jax.tree.map(to_devices, batch)))
    for rows, batch in read_batches(model, dataset_cfg, num_sequences)
  )


def original_of(
  model: models.BaseTransformerModel, path: str
) -> tuple[models.BaseTransformerModel, str]:
  """Returns the model that another was converted from, and its checkpoint's folder.

  Args:
    model: the converted one.
    path: as of `folders.find_checkpoint`.

  Raises:
    BadInput: there is no checkpoint, or more than its key/value heads is different.
  """
  folder = folders.find_checkpoint(epath.Path(path))
  params = tree.parameters(folders.open_checkpoint(folder))
  there = tree.read_architecture({name: t.shape for name, t in params.items()})
  heads = {f'{kind}_num_kv_heads': K for kind, K in there.num_kv_heads.items()}
  cfg = model.module.config.replace(**heads, kv_head_dim=there.kv_head_dim)
  other = copy.copy(model)
  other.module = network.Transformer(cfg)
  restore.check_fits(folder, other)
  return other, str(folder)


def _restore_params(
  model: models.BaseTransformerModel,
  partitioner: partitioning.PjitPartitioner,
  path: str,
  dtype: str | None,
) -> tuple[Any, Any, int]:
  """The parameters, on the devices, their PartitionSpecs, and the checkpoint's step."""
  tokens = {'encoder_input_tokens': (1, 1), 'decoder_input_tokens': (1, 1)}
  initializer = utils.TrainStateInitializer(
    optimizer_def=None,
    init_fn=model.get_initial_variables,
    input_shapes=tokens,
    partitioner=partitioner,
    input_types=dict.fromkeys(tokens, jnp.int32),
  )
  tensors = folders.open_checkpoint(epath.Path(path))

  def put(keys, shape, spec):
    name = jax.tree_util.keystr(keys, simple=True, separator='/')
    value = tensors[TARGET + name].read()
    value = value.astype(dtype or value.dtype)
    sharding = NamedSharding(partitioner.mesh, spec or PartitionSpec())
    return jax.make_array_from_callback(shape.shape, sharding, lambda i: value[i])

  layout = initializer.train_state_axes.params
  shapes = initializer.global_train_state_shape.params
  values = jax.tree_util.tree_map_with_path(put, shapes, layout)
  restore.check_finite(values, path)
  return values, layout, int(tensors['state/step'].read())


def read_batches(
  model: models.BaseTransformerModel, cfg: utils.DatasetConfig, num_sequences: int
) -> Iterator[tuple[int, Batch]]:
  """Yields (rows, batch of model features), filled up with padding, on every host."""
  dataset = seqio.get_dataset(
    cfg.mixture_or_task_name,
    cfg.task_feature_lengths,
    dataset_split=cfg.split,
    shuffle=cfg.shuffle,
    num_epochs=1,
    feature_converter=model.FEATURE_CONVERTER_CLS(pack=cfg.pack),
    use_cached=cfg.use_cached,
    seed=cfg.seed,
  )
  for batch in dataset.take(num_sequences).batch(cfg.batch_size).as_numpy_iterator():
    rows = len(batch['encoder_input_tokens'])
    missing = ((0, cfg.batch_size - rows), (0, 0))
    yield rows, {name: np.pad(array, missing) for name, array in batch.items()}
