"""How often the loops of a compiled program run, where the program says so."""

import re

from gqa_t5x.analysis.hlo.parse import Computation, Instruction, Module

COPIES = ('copy', 'bitcast')


def trip_count(
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
