"""Bytes that one device receives from others in the collectives of a program."""

import collections
import math
import re

from gqa_t5x.analysis.hlo.parse import Computation, Instruction

# The least that the usual ring algorithms receive, without padding, of an operand of n
# bytes in a group of g. An all-reduce is a reduce-scatter and then an all-gather.
COLLECTIVES = {
  'all-gather': lambda n, g: n * (g - 1),
  'reduce-scatter': lambda n, g: n * (g - 1) / g,
  'all-reduce': lambda n, g: 2 * n * (g - 1) / g,
  'all-to-all': lambda n, g: n * (g - 1) / g,
  'ragged-all-to-all': lambda n, g: n * (g - 1) / g,
  'collective-permute': lambda n, g: n,
  'collective-broadcast': lambda n, g: n,
}
_RENAMES = {'bitcast', 'get-tuple-element', 'reshape'}


def received(computation: Computation, devices: int) -> collections.Counter:
  """Returns kind -> bytes received in a `hbm.body`; so many devices run the program."""
  found = collections.Counter()
  for i in computation.instructions.values():
    if i.opcode not in COLLECTIVES:
      continue
    kind = 'reduce-scatter' if _is_reduce_scatter(computation, i) else i.opcode
    operands = (computation.instructions[name] for name in i.operands)
    nbytes = sum(shape.size for operand in operands for shape in operand.shapes)
    found[kind] += COLLECTIVES[kind](nbytes, _group_size(i, devices))
  return found


def _is_reduce_scatter(computation: Computation, i: Instruction) -> bool:
  """Whether it is an all-reduce that is fused with taking this device's part."""
  if i.opcode != 'all-reduce':
    return False
  todo, slices = [i.name], 0
  while todo:
    name = todo.pop()
    for user in computation.users.get(name, []):
      if user.opcode == 'dynamic-slice' and user.operands[0] == name:
        slices += 1
      elif user.opcode in _RENAMES:
        todo.append(user.name)
      else:
        return False
  return slices > 0


def _group_size(i: Instruction, devices: int) -> int:
  """Returns how many devices take part in a collective together.

  Its `replica_groups` are a list, {{0,1},{2,3}}; or so many of so many, [2,4]<=[8]; or
  axes of a mesh, mesh['x'=2,'y'=4] {'y'}, perhaps parts of axes, {'y':(2)2}; or {},
  all.
  """
  text = i.attributes.partition('replica_groups=')[2]
  if not text:
    return devices
  mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{('[^}]*)\}", text)
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
    return math.prod(int(part or sizes[name]) for name, part in axes)
  several = re.match(r'\[\d+,(\d+)\]<=', text)
  if several:
    return int(several.group(1))
  listed = re.match(r'\{(?:\{([\d,]+)\}|\})', text)
  if listed:
    return len(listed.group(1).split(',')) if listed.group(1) else devices
  raise ValueError(f'{i.name}: replica_groups={text[:30]} is written in no known way.')
