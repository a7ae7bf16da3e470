"""What the benchmarks share: refusals, random parameters, and the rows' common keys."""

import functools
import os
import platform
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from gqa_t5x.analysis import models
from gqa_t5x.analysis.benchmarks import timing
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network


def check_memory(setting: Any, output: str) -> None:
  """Raises BadInput unless `setting.nbytes()` fit into the device's free memory.

  `output` tells settings apart in addition to their model, batch and input.
  """
  needed, free = setting.nbytes(), timing.free_bytes()
  if free is not None and needed > free:
    raise BadInput(
      f'{setting.size} with {setting.num_kv_heads} K/V heads, batch'
      f' {setting.batch_size}, input {setting.input_length}, {output}, {setting.dtype}'
      f' needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; choose a'
      ' smaller batch_size, input_length or size.'
    )


def random_params(cfg: network.T5Config, dtype: Any) -> dict[str, Any]:
  """Returns parameters of a model's shapes, made on the device.

  They are uniform numbers of the initialisers' size: what a step costs does not depend
  on them.
  """
  return random_like(models.variable_shapes(cfg)['params'], dtype)


def random_like(shapes: Any, dtype: Any = None) -> Any:
  """Returns a tree of arrays, made on the device; their own dtypes by default."""
  leaves, treedef = jax.tree.flatten(shapes)
  values = [
    _random(seed, leaf.shape, dtype or leaf.dtype) for seed, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(treedef, values)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(seed, shape, dtype):
  key = jax.random.key(seed, impl='rbg')  # It compiles and runs faster than JAX's own.
  if jnp.issubdtype(dtype, jnp.integer):
    return jax.random.randint(key, shape, -100, 100, dtype)
  scale = (3 / shape[0]) ** 0.5
  return jax.random.uniform(key, shape, dtype, -scale, scale)


@functools.cache
def matmul_rate(D: int, F: int, rows: int, dtype: str) -> float:
  """Returns GFLOP/s of the machine on products of `rows` with MLP kernels `[D, F]`."""
  return timing.matmul_gflop_per_s(rows, D, F, models.DTYPES[dtype])


def common_keys(kind: str, command: str, setting: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the keys that rows of every benchmark have, and what a setting gives."""
  device = jax.devices()[0].device_kind
  if jax.default_backend() == 'cpu':
    device += f', {os.cpu_count()} cores'
  return {
    'kind': kind,
    'source': 'measured',
    'command': command,
    **{key: value for key, value in setting.items() if value is not None},
    'device': device,
    'versions': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'flax': flax.__version__,
    },
  }
