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
class Memory:
  """Bytes that a program needs on one device.

  Attributes:
    arguments: parameters, state and inputs.
    code: the program.
    peak: the most at any time, of arguments, results, activations, caches and code.
  """

  arguments: int
  code: int
  peak: int


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    memory: bytes on one device.
    module: its parsed text.
    text: its text.
  """

  memory: Memory
  module: parse.Module
  text: str


def compile_program(lowered: Any) -> Program:
  """Compiles for the devices that a program was lowered for.

  Args:
    lowered: of `jax.jit(...).lower(...)`.

  Returns:
    The program.

  Raises:
    TooLarge: if it does not fit into the memory of a device.
  """
  try:
    with topology.quiet():
      compiled = lowered.compile()
  except Exception as error:
    too_large = _too_large(str(error))
    if too_large is None:
      raise
    raise too_large from error
  stats, text = compiled.memory_analysis(), compiled.as_text()
  code = stats.generated_code_size_in_bytes
  memory = Memory(
    arguments=stats.argument_size_in_bytes,
    code=code,
    peak=stats.peak_memory_in_bytes + code,
  )
  return Program(memory, parse.parse(text), text)


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


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a part of a program does on one chip.

  Attributes:
    flops: of matrix products.
    hbm_bytes: read from and written to the chip's memory.
    collectives: kind -> bytes that the chip receives over its links.
    cycles: what the compiler thinks that its instructions take, one after another.
  """

  flops: float
  hbm_bytes: float
  collectives: dict[str, float]
  cycles: float = 0

  @property
  def collective_bytes(self) -> float:
    """Bytes received, of all kinds."""
    return sum(self.collectives.values())

  def times_ms(self, chip: Chip) -> dict[str, float]:
    """Returns the least time in ms of products, of memory and of links."""
    return {
      'compute': 1e3 * self.flops / chip.flops,
      'memory': 1e3 * self.hbm_bytes / chip.bandwidth,
      'links': 1e3 * self.collective_bytes / chip.links,
    }

  def roofline_ms(self, chip: Chip) -> float:
    """Returns the least time in ms, if all three go on at once."""
    return max(self.times_ms(chip).values())


def cost(counted: traffic.Traffic, chip: Chip) -> Cost:
  """Returns what a device's traffic comes to for its chip."""
  n = chip.devices
  return Cost(
    flops=n * counted.flops,
    hbm_bytes=n * counted.hbm_bytes,
    collectives={kind: n * nbytes for kind, nbytes in counted.collectives.items()},
    cycles=counted.cycles,
  )
