"""The ways in which the K and V heads of one attention module become fewer.

A method acts on one attention MODULE, given as a dict of its kernels

  query [D, N*H]   key [D, S*H]   value [D, S*H]   out [N*H, D]

with S key/value heads in the source, and returns the kernels that it changes. Heads
are grouped contiguously: with G = S / K, new head k stands for the source heads
k*G ... k*G + G-1, so query head n reads key/value head n // (N / K) after it. Grouping
by similarity (grouping.py) reorders the heads before that. In the latent form new heads
have another size than H (kernels.py).

Letters: D width, N query heads, S source key/value heads, K new key/value heads,
G source heads per new head, H head size, R size of a new head.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import numpy as np

from gqa_t5x.conversion import shared_heads
from gqa_t5x.conversion.grouping import similar_heads
from gqa_t5x.conversion.input_statistics import InputStatistics
from gqa_t5x.conversion.kernels import (
  ALL_KERNELS,
  AttentionModule,
  Kernels,
  join_heads,
  permute_heads,
  split_groups,
)
from gqa_t5x.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to convert one attention module.

  Attributes:
    convert: (kernels, module, inputs) -> the new kernels; names left out stay.
    adafactor: what becomes of the Adafactor moments of each changed kernel:
      "sum" over the group, "first" of the group, or "reset" to zero.
    summary: a phrase for --help.
    kernels: those that `convert` reads and may change.
    uses_inputs: whether it asks for statistics of the module's inputs.
    any_size: whether it can make heads of another size (the latent form).
  """

  convert: Callable[
    [Kernels, AttentionModule, InputStatistics | None], dict[str, np.ndarray]
  ]
  adafactor: str
  summary: str
  kernels: tuple[str, ...] = ('key', 'value')
  uses_inputs: bool = False
  any_size: bool = False


def _mean(kernels: Kernels, module: AttentionModule, inputs=None) -> Kernels:
  """Averages the heads of each group. Source: GQA paper, section 2.1.

  By halves, each rounded to the kernel's dtype, so that 64 -> 16 -> 8 heads is 64 -> 8
  to the last bit; one rounding in all where the group is odd.
  """

  def pool(kernel):
    mean_DKGH = split_groups(kernel, module)
    while mean_DKGH.shape[-2] > 1:
      *shape, G, H = mean_DKGH.shape
      step = 2 if G % 2 == 0 else G
      parts = mean_DKGH.reshape(*shape, G // step, step, H)
      mean_DKGH = parts.mean(axis=-2, dtype=np.float64).astype(kernel.dtype)
    return join_heads(mean_DKGH[..., 0, :])

  return {name: pool(kernels[name]) for name in ('key', 'value')}


def _first(kernels: Kernels, module: AttentionModule, inputs=None) -> Kernels:
  """Keeps the first head of each group. Source: GQA paper, section 3.3."""
  return {
    name: join_heads(split_groups(kernels[name], module)[..., 0, :])
    for name in ('key', 'value')
  }


def _random(kernels: Kernels, module: AttentionModule, inputs=None) -> Kernels:
  """Initialises K and V anew, as T5X does. Source: GQA paper, section 3.3.

  T5X: variance_scaling(1.0, "fan_in", "normal"), so a standard deviation of
  1 / sqrt(D). Each kernel has its own stream, keyed by seed and path, so that the
  result depends neither on order nor on which other modules are converted.
  """

  def draw(name):
    width = kernels[name].shape[0]
    shape = (width, module.num_kv_heads * module.head_dim)
    place = f'{module.seed}:{module.path}/{name}/kernel'
    digest = hashlib.sha256(place.encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
    return (rng.standard_normal(shape) / np.sqrt(width)).astype(kernels[name].dtype)

  return {name: draw(name) for name in ('key', 'value')}


def _absorbing(
  solve: shared_heads.Solver, rms: str, summary: str, any_size: bool = False
) -> Method:
  return Method(
    functools.partial(shared_heads.share_heads, solve, rms),
    adafactor='reset',
    summary=summary,
    kernels=ALL_KERNELS,
    uses_inputs=True,
    any_size=any_size,
  )


METHODS: dict[str, Method] = {
  'mean': Method(_mean, 'sum', "the mean of each group's heads"),
  'first': Method(_first, 'first', "each group's first head"),
  'random': Method(_random, 'reset', 'a fresh initialisation'),
  'procrustes': _absorbing(
    shared_heads.procrustes, 'as is', 'the mean after rotating heads towards each other'
  ),
  'procrustes_rms': _absorbing(
    shared_heads.procrustes, 'restored', "procrustes, scaled up to the old kernels' RMS"
  ),
  'refit': _absorbing(
    shared_heads.refit, 'absorbed', 'the mean, with queries and outputs refitted to it'
  ),
  'svd': _absorbing(
    shared_heads.svd, 'absorbed', 'the shared heads of least squared error', True
  ),
}
_GROUPINGS = ('contiguous', 'similarity')


def check_grouping(name: str) -> None:
  """Raises BadInput, which lists the known ones, for an unknown grouping."""
  if name not in _GROUPINGS:
    raise BadInput(f'unknown grouping {name!r}; choose one of {", ".join(_GROUPINGS)}')


def get_method(name: str) -> Method:
  """Looks a method up; BadInput, which lists the known ones, for an unknown one."""
  if name not in METHODS:
    raise BadInput(f'unknown method {name!r}; choose one of {", ".join(METHODS)}')
  return METHODS[name]


def convert_module(
  kernels: Kernels,
  module: AttentionModule,
  method: str,
  inputs: InputStatistics | None = None,
  grouping: str = 'contiguous',
) -> dict[str, np.ndarray]:
  """Converts the kernels of one attention module to fewer key/value heads, or others.

  Args:
    kernels: all four, but for those that the method does not read.
    module: head counts and sizes, path and seed.
    method: a key of METHODS; one of `any_size` for the latent form.
    inputs: needed by the methods that use them and by grouping by similarity.
    grouping: "contiguous", or "similarity": heads are reordered first. A position bias
      of the module's own goes along, as the kernel `bias`
      [N, buckets].

  Returns:
    The same names; key and value are now [D, K*H], in the dtype they came in. Of the
    latent form key and value [D, K*R], and key_up and value_up [R, N*H], too.

  Source: GQA paper (arXiv 2305.13245), sections 2.1 and 3.3.
  """
  if grouping == 'similarity':
    kernels = permute_heads(
      kernels, similar_heads(kernels, inputs, module.num_kv_heads, module.head_dim)
    )
  return {**kernels, **METHODS[method].convert(kernels, module, inputs)}
