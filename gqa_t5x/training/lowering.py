"""What compiling for devices that are not here needs: a training step, a partitioner.

Nothing is read or run: the step is lowered from a gin file, for shapes alone.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from t5x import partitioning as t5x_partitioning
from t5x import train as train_lib
from t5x import utils

import __main__
import gin
from gqa_t5x.model import axes
from gqa_t5x.training import gin_command, partitioning

# What comes before a user's bindings, which count.
FIRST_BINDINGS = (
  'from __gin__ import dynamic_registration',
  'import __main__ as train_script',
  # What a run must be given and its step does not depend on.
  "MODEL_DIR = '.'",
  'INITIAL_CHECKPOINT_PATH = None',
  'TRAIN_STEPS = 1',
  # No part of a step, and they would open files.
  'train_script.train.checkpoint_cfg = None',
  'train_script.train.train_eval_dataset_cfg = None',
  'train_script.train.infer_eval_dataset_cfg = None',
)


@functools.wraps(train_lib.train)
def _train(**kwargs):
  return kwargs


def train_arguments(
  gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> dict[str, Any]:
  """Returns what gin passes to `t5x.train`; see `gin_command.parse`."""
  # Gin files bind `train` of the program that is run, as t5x.train is.
  __main__.train = _train
  gin.clear_config()
  gin_command.parse(gin_files, [*FIRST_BINDINGS, *bindings], search_paths)
  return gin.get_configurable(_train)()


def lower_train_step(
  *,
  model: Any,
  train_dataset_cfg: utils.DatasetConfig,
  partitioner: Any,
  trainer_cls: Callable[..., Any],
  **_,
) -> tuple[Any, dict[str, tuple[Any, Any]]]:
  """Lowers one training step, of `train_arguments`, for a partitioner's devices.

  Returns:
    (the lowered step; the shapes and PartitionSpecs of `parameters` and `optimizer`).
  """
  converter = model.FEATURE_CONVERTER_CLS(pack=train_dataset_cfg.pack)
  lengths = converter.get_model_feature_lengths(train_dataset_cfg.task_feature_lengths)
  batch = {
    name: jax.ShapeDtypeStruct((train_dataset_cfg.batch_size, length), jnp.int32)
    for name, length in lengths.items()
  }
  initializer = utils.TrainStateInitializer(
    optimizer_def=model.optimizer_def,
    init_fn=model.get_initial_variables,
    input_shapes={name: x.shape for name, x in batch.items()},
    input_types={name: x.dtype for name, x in batch.items()},
    partitioner=partitioner,
  )
  state, specs = initializer.global_train_state_shape, initializer.train_state_axes
  trainer = trainer_cls(
    model=model,
    train_state=state.replace_step(jnp.zeros((), jnp.int32)),
    partitioner=partitioner,
    eval_names=[],
    summary_dir=None,
    train_state_axes=specs,
    rng=jax.random.PRNGKey(0),
  )
  with contextlib.closing(trainer), _microbatches_are_sharded():
    lowered = trainer.lower_train_step(batch)
  shapes, specs = state.state_dict(), specs.state_dict()
  return lowered, {
    'parameters': (shapes['target'], specs['target']),
    'optimizer': (shapes['state'], specs['state']),
  }


@contextlib.contextmanager
def _microbatches_are_sharded() -> Iterator[None]:
  """Lets T5X shard its microbatches, which it does where it sees an accelerator."""
  of_t5x = t5x_partitioning.with_sharding_constraint
  t5x_partitioning.with_sharding_constraint = jax.lax.with_sharding_constraint
  try:
    yield
  finally:
    t5x_partitioning.with_sharding_constraint = of_t5x


def decoding_partitioner(
  devices: Sequence[jax.Device],
  num_partitions: int,
  num_kv_heads: int | None,
  kv_sharding: str | None,
) -> partitioning.Partitioner:
  """Returns a partitioner for decoding, by T5X's rules and `axes.kv_head_rules`."""
  more = axes.kv_head_rules(num_kv_heads, num_partitions, kv_sharding)
  rules = t5x_partitioning.standard_logical_axis_rules(additional_rules=more)
  partitioner = partitioning.Partitioner(num_partitions, logical_axis_rules=rules)
  partitioner.devices = devices
  return partitioner
