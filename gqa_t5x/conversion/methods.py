"""The maths: how the K and V heads of one attention module become fewer.

A method acts on one attention MODULE, given as a dict of its kernels

  query [D, N*H]   key [D, S*H]   value [D, S*H]   out [N*H, D]

with S key/value heads in the source, and returns the kernels that it changes. Heads
are grouped contiguously: with G = S / K, new head k stands for the source heads
k*G ... k*G + G-1, so query head n reads key/value head n // (N / K) after it.

Letters: D width, N query heads, S source key/value heads, K new key/value heads,
G source heads per new head, H head size.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping

import numpy as np

from gqa_t5x.conversion.errors import ConversionError

Kernels = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class AttentionModule:
  """What a method must know about the attention module that it converts.

  Attributes:
    path: its place in the tree, e.g. "decoder/layers_0/self_attention".
    num_heads: N, query heads.
    source_num_kv_heads: S, key/value heads before conversion.
    num_kv_heads: K, key/value heads after conversion; divides S.
    head_dim: H.
    seed: for methods that draw random numbers.
  """

  path: str
  num_heads: int
  source_num_kv_heads: int
  num_kv_heads: int
  head_dim: int
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to convert one attention module.

  Attributes:
    convert: (kernels, module) -> the new kernels, by name; names left out stay.
    moments: what becomes of the Adafactor moments of each changed kernel:
      "sum" over the group, "first" of the group, or "reset" to zero.
    reads: the kernels that `convert` needs, so that no others are loaded.
    writes: the kernels that `convert` may change.
  """

  convert: Callable[[Kernels, AttentionModule], dict[str, np.ndarray]]
  moments: str
  reads: tuple[str, ...] = ('key', 'value')
  writes: tuple[str, ...] = ('key', 'value')


def split_groups(kernel: np.ndarray, module: AttentionModule) -> np.ndarray:
  """Splits the columns of a K or V kernel by head, and the heads by group.

  Args:
    kernel: [..., S*H].
    module: gives S, K and H.

  Returns:
    A view [..., K, G, H].
  """
  num_groups = module.num_kv_heads
  group_size = module.source_num_kv_heads // num_groups
  shape = (*kernel.shape[:-1], num_groups, group_size, module.head_dim)
  return np.asarray(kernel).reshape(shape)


def join_heads(kernel_DKH: np.ndarray) -> np.ndarray:
  """[..., K, H] -> [..., K*H], the layout of T5X's 2-D kernels."""
  return kernel_DKH.reshape(*kernel_DKH.shape[:-2], -1)


def _mean(kernels: Kernels, module: AttentionModule) -> dict[str, np.ndarray]:
  """Averages the heads of each group, in float64. Source: GQA paper, section 2.1."""

  def pool(kernel):
    mean_DKH = split_groups(kernel, module).mean(axis=-2, dtype=np.float64)
    return join_heads(mean_DKH).astype(kernel.dtype)

  return {name: pool(kernels[name]) for name in ('key', 'value')}


def _first(kernels: Kernels, module: AttentionModule) -> dict[str, np.ndarray]:
  """Keeps the first head of each group. Source: GQA paper, section 3.3."""
  return {
    name: join_heads(split_groups(kernels[name], module)[..., 0, :])
    for name in ('key', 'value')
  }


def _random(kernels: Kernels, module: AttentionModule) -> dict[str, np.ndarray]:
  """Initialises K and V anew, as T5X does. Source: GQA paper, section 3.3.

  T5X: variance_scaling(1.0, "fan_in", "normal"), so a standard deviation of
  1 / sqrt(D). Each kernel has its own stream, keyed by seed and path, so that the
  result depends neither on order nor on which other modules are converted.
  """

  def draw(name):
    width = kernels[name].shape[0]
    shape = (width, module.num_kv_heads * module.head_dim)
    rng = random_stream(module.seed, f'{module.path}/{name}/kernel')
    return (rng.standard_normal(shape) / np.sqrt(width)).astype(kernels[name].dtype)

  return {name: draw(name) for name in ('key', 'value')}


def random_stream(seed: int, path: str) -> np.random.Generator:
  """A random generator that depends on nothing but the seed and the path."""
  digest = hashlib.sha256(f'{seed}:{path}'.encode()).digest()
  return np.random.default_rng(np.frombuffer(digest, np.uint32))


METHODS: dict[str, Method] = {
  'mean': Method(_mean, moments='sum'),
  'first': Method(_first, moments='first'),
  'random': Method(_random, moments='reset'),
}


def get_method(name: str) -> Method:
  """Looks a method up by name.

  Raises:
    ConversionError: the name is unknown; the message lists the known ones.
  """
  if name not in METHODS:
    raise ConversionError(
      f'unknown method {name!r}; choose one of {", ".join(METHODS)}'
    )
  return METHODS[name]


def convert_module(
  kernels: Kernels, module: AttentionModule, method: str
) -> dict[str, np.ndarray]:
  """Converts the kernels of one attention module to fewer key/value heads.

  Args:
    kernels: query [D, N*H], key [D, S*H], value [D, S*H], out [N*H, D]; those that
      the method does not read may be left out.
    module: head counts, path and seed.
    method: a name in METHODS.

  Returns:
    The same names; key and value are now [D, K*H], in the dtype they came in.

  Raises:
    ConversionError: unknown method.

  Source: GQA paper (arXiv 2305.13245), sections 2.1 and 3.3.
  """
  return {**kernels, **get_method(method).convert(kernels, module)}
