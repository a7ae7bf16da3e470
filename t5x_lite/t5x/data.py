"""Training and evaluation data: seqio tasks as batches on the devices."""

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import clu.data
import jax
import jax.numpy as jnp
import seqio
import tensorflow as tf

from t5x import models


@dataclasses.dataclass
class DatasetConfig:
  """A seqio task or mixture, and how it is fed.

  Attributes:
    mixture_or_task_name: a registered name (or the task itself).
    task_feature_lengths: feature name to tokens.
    split: of the task.
    batch_size: examples (packed ones, if packed) per step, over all devices.
    shuffle: whether the examples are shuffled.
    seed: of shuffling and preprocessing; None takes the time.
    use_cached: whether the task's offline cache is read.
    pack: whether several examples share a row.
    use_custom_packing_ops: see seqio.
    module: imported first, to register the task.
    use_memory_cache: whether evaluation data stay in memory.
    trim_output_features: see seqio.
  """

  mixture_or_task_name: Any
  task_feature_lengths: Mapping[str, int] | None
  split: str
  batch_size: int
  shuffle: bool
  seed: int | None
  use_cached: bool = False
  pack: bool = False
  use_custom_packing_ops: bool = False
  module: str | None = None
  use_memory_cache: bool = True
  trim_output_features: bool = True


def _task(cfg: DatasetConfig):
  if cfg.module:
    import_module(cfg.module)
  if isinstance(cfg.mixture_or_task_name, seqio.DatasetProviderBase):
    return cfg.mixture_or_task_name
  return seqio.get_mixture_or_task(cfg.mixture_or_task_name)


def import_module(module: str) -> None:
  """Imports a module for its side effects (it registers tasks)."""
  importlib.import_module(module)


def get_vocabulary(cfg: DatasetConfig) -> tuple[seqio.Vocabulary, seqio.Vocabulary]:
  """Returns the vocabularies of a task's inputs and targets.

  Raises:
    ValueError: if it lacks one of the two and its vocabularies differ.
  """
  features = _task(cfg).output_features
  if {'inputs', 'targets'} <= set(features):
    return features['inputs'].vocabulary, features['targets'].vocabulary
  every = [f.vocabulary for f in features.values()]
  real = [v for v in every if not isinstance(v, seqio.PassThroughVocabulary)] or every
  if not real or any(v != real[0] for v in real):
    raise ValueError(
      f"the task {cfg.mixture_or_task_name} lacks 'inputs' or 'targets' (it has "
      f'{sorted(features)}), and its features do not share one vocabulary'
    )
  return real[0], real[0]


def verify_matching_vocabs(cfg: DatasetConfig, model: models.BaseTransformerModel):
  """Raises a ValueError if the task's vocabularies are not the model's."""
  task, own = get_vocabulary(cfg), (model.input_vocabulary, model.output_vocabulary)
  if task != own:
    raise ValueError(
      f'vocabularies differ: the task {cfg.mixture_or_task_name} has {task}, the model '
      f"has {own}; give the model the task's input_vocabulary and output_vocabulary"
    )


def round_vocab_size_to_multiple(vocabulary: seqio.Vocabulary, divisor: int = 128):
  """Returns the vocabulary's size, rounded up to a multiple."""
  return -(-vocabulary.vocab_size // divisor) * divisor


def get_dataset(
  cfg: DatasetConfig,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
  num_epochs: int | None = None,
  continue_from_last_checkpoint: bool = False,
) -> tf.data.Dataset:
  """Returns a dataset of batches of model features.

  Raises:
    ValueError: if the shards do not divide the batch, or the split is unknown.
  """
  del continue_from_last_checkpoint
  task = _task(cfg)
  if cfg.batch_size % num_shards:
    raise ValueError(f'batch size {cfg.batch_size} % {num_shards} shards is not 0')
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
    feature_converter=feature_converter_cls(
      pack=cfg.pack, use_custom_packing_ops=cfg.use_custom_packing_ops
    ),
    shard_info=seqio.ShardInfo(index=shard_id, num_shards=num_shards),
    use_cached=cfg.use_cached,
    seed=int(time.time()) if cfg.seed is None else cfg.seed,
    trim_output_features=cfg.trim_output_features,
    batch_size=cfg.batch_size // num_shards,
  )


def get_training_eval_datasets(
  cfg: DatasetConfig,
  shard_id: int,
  num_shards: int,
  eval_steps: int,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
) -> Mapping[str, tf.data.Dataset]:
  """Returns `eval_steps` batches of each task that has the split, by task name."""
  mixture_or_task = _task(cfg)
  names = [t.name for t in seqio.get_subtasks(mixture_or_task) if cfg.split in t.splits]
  if isinstance(mixture_or_task, seqio.Mixture):
    names.append(mixture_or_task.name)
  datasets = {}
  for name in names:
    # Batched anew after the repeat, so that a small split fills every batch.
    examples = get_dataset(
      dataclasses.replace(cfg, mixture_or_task_name=name, batch_size=1),
      0,
      1,
      feature_converter_cls,
      num_epochs=eval_steps * cfg.batch_size,
    )
    ds = examples.unbatch().repeat().shard(num_shards, shard_id)
    ds = ds.batch(cfg.batch_size // num_shards, drop_remainder=True).take(eval_steps)
    datasets[name] = ds.cache() if cfg.use_memory_cache else ds
  return datasets


def get_zeros_batch_like_dataset(dataset: tf.data.Dataset) -> Mapping[str, jnp.ndarray]:
  """Returns a batch of zeros."""
  specs = dataset.element_spec.items()
  return {k: jnp.zeros(s.shape, s.dtype.as_numpy_dtype) for k, s in specs}


class ShardedDatasetIterator(clu.data.DatasetIterator):
  """Puts each batch onto the devices; its position can be saved."""

  def __init__(self, iterator: clu.data.DatasetIterator, partitioner):
    self._iterator = iterator
    self._sharding = partitioner.sharding(partitioner.data_partition_spec)

  def __next__(self):
    return jax.device_put(next(self._iterator), self._sharding)

  def reset(self):
    self._iterator.reset()

  @property
  def element_spec(self):
    return self._iterator.element_spec

  def save(self, filename):
    self._iterator.save(filename)

  def restore(self, filename):
    self._iterator.restore(filename)


def prepare_train_iter(ds, *, partitioner, checkpoint_cfg=None, data_layout=None):
  """Returns a peekable iterator of batches on the devices."""
  del checkpoint_cfg, data_layout
  if isinstance(ds, tf.data.Dataset):
    ds = clu.data.TfDatasetIterator(ds, checkpoint=True)
  return clu.data.PeekableDatasetIterator(ShardedDatasetIterator(ds, partitioner))
