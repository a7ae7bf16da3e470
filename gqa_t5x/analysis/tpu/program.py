"""One program compiled for a TPU slice: what it holds, moves and computes on a chip."""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gqa_t5x.analysis.hlo import parse, traffic
from gqa_t5x.analysis.tpu import topology
from gqa_t5x.analysis.tpu.chips import Chip

UNITS = {'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
# What the compiler says of a program that is too large, in either of two ways.
TOO_LARGE = (
  r'Used ([\d.]+)([BKMGT]) of ([\d.]+)([BKMGT]) hbm',
  r'\(([\d.]+)([BKMGT])\) exceeds available HBM \(([\d.]+)([BKMGT])\)',
)


class TooLarge(Exception):
  """A program that does not fit.

  Attributes:
    needed: bytes that one device would need.
    available: bytes that it has.
  """

  def __init__(self, needed: float, available: float):
    super().__init__(needed, available)
    self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program; its bytes are those of one device.

  Attributes:
    argument_bytes: parameters, state and inputs.
    code_bytes: the program itself.
    peak_bytes: the most at any time: arguments, results, activations, caches and code.
    module: its parsed text.
    text: its text.
  """

  argument_bytes: int
  code_bytes: int
  peak_bytes: int
  module: parse.Module
  text: str


def compile_program(lowered: Any) -> Program:
  """Compiles for the devices that a program was lowered for.

  Args:
    lowered: of `jax.jit(...).lower(...)`.

  Raises:
    TooLarge: if it does not fit into the memory of a device.
  """
  with topology.quiet(TooLarge):
    try:
      compiled = lowered.compile()
    except Exception as error:
      too_large = _too_large(str(error))
      if too_large is None:
        raise
      raise too_large from error
  stats, text = compiled.memory_analysis(), compiled.as_text()
  code_bytes = stats.generated_code_size_in_bytes
  return Program(
    stats.argument_size_in_bytes,
    code_bytes,
    stats.peak_memory_in_bytes + code_bytes,
    parse.parse(text),
    text,
  )


def bytes_on_device(shapes: Any, specs: Any, mesh: Mesh) -> float:
  """Returns what arrays take on one device, without padding.

  Args:
    shapes: a tree of arrays or shapes.
    specs: the same tree of PartitionSpecs; None is replicated.
    mesh: that they are laid out over.
  """
  leaves = jax.tree.leaves(shapes)
  specs = jax.tree.leaves(specs, is_leaf=lambda x: x is None or isinstance(x, P))
  total = 0.0
  for x, spec in zip(leaves, specs, strict=True):
    names = jax.tree.leaves(tuple(spec or ()))
    total += x.size * x.dtype.itemsize / math.prod(mesh.shape[name] for name in names)
  return total


def _too_large(message: str) -> TooLarge | None:
  for pattern in TOO_LARGE:
    found = re.search(pattern, message)
    if found:
      needed, unit, available, available_unit = found.groups()
      return TooLarge(
        float(needed) * UNITS[unit], float(available) * UNITS[available_unit]
      )
  return None


def least_ms(counted: traffic.Traffic, chip: Chip) -> dict[str, float]:
  """Returns the least time of a part of a program at the chip's published peaks.

  Args:
    counted: what one device does.
    chip: whose devices they are.

  Returns:
    Milliseconds of products (`compute`), of `memory` and of `links`. All three can go
    on at once: the largest is the roofline.
  """
  received = sum(counted.collectives.values())
  return {
    'compute': 1e3 * chip.devices * counted.flops / chip.flops,
    'memory': 1e3 * chip.devices * counted.hbm_bytes / chip.bandwidth,
    'links': 1e3 * chip.devices * received / chip.links,
  }
