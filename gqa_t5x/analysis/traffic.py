"""Counts what a compiled program moves and computes on one device.

Only HBM counts: on TPUs, most arrays that are small enough stay on the chip, and XLA's
own "bytes accessed" counts every copy there, too. An instruction reads each of its
operands once and writes its result once, if they lie in HBM, with their padding.
Exceptions, in fusions as elsewhere:

  slices and gathers read what they take, not what they take it from;
  dynamic-update-slice changes its operand in place: it writes the tiles that it
    touches, and reads them, too, where it fills them in part;
  *-start reads and *-done writes;
  a loop counts as often as it runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

from gqa_t5x.analysis import flops
from gqa_t5x.analysis.hlo import HBM, Computation, Instruction, Module, Shape

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
  'async-update',
  'copy-update',
}
# Custom calls that give a name to memory, and move nothing.
NO_OPS = {'ConcatBitcast', 'AllocateBuffer', 'Sharding', 'AssumeGatherIndicesInBound'}
SLICES = {'slice', 'dynamic-slice', 'gather'}
COLLECTIVES = {
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'ragged-all-to-all',
  'collective-broadcast',
}


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one device does.

  Attributes:
    read_bytes: from HBM.
    written_bytes: to HBM.
    flops: of matrix products, 2 a multiply-add.
    collectives: kind -> bytes that the device receives, at least.
  """

  read_bytes: float = 0
  written_bytes: float = 0
  flops: float = 0
  collectives: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def hbm_bytes(self) -> float:
    """Read and written."""
    return self.read_bytes + self.written_bytes

  def __add__(self, other: 'Traffic') -> 'Traffic':
    kinds = self.collectives.keys() | other.collectives.keys()
    return Traffic(
      self.read_bytes + other.read_bytes,
      self.written_bytes + other.written_bytes,
      self.flops + other.flops,
      {k: self.collectives.get(k, 0) + other.collectives.get(k, 0) for k in kinds},
    )

  def __mul__(self, times: float) -> 'Traffic':
    return Traffic(
      self.read_bytes * times,
      self.written_bytes * times,
      self.flops * times,
      {kind: nbytes * times for kind, nbytes in self.collectives.items()},
    )


def count(
  module: Module, name: str | None = None, trips: Mapping[str, int] | None = None
) -> Traffic:
  """Counts one execution of a computation.

  Args:
    module: the program.
    name: the computation; the entry by default.
    trips: body of a loop -> how often it runs; needed where the program does not say.

  Raises:
    ValueError: for a loop that does not say how often it runs.
  """
  return _Counter(module, trips or {}).count(name or module.entry)


def main_loop(module: Module) -> str:
  """Returns the body of the entry's only loop that may stop early: that of decoding.

  Raises:
    ValueError: if there is not exactly one.
  """
  entry = module.computations[module.entry]
  found = [
    i.attribute('body')
    for i in entry.instructions.values()
    if i.opcode == 'while' and trip_count(module, i) is None
  ]
  if len(found) != 1:
    raise ValueError(f'{len(found)} loops of the program may stop early, and not one.')
  return found[0]


def by_instruction(module: Module, name: str) -> list[tuple[Traffic, Instruction]]:
  """Returns what each instruction of a computation does, the costliest first."""
  counter = _Counter(module, collections.defaultdict(lambda: 1))
  computation = module.computations[name]
  found = [(counter.one(computation, i), i) for i in computation.instructions.values()]
  return sorted(found, key=lambda pair: -pair[0].hbm_bytes)


def trip_count(module: Module, loop: Instruction) -> int | None:
  """Returns how often a loop from 0 by 1 runs, or None if its end is not a constant."""
  condition = module.computations[loop.attribute('condition')]
  root = condition.root
  if root.opcode != 'compare' or root.attribute('direction') != 'LT':
    return None
  bound = condition.instructions[root.operands[1]]
  return int(bound.literal) if bound.opcode == 'constant' else None


