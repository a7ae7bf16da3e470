"""Writes a model in memory: as a checkpoint of T5X, or as another program reads it."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x.checkpoints import config, tokenizer_files, tree, writer
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.errors import BadInput
from gqa_t5x.exports import run
from gqa_t5x.exports.source import Source


def save(
  path: epath.PathLike,
  params: Mapping[str, Any],
  model_config: config.ModelConfig,
  step: int,
  tokenizer_path: epath.Path | None,
) -> None:
  """Writes `path`/checkpoint_<step>, and says so; see `Model.save`."""
  folder = epath.Path(os.path.abspath(os.path.expanduser(os.fspath(path))))
  if '://' in os.fspath(path):
    folder = epath.Path(path)
  target = folder / f'checkpoint_{step}'
  if target.exists():
    raise BadInput(f'{target} exists already; choose another folder')

  def add_files(place: epath.Path, _) -> None:
    config.write(place, model_config)
    if tokenizer_path is not None:
      tokenizer_files.copy(tokenizer_path, place)

  writer.write_params(target, params, step, add_files)
  print(f"INITIAL_CHECKPOINT_PATH = '{target}'")


def export(
  path: epath.PathLike,
  format: str,
  options: Mapping[str, Any],
  params: Mapping[str, Any],
  model_config: config.ModelConfig,
  step: int,
  tokenizer_path: epath.Path | None,
) -> None:
  """Writes a folder in the format of another program; see `Model.export`."""
  tensors = {name: _lazy(array) for name, array in tree.flatten(params)}
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  architecture = tree.read_architecture(shapes)
  source = Source(tokenizer_path, tensors, architecture, model_config, step)
  run.write(source, path, format, **options)


def _lazy(array: Any) -> LazyTensor:
  return LazyTensor(tuple(array.shape), array.dtype, lambda: np.asarray(array))
