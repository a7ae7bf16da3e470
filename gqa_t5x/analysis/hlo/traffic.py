"""Counts what a compiled program moves and computes on one device.

Only HBM counts: on TPUs, most arrays that are small enough stay on the chip, and XLA's
own "bytes accessed" counts every copy there, too. A loop counts as often as it runs; of
branches, the one that moves most counts; what is asynchronous counts once, as a whole,
where it starts.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping

from gqa_t5x.analysis.hlo import collectives, flops, hbm, loops
from gqa_t5x.analysis.hlo.parse import Computation, Instruction, Module

FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'after-all',
  'partition-id',
  'replica-id',
  'opt-barrier',
  'optimization-barrier',
  'domain',
  'add-dependency',
}
# Custom calls that give a name to memory, and move nothing.
NO_OPS = {'ConcatBitcast', 'AllocateBuffer', 'Sharding', 'AssumeGatherIndicesInBound'}


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one device does.

  Attributes:
    read_bytes: from HBM.
    written_bytes: to HBM.
    flops: of matrix products, 2 a multiply-add.
    cycles: the compiler's own estimate, where it gives one; not of transfers that go
      on meanwhile.
    collectives: kind -> bytes that the device receives, at least.
  """

  read_bytes: float = 0
  written_bytes: float = 0
  flops: float = 0
  cycles: float = 0
  collectives: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def hbm_bytes(self) -> float:
    """Read and written."""
    return self.read_bytes + self.written_bytes

  def __add__(self, other: 'Traffic') -> 'Traffic':
    return Traffic(
      self.read_bytes + other.read_bytes,
      self.written_bytes + other.written_bytes,
      self.flops + other.flops,
      self.cycles + other.cycles,
      collections.Counter(self.collectives) + collections.Counter(other.collectives),
    )

  def __mul__(self, times: float) -> 'Traffic':
    return Traffic(
      self.read_bytes * times,
      self.written_bytes * times,
      self.flops * times,
      self.cycles * times,
      {kind: n * times for kind, n in self.collectives.items()},
    )


def count(
  module: Module, name: str | None = None, trips: Mapping[str, int] | None = None
) -> Traffic:
  """Counts one execution of a computation, the entry by default.

  `trips` maps the body of a loop to how often it runs. ValueError for a loop that
  neither it nor the program knows of.
  """
  return _Counter(module, trips or {}).count(name or module.entry)


def main_loop(module: Module, name: str | None = None) -> str:
  """Returns the body of a computation's only loop that may stop early.

  ValueError if there is not exactly one. The computation is the entry by default.
  """
  computation = module.computations[name or module.entry]
  found = [
    i.attribute('body')
    for i in computation.instructions.values()
    if i.opcode == 'while' and loops.trip_count(module, computation, i) is None
  ]
  if len(found) != 1:
    raise ValueError(f'{len(found)} loops of the program may stop early, and not one.')
  return found[0]


class _Counter:
  """Counts the computations of one module; those called more than once only once."""

  def __init__(self, module: Module, trips: Mapping[str, int]):
    self._module, self._trips = module, trips
    self._counted: dict[str, Traffic] = {}

  def count(self, name: str) -> Traffic:
    if name not in self._counted:
      computation = self._module.computations[name]
      parts = (self._one(computation, i) for i in computation.instructions.values())
      self._counted[name] = sum(parts, Traffic())
    return self._counted[name]

  def _one(self, computation: Computation, i: Instruction) -> Traffic:
    op = hbm.base_opcode(i)
    if op in FREE or op.endswith(('-done', '-update')):
      return Traffic()
    if op == 'custom-call' and i.attribute('custom_call_target') in NO_OPS:
      return Traffic()
    if op == 'while':
      return self._loop(computation, i)
    if op == 'conditional':
      branches = i.called('branch_computations') or [
        *i.called('true_computation'),
        *i.called('false_computation'),
      ]
      return max(map(self.count, branches), key=lambda t: (t.hbm_bytes, t.flops))
    if op == 'call':
      return self.count(i.called('to_apply')[0])
    if op == 'async':
      return self.count(i.called('calls')[0])
    return self._alone(computation, i)

  def _loop(self, computation: Computation, i: Instruction) -> Traffic:
    body = i.attribute('body')
    trips = self._trips.get(body)
    if trips is None:
      trips = loops.trip_count(self._module, computation, i)
    if trips is None:
      raise ValueError(f'Loop {i.name} may stop early; say how often {body} runs.')
    return (self.count(body) + self.count(i.attribute('condition'))) * trips

  def _alone(self, computation: Computation, i: Instruction) -> Traffic:
    """Counts an instruction that calls nothing, or a fusion."""
    inside = hbm.body(self._module, computation, i)
    read, written = hbm.moved(computation, i, inside)
    products = sum(flops.of_product(inside, x) for x in inside.instructions.values())
    estimate = re.search(r'"estimated_cycles":"(\d+)"', i.aside)
    cycles = int(estimate.group(1)) if estimate else 0
    received = collections.Counter()
    for kind, nbytes in collectives.received(inside, self._module.devices):
      received[kind] += nbytes
    return Traffic(read, written, products, cycles, received)
