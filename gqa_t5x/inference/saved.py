"""A model that is in memory, as it is written: a checkpoint that T5X trains on."""

import os
from typing import Any

import jax
import numpy as np
from etils import epath

from gqa_t5x.checkpoints import (
  config,
  t5x_layouts,
  tokenizer_files,
  tree,
  weight_files,
  writer,
)
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.conversion import adafactor_moments
from gqa_t5x.errors import BadInput
from gqa_t5x.exports.source import Source


def new_checkpoint(path: epath.PathLike, step: int) -> epath.Path:
  """The checkpoint folder to make in a folder; BadInput if it is there already."""
  folder = epath.Path(os.path.abspath(os.path.expanduser(os.fspath(path))))
  if '://' in os.fspath(path):
    folder = epath.Path(path)
  target = folder / f'checkpoint_{step}'
  if target.exists():
    raise BadInput(f'{target} exists already; choose another folder')
  if not os.fspath(path) or _has_model(folder):  # `load` would find that one.
    raise BadInput(f'{folder} holds another model; choose another folder')
  return target


def _has_model(folder: epath.Path) -> bool:
  there = (folder / name for name in (t5x_layouts.MSGPACK, t5x_layouts.STATE))
  is_t5x = any(path.exists() for path in there)
  return is_t5x or weight_files.weights_file(folder) is not None


def write(
  path: epath.Path,
  params: Any,
  step: int,
  model_config: config.ModelConfig,
  tokenizer: epath.Path | None,
) -> None:
  """Writes parameters, with Adafactor's state as it starts, and what belongs to them.

  Args:
    path: the checkpoint folder to make.
    params: nested dict of arrays, under T5X's names.
    tokenizer: the folder of the model's tokenizer, or a file in it.

  Raises:
    BadInput: there is no room, or the folder cannot be written. Nothing is left.
  """
  flat = dict(tree.flatten(params))
  tensors = {tree.TARGET + name: _lazy(x) for name, x in flat.items()}
  tensors['state/step'] = LazyTensor.of(np.asarray(step, np.int32))
  if not tree.int8_scales(flat):  # T5X does not train int8.
    tensors |= adafactor_moments.initial({name: x.shape for name, x in flat.items()})

  def add_files(folder: epath.Path, _: Any) -> None:
    config.write(folder, model_config)
    if tokenizer is not None:
      tokenizer_files.copy(tokenizer, folder)

  writer.write_tensors(path, tensors, add_files)


def source(
  params: Any,
  step: int,
  model_config: config.ModelConfig,
  tokenizer: epath.Path | None,
) -> Source:
  """What `exports` read of the model; arguments are those of `write`."""
  tensors = {name: _lazy(x) for name, x in tree.flatten(params)}
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  architecture = tree.read_architecture(shapes)
  return Source(tokenizer, tensors, architecture, model_config, step)


def _lazy(array: jax.Array) -> LazyTensor:
  """Fetches an array from the devices when it is read."""
  return LazyTensor(tuple(array.shape), array.dtype, lambda: np.asarray(array))
