"""Loads a T5 of any format, its tokenizer and what its shapes do not show."""

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from gqa_t5x.checkpoints import folders, tokenizer_files, tree
from gqa_t5x.errors import BadInput
from gqa_t5x.inference import tokenizer
from gqa_t5x.inference.model import Model
from gqa_t5x.model import network, sizes
from gqa_t5x.model.quantize import SCALE, WEIGHTS, are_int8

_DTYPES = ('float32', 'bfloat16')


def load(
  path: epath.PathLike,
  *,
  dtype: str = 'float32',
  tokenizer_path: epath.PathLike | None = None,
  model_partitions: int | None = None,
  quantize: str | None = None,
) -> Model:
  """Loads a T5 of any size.

  Args:
    path: a folder, local or gs://: of Hugging Face, a checkpoint of T5X or a folder of
      those (the latest counts), or what `Model.save` wrote.
    dtype: of parameters and activations: 'float32' or 'bfloat16'.
    tokenizer_path: a folder or a file of the tokenizer; None: that beside the weights,
      if there is one. Without one the model takes and returns token ids.
    model_partitions: over how many devices a copy of the model is spread, all devices
      being used; None: one device.
    quantize: of `Model.quantize`: 'weights', 'cache' or 'weights_and_cache'. The
      weights of a checkpoint that was saved in int8 stay so.

  Raises:
    BadInput: a part is missing or damaged, or it is another model.
  """
  if not os.fspath(path):
    raise BadInput('the path is empty; give a folder')
  if dtype not in _DTYPES:
    raise BadInput(f'dtype={dtype!r} is unknown; choose one of {", ".join(_DTYPES)}')
  path = epath.Path(os.path.expanduser(os.fspath(path)))
  folder = folders.find_checkpoint(path)
  model_config = folders.read_config(folder)
  params, architecture = folders.read_params(folder)
  fields = sizes.from_checkpoint(architecture, model_config)
  cfg = network.T5Config(**fields, dtype=jnp.dtype(dtype), dropout_rate=0.0)
  place = tokenizer_path or tokenizer_files.find(folder)
  tokens = tokenizer.load(place) if place else None
  if tokens is not None and tokens.size > cfg.vocab_size:
    raise BadInput(
      f'the tokenizer {place} has {tokens.size:,} ids, and the model {folder}'
      f' {cfg.vocab_size:,}: it is of another model'
    )
  cfg = dataclasses.replace(cfg, quantize=WEIGHTS if are_int8(params) else None)
  model = Model(
    cfg,
    _with_dtype(params, dtype),
    model_config,
    tokens,
    tokenizer_path=place and epath.Path(place),
    step=folders.checkpoint_step(folder) or 0,
    model_partitions=model_partitions,
  )
  return model if quantize is None else model.quantize(quantize)


def _with_dtype(params: Any, dtype: str) -> Any:
  """Changes the dtype, but of int8 kernels and their scales."""
  return tree.unflatten(
    {
      name: x if x.dtype == np.int8 or name.endswith(SCALE) else x.astype(dtype)
      for name, x in tree.flatten(params)
    }
  )
