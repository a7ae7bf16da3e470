"""What the benchmarks share: refusals, random parameters, and the rows' common keys."""

import dataclasses
import functools
import platform
from typing import Any

import flax
import jax

from gqa_t5x.analysis import models
from gqa_t5x.analysis.benchmarks import timing
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network, sizes


def check_memory(setting: Any) -> None:
  """Raises BadInput unless `setting.nbytes()` fit into the device's free memory."""
  needed, free = setting.nbytes(), timing.free_bytes()
  if free is not None and needed > free:
    raise BadInput(
      f'{setting.describe()} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are'
      ' free; choose a smaller batch_size, input_length or size.'
    )


def random_params(cfg: network.T5Config, dtype: Any) -> dict[str, Any]:
  """Returns parameters of a model's shapes, made on the device.

  They are uniform numbers of the initialisers' size: what a step costs does not depend
  on them.

  Args:
    cfg: the configuration.
    dtype: of the parameters.
  """
  leaves, treedef = jax.tree.flatten(models.variable_shapes(cfg)['params'])
  values = [_random(seed, leaf.shape, dtype) for seed, leaf in enumerate(leaves)]
  return jax.tree.unflatten(treedef, values)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(seed, shape, dtype):
  scale = (3 / shape[0]) ** 0.5
  key = jax.random.key(seed, impl='rbg')  # It compiles and runs faster than JAX's own.
  return jax.random.uniform(key, shape, dtype, -scale, scale)


@functools.cache
def matmul_rate(size: str, rows: int, dtype: str) -> float:
  """Returns what the machine reaches on products of a model's MLP, GFLOP/s.

  Args:
    size: a key of sizes.SIZES.
    rows: of the first factor.
    dtype: of all factors, a key of models.DTYPES.
  """
  D, F = sizes.SIZES[size]['emb_dim'], sizes.SIZES[size]['mlp_dim']
  return timing.matmul_gflop_per_s(rows, ((D, F), (F, D)), models.DTYPES[dtype])


def common_keys(kind: str, command: str, setting: Any) -> dict[str, Any]:
  """Returns the keys that rows of every benchmark have.

  Args:
    kind: of the row.
    command: what a user types to get it.
    setting: a dataclass; its fields become keys.
  """
  return {
    'kind': kind,
    'source': 'measured',
    'command': command,
    **dataclasses.asdict(setting),
    'device': timing.device_name(),
    'versions': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'flax': flax.__version__,
    },
  }
