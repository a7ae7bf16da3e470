"""Compiles the training step of a gin file for a TPU slice."""

import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import t5x.partitioning
from t5x import gin_utils, utils
from t5x import train as train_lib

import __main__
import gin
import gqa_t5x
from gqa_t5x.analysis.tpu import program

# What a run must be given and its step does not depend on; what a user gives counts.
DEFAULTS = (
  "MODEL_DIR = '.'",
  'INITIAL_CHECKPOINT_PATH = None',
  'TRAIN_STEPS = 1',
)
# No part of a step, and they would open files.
LEFT_OUT = (
  'train_script.train.checkpoint_cfg = None',
  'train_script.train.train_eval_dataset_cfg = None',
  'train_script.train.infer_eval_dataset_cfg = None',
)


@functools.wraps(train_lib.train)
def train(**kwargs):
  """Returns what gin passes to `t5x.train`, instead of training."""
  return kwargs


def arguments(
  gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> dict[str, Any]:
  """Returns what `t5x.train` would be called with.

  Args:
    gin_files: as given to it.
    bindings: as given to it, `NAME = VALUE`.
    search_paths: folders of gin files; this project's own comes last.

  Raises:
    ValueError: from gin, or from what the files configure.
  """
  gin.clear_config()
  folders = [*search_paths, gqa_t5x.gin_search_path()]
  imports = [
    'from __gin__ import dynamic_registration',
    'import __main__ as train_script',
  ]
  with mock.patch.object(__main__, 'train', train, create=True):
    gin_utils.parse_gin_flags(
      folders, gin_files, [*imports, *DEFAULTS, *LEFT_OUT, *bindings]
    )
    return gin.get_configurable(train)()


def lower(
  *,
  model: Any,
  train_dataset_cfg: utils.DatasetConfig,
  partitioner: Any,
  trainer_cls: Callable[..., Any],
  **_,
) -> tuple[Any, dict[str, float]]:
  """Lowers one training step.

  Args:
    model: as `t5x.train` gets it, and so the others; what it gets besides is not used.
    train_dataset_cfg: the data, for shapes; none is read.
    partitioner: of gqa_t5x.partitioning, with the devices of a slice.
    trainer_cls: gqa_t5x.trainer.Trainer with its bindings.

  Returns:
    (the lowered step; bytes of `parameters` and `optimizer` on one device).
  """
  batch = _batch(model, train_dataset_cfg)
  initializer = utils.TrainStateInitializer(
    optimizer_def=model.optimizer_def,
    init_fn=model.get_initial_variables,
    input_shapes={name: x.shape for name, x in batch.items()},
    input_types={name: x.dtype for name, x in batch.items()},
    partitioner=partitioner,
  )
  state = initializer.global_train_state_shape
  trainer = trainer_cls(
    model=model,
    train_state=state.replace_step(jnp.zeros((), jnp.int32)),
    partitioner=partitioner,
    eval_names=[],
    summary_dir=None,
    train_state_axes=initializer.train_state_axes,
    rng=jax.random.PRNGKey(0),
  )
  # T5X shards its microbatches on accelerators alone, and here is none.
  constrain = mock.patch.object(
    t5x.partitioning, 'with_sharding_constraint', jax.lax.with_sharding_constraint
  )
  try:
    with constrain:
      lowered = trainer.lower_train_step(batch)
  finally:
    trainer.close()
  shapes, layout = state.state_dict(), initializer.train_state_axes.state_dict()
  return lowered, {
    name: program.bytes_on_device(shapes[part], layout[part], partitioner.mesh)
    for name, part in (('parameters', 'target'), ('optimizer', 'state'))
  }


def _batch(model: Any, cfg: utils.DatasetConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a batch of the model's features."""
  converter = model.FEATURE_CONVERTER_CLS(pack=cfg.pack)
  lengths = converter.get_model_feature_lengths(cfg.task_feature_lengths)
  return {
    name: jax.ShapeDtypeStruct((cfg.batch_size, length), jnp.int32)
    for name, length in lengths.items()
  }