class _Counter:
  """Counts the computations of one module; those called more than once only once."""

  def __init__(self, module: Module, trips: Mapping[str, int]):
    self._module, self._trips = module, trips
    self._counted: dict[str, Traffic] = {}

  def count(self, name: str) -> Traffic:
    if name not in self._counted:
      computation = self._module.computations[name]
      parts = (self.one(computation, i) for i in computation.instructions.values())
      self._counted[name] = sum(parts, Traffic())
    return self._counted[name]

  def one(self, computation: Computation, i: Instruction) -> Traffic:
    """Counts one instruction with all that it calls."""
    op = i.opcode
    if op in FREE or (
      op == 'custom-call' and i.attribute('custom_call_target') in NO_OPS
    ):
      return Traffic()
    if op == 'while':
      return self._loop(i)
    if op == 'conditional':
      branches = i.called('branch_computations') or [
        *i.called('true_computation'),
        *i.called('false_computation'),
      ]
      return max((self.count(b) for b in branches), key=lambda t: t.hbm_bytes)
    if op == 'call':
      return self.count(i.called('to_apply')[0])
    if op == 'async-start':
      return self.count(i.called('calls')[0])
    if op == 'async-done':
      return Traffic()
    reads, writes = self._bytes(computation, i)
    return Traffic(
      reads, writes, self._flops(computation, i), self._collectives(computation, i)
    )

  def _loop(self, i: Instruction) -> Traffic:
    body = i.attribute('body')
    trips = self._trips[body] if body in self._trips else trip_count(self._module, i)
    if trips is None:
      raise ValueError(f'Loop {i.name} may stop early; say how often {body} runs.')
    return (self.count(body) + self.count(i.attribute('condition'))) * trips

  def _bytes(self, computation: Computation, i: Instruction) -> tuple[float, float]:
    """Returns the bytes that an instruction reads and writes."""
    written = sum(s.nbytes for s in i.shapes if s.space == HBM)
    if i.opcode == 'fusion':
      return self._fusion_bytes(computation, i)
    if i.opcode.endswith('-start'):
      return self._start_bytes(computation, i), 0
    if i.opcode.endswith('-done'):
      return 0, written
    operands = {name: computation.instructions[name] for name in i.operands}
    reads = {
      name: sum(s.nbytes for s in o.shapes if s.space == HBM)
      for name, o in operands.items()
    }
    first = next(iter(reads), None)
    if i.opcode in SLICES:
      reads[first] = min(reads[first], _like(i.shape, operands[first].shape))
    elif i.opcode in ('dynamic-update-slice', 'scatter'):
      update = operands[i.operands[-1 if i.opcode == 'scatter' else 1]].shape
      reads[first], written = _in_place(i.shape, update)
    return sum(reads.values()), written

  def _start_bytes(self, computation: Computation, i: Instruction) -> float:
    (done,) = computation.users.get(i.name, (i,))
    total = 0.0
    for name in dict.fromkeys(i.operands):
      for shape in computation.instructions[name].shapes:
        if shape.space == HBM:
          is_slice = 'slice-start' in i.opcode
          total += (
            min(shape.nbytes, _like(done.shape, shape)) if is_slice else shape.nbytes
          )
    return total

  def _fusion_bytes(
    self, computation: Computation, i: Instruction
  ) -> tuple[float, float]:
    body = self._module.computations[i.called('calls')[0]]
    read = 0.0
    for number, name in enumerate(i.operands):
      if name in i.operands[:number]:
        continue  # Read once, however often.
      shapes = computation.instructions[name].shapes
      if len(shapes) == 1 and shapes[0].space == HBM:
        nbytes, is_result = self._read(body.name, number, shapes[0])
        read += shapes[0].nbytes if is_result else nbytes
      elif len(shapes) > 1:
        read += sum(s.nbytes for s in shapes if s.space == HBM)
    written = 0.0
    for shape, (root, where) in zip(i.shapes, self._results(body.name), strict=True):
      if shape.space == HBM:
        if root.opcode == 'dynamic-update-slice':
          update = where.instructions[root.operands[1]].shape
          more, less = _in_place(shape, update)
          read, written = read + more, written + less
        else:
          written += shape.nbytes
    return read, written

  def _read(self, name: str, number: int, shape: Shape) -> tuple[float, bool]:
    """Returns the bytes that a fused computation reads of its parameter.

    And whether the parameter itself, unchanged, is one of its results.
    """
    computation = self._module.computations[name]
    total, is_result, todo = 0.0, False, [computation.parameters[number].name]
    while todo:
      value = todo.pop()
      is_result |= computation.instructions[value].is_root
      for user in computation.users.get(value, []):
        if user.opcode == 'bitcast':
          todo.append(user.name)
        elif user.opcode == 'fusion':
          inner = user.operands.index(value)
          nbytes, passed = self._read(user.called('calls')[0], inner, shape)
          total += nbytes
          todo += [user.name] if passed else []
        elif user.opcode in SLICES and user.operands[0] == value:
          total += _like(user.shape, shape)
        elif user.opcode == 'dynamic-update-slice' and user.operands[0] == value:
          pass  # What it touches is counted with the result.
        elif user.opcode == 'tuple' and user.is_root:
          is_result = True
        else:
          return shape.nbytes, False
    return min(total, shape.nbytes), is_result

  def _results(self, name: str) -> list[tuple[Instruction, Computation]]:
    """Returns what makes each result of a fused computation, and where."""
    computation = self._module.computations[name]
    return self._made_by(computation, computation.root)

  def _made_by(self, computation, i) -> list[tuple[Instruction, Computation]]:
    if i.opcode == 'tuple':
      parts = (computation.instructions[name] for name in i.operands)
      return [found for part in parts for found in self._made_by(computation, part)]
    if i.opcode == 'bitcast':
      return self._made_by(computation, computation.instructions[i.operands[0]])
    if i.opcode == 'fusion':
      return self._results(i.called('calls')[0])
    return [(i, computation)] * len(i.shapes)

  def _flops(self, computation: Computation, i: Instruction) -> float:
    if i.opcode == 'fusion':
      body = self._module.computations[i.called('calls')[0]]
      return sum(self._flops(body, inner) for inner in body.instructions.values())
    return flops.of_product(computation, i)

  def _collectives(self, computation: Computation, i: Instruction) -> dict[str, float]:
    kind = i.opcode.removesuffix('-start')
    if i.opcode == 'fusion':
      found: dict[str, float] = collections.defaultdict(float)
      name = i.called('calls')[0]
      body = self._module.computations[name]
      for inner in body.instructions.values():
        for kind, nbytes in self._collectives(body, inner).items():
          # The part of the sum that is not kept is not sent either.
          scatters = kind == 'all-reduce' and 'scatter' in name
          found['reduce-scatter' if scatters else kind] += nbytes / (
            2 if scatters else 1
          )
      return dict(found)
    if kind not in COLLECTIVES:
      return {}
    operands = sum(
      s.size for n in i.operands for s in computation.instructions[n].shapes
    )
    return {kind: _received(kind, operands, _group_size(i.rest))}


