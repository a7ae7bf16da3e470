"""One program compiled for a TPU slice: whether it fits, and how long it takes."""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gqa_t5x.analysis.hlo import traffic
from gqa_t5x.analysis.tpu import topology
from gqa_t5x.analysis.tpu.chips import Chip

UNITS = {'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
# What the compiler says of a program that is too large, in either of two ways.
TOO_LARGE = (
  r'Used ([\d.]+)([BKMGT]) of [\d.]+[BKMGT] hbm',
  r'\(([\d.]+)([BKMGT])\) exceeds available HBM',
)


class TooLarge(Exception):
  """A program does not fit; the argument is the bytes that one device would need."""


def compile_program(lowered: Any) -> Any:
  """Returns `lowered.compile()`; TooLarge if a device has not enough memory."""
  with topology.quiet(TooLarge):
    try:
      return lowered.compile()
    except Exception as error:
      for pattern in TOO_LARGE:
        if found := re.search(pattern, str(error)):
          raise TooLarge(float(found[1]) * UNITS[found[2]]) from error
      raise


def bytes_on_device(shapes: Any, specs: Any, mesh: Mesh) -> float:
  """Returns what a tree of arrays takes on one device of a mesh, without padding.

  `specs` is the same tree of PartitionSpecs; None is replicated.
  """
  leaves = jax.tree.leaves(shapes)
  specs = jax.tree.leaves(specs, is_leaf=lambda x: x is None or isinstance(x, P))
  total = 0.0
  for x, spec in zip(leaves, specs, strict=True):
    names = jax.tree.leaves(tuple(spec or ()))
    total += x.size * x.dtype.itemsize / math.prod(mesh.shape[name] for name in names)
  return total


def least_ms(counted: traffic.Traffic, chip: Chip) -> dict[str, float]:
  """Returns the least time of what one device does at its chip's published peaks.

  That is milliseconds of products (`compute`), of `memory` and of `links`. All three
  can go on at once: the largest is the roofline.
  """
  received = sum(counted.collectives.values())
  return {
    'compute': 1e3 * chip.devices * counted.flops / chip.flops,
    'memory': 1e3 * chip.devices * counted.hbm_bytes / chip.bandwidth,
    'links': 1e3 * chip.devices * received / chip.links,
  }
