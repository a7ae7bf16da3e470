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

from gqa_t5x.analysis.hlo import collectives, flops, hbm
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
# What a loop's counter may go through.
COPIES = ('copy', 'bitcast')


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
  collectives: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )

  @property
  def hbm_bytes(self) -> float:
    """Read and written."""
    return self.read_bytes + self.written_bytes

  def __add__(self, other: 'Traffic') -> 'Traffic':
    ours, others = vars(self), vars(other)
    return Traffic(**{name: ours[name] + others[name] for name in ours})

  def __mul__(self, times: float) -> 'Traffic':
    def scaled(values):
      return {name: n * times for name, n in values.items()}

    numbers = dict(vars(self))
    received = collections.Counter(scaled(numbers.pop('collectives')))
    return Traffic(**scaled(numbers), collectives=received)


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
    if i.opcode == 'while' and _trip_count(module, computation, i) is None
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
      trips = _trip_count(self._module, computation, i)
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
    received = collectives.received(inside, self._module.devices)
    return Traffic(read, written, products, cycles, received)


def _trip_count(
  module: Module, computation: Computation, loop: Instruction
) -> int | None:
  """Returns how often a loop runs, or None if it may stop early.

  That is what the compiler notes; or else it follows from a counter that the loop
  carries, if it begins with a constant, grows by one, and is compared with another.
  """
  noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.aside)
  if noted:
    return int(noted.group(1))
  condition = module.computations[loop.attribute('condition')]
  body = module.computations[loop.attribute('body')]
  test = condition.root
  if test.opcode != 'compare' or test.attribute('direction') != 'LT':
    return None
  counter, end = (condition.through(name, *COPIES) for name in test.operands)
  if counter.opcode != 'get-tuple-element' or end.opcode != 'constant':
    return None
  index = int(counter.attribute('index'))
  begin = _element(computation, loop.operands[0], index)
  if begin is None or begin.opcode != 'constant' or not _grows_by_one(body, index):
    return None
  return max(0, int(end.literal) - int(begin.literal))


def _element(computation: Computation, name: str, index: int) -> Instruction | None:
  """Returns what makes an element of a tuple, if it is made here."""
  made = computation.instructions[name]
  if made.opcode != 'tuple':
    return None
  return computation.through(made.operands[index], *COPIES)


def _grows_by_one(body: Computation, index: int) -> bool:
  new = _element(body, body.root.name, index)
  if new is None or new.opcode != 'add':
    return False
  old, step = (body.through(name, *COPIES) for name in new.operands)
  return (
    old.opcode == 'get-tuple-element'
    and int(old.attribute('index')) == index
    and body.instructions[old.operands[0]].opcode == 'parameter'
    and step.opcode == 'constant'
    and step.literal == '1'
  )