def _like(taken: Shape, source: Shape) -> float:
  """Returns the bytes that some elements of an array take there."""
  if len(taken.dims) == len(source.dims):
    return source.nbytes_of(taken.dims)
  return taken.nbytes


def _in_place(whole: Shape, update: Shape) -> tuple[float, float]:
  """Returns the bytes read and written to change a part of an array."""
  if whole.space != HBM:
    return 0, 0
  if len(update.dims) != len(whole.dims):
    return update.nbytes, update.nbytes
  touched = whole.nbytes_of(update.dims)
  order = [update.dims[d] for d in reversed(whole.minor_to_major)]
  sizes = [whole.dims[d] for d in reversed(whole.minor_to_major)]
  tile = whole.tile[-len(order) :] if order else ()
  pairs = zip(
    order[len(order) - len(tile) :], sizes[len(sizes) - len(tile) :], tile, strict=True
  )
  full = all(n % t == 0 or n == size for n, size, t in pairs)
  return 0 if full else touched, touched


def _received(kind: str, operand_bytes: float, group: int) -> float:
  """Returns the bytes that a device receives at least, around a ring."""
  if kind == 'all-gather':
    return operand_bytes * (group - 1)
  if kind in ('reduce-scatter', 'all-to-all', 'ragged-all-to-all'):
    return operand_bytes * (group - 1) / group
  if kind == 'all-reduce':
    return 2 * operand_bytes * (group - 1) / group
  return operand_bytes


def _group_size(rest: str) -> int:
  """Returns how many devices take part in a collective."""
  mesh = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', rest)
  if mesh:
    sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
    return math.prod(sizes[n] for n in re.findall(r"'([^']+)'", mesh.group(2)))
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]<=', rest)
  if iota:
    return int(iota.group(2))
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', rest)
  return len(listed.group(1).split(',')) if listed else 1
