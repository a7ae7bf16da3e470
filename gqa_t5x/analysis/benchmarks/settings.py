"""What the benchmarks share: their flags, refusals and the rows' common keys."""

import dataclasses
import platform
from typing import Any

import flax
import jax
import jax.numpy as jnp

from gqa_t5x.analysis.benchmarks import timing
from gqa_t5x.model import network, sizes

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}

# Flags that take a comma list of settings: default and text.
SIZE = ('base', 'Model sizes: ' + ', '.join(sizes.SIZES) + '.')
NUM_KV_HEADS = (
  None,
  "Key/value heads; by default the size's own, or every divisor of its heads.",
)


class BadSetting(ValueError):
  """What cannot be measured; the message says why, in one line."""


def config(size: str, num_kv_heads: int, dtype: str) -> network.T5Config:
  """Returns a model's configuration.

  Args:
    size: a key of sizes.SIZES.
    num_kv_heads: K of decoder self- and cross-attention.
    dtype: of activations, a key of DTYPES.

  Raises:
    BadSetting: heads that do not divide.
  """
  try:
    return network.config(size, num_kv_heads=num_kv_heads, dtype=DTYPES[dtype])
  except ValueError as error:
    raise BadSetting(f'size={size}: {error}') from error


def check_positive(setting: Any, *names: str) -> None:
  """Raises BadSetting unless the named fields are at least 1."""
  for name in names:
    if getattr(setting, name) < 1:
      raise BadSetting(f'{name}={getattr(setting, name)} must be at least 1.')


def check_memory(setting: Any) -> None:
  """Raises BadSetting unless `setting.nbytes()` fit into the device's free memory."""
  needed, free = setting.nbytes(), timing.free_bytes()
  if free is not None and needed > free:
    raise BadSetting(
      f'{setting.describe()} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are'
      ' free; choose a smaller batch_size, input_length or size.'
    )


def row(kind: str, command: str, setting: Any) -> dict[str, Any]:
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
