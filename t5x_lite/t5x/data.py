"""Training and evaluation data: seqio tasks as batches."""

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import clu.data
import jax
import jax.experimental.multihost_utils
import numpy as np
import seqio
import tensorflow as tf

from t5x import models


@dataclasses.dataclass
class DatasetConfig:
  """A seqio task or mixture, and how it is read. Attributes are T5X's.

  The seed (None: the time) is that of shuffling and preprocessing.
  """

  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int] | None
  split: str
  batch_size: int
  shuffle: bool
  seed: int | None
  use_cached: bool = False
  pack: bool = False
  module: str | None = None


def get_task(cfg: DatasetConfig) -> seqio.Task | seqio.Mixture:
  """Imports what registers the task or mixture, and returns it."""
  if cfg.module:
    importlib.import_module(cfg.module)
  return seqio.get_mixture_or_task(cfg.mixture_or_task_name)


def get_vocabulary(cfg: DatasetConfig) -> tuple[seqio.Vocabulary, seqio.Vocabulary]:
  """Returns the vocabularies of a task's inputs and targets, which it must have."""
  features = get_task(cfg).output_features
  if not {'inputs', 'targets'} <= set(features):
    raise ValueError(
      f"the task {cfg.mixture_or_task_name} lacks 'inputs' or 'targets': it has "
      f'{sorted(features)}'
    )
  return features['inputs'].vocabulary, features['targets'].vocabulary


def verify_matching_vocabs(cfg: DatasetConfig, model: models.EncoderDecoderModel):
  """Raises a ValueError if the task's vocabularies are not the model's."""
  task, own = get_vocabulary(cfg), (model.input_vocabulary, model.output_vocabulary)
  if task != own:
    raise ValueError(
      f'vocabularies differ: the task {cfg.mixture_or_task_name} has {task}, the model '
      f"has {own}; give the model the task's input_vocabulary and output_vocabulary"
    )


def time_as_seed() -> int:
  """Returns a new seed, the same on all hosts."""
  now = np.int32(time.time())
  return int(jax.experimental.multihost_utils.broadcast_one_to_all(now))


def get_dataset(
  cfg: DatasetConfig,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
  num_epochs: int | None = None,
) -> tf.data.Dataset:
  """Returns this host's part of each batch; ValueError for an unknown split."""
  task = get_task(cfg)
  if cfg.split not in task.splits:
    raise ValueError(
      f'the task {task.name} has no split {cfg.split!r}; it has {sorted(task.splits)}'
    )
  return seqio.get_dataset(
    mixture_or_task_name=task,
    task_feature_lengths=cfg.task_feature_lengths,
    dataset_split=cfg.split,
    shuffle=cfg.shuffle,
    num_epochs=num_epochs,
    feature_converter=feature_converter_cls(pack=cfg.pack),
    shard_info=seqio.ShardInfo(shard_id, num_shards),
    use_cached=cfg.use_cached,
    seed=time_as_seed() if cfg.seed is None else cfg.seed,
    batch_size=cfg.batch_size // num_shards,
  )


def get_training_eval_datasets(
  cfg: DatasetConfig,
  shard_id: int,
  num_shards: int,
  eval_steps: int,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
) -> Mapping[str, tf.data.Dataset]:
  """Returns this host's part of `eval_steps` batches, by task that has the split."""
  task = get_task(cfg)
  names = [t.name for t in seqio.get_subtasks(task) if cfg.split in t.splits]
  if isinstance(task, seqio.Mixture):
    names.append(task.name)
  datasets = {}
  for name in names:
    # Batched anew after the repeat, so that a small split fills every batch.
    one = dataclasses.replace(cfg, mixture_or_task_name=name, batch_size=1)
    epochs = eval_steps * cfg.batch_size
    examples = get_dataset(one, 0, 1, feature_converter_cls, epochs).unbatch().repeat()
    examples = examples.shard(num_shards, shard_id)
    batches = examples.batch(cfg.batch_size // num_shards, drop_remainder=True)
    datasets[name] = batches.take(eval_steps).cache()
  return datasets


def prepare_train_iter(ds: Any) -> clu.data.PeekableDatasetIterator:
  """Makes a `tf.data.Dataset`, or clu's iterator, one whose position can be saved."""
  if isinstance(ds, tf.data.Dataset):
    ds = clu.data.TfDatasetIterator(ds, checkpoint=True)
  return clu.data.PeekableDatasetIterator(ds)


def batch_shapes(element_spec: Mapping[str, Any], batch_size: int):
  """Returns the shapes and dtypes of a batch of all hosts, to compile for."""
  return {
    k: jax.ShapeDtypeStruct(
      (batch_size, *s.shape[1:]), tf.as_dtype(s.dtype).as_numpy_dtype
    )
    for k, s in element_spec.items()
  }
