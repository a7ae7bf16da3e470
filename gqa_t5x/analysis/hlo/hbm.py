"""Bytes that one instruction of a compiled program reads and writes in HBM.

It reads each of its operands once, however often it uses it, and writes its results
once, if they lie in HBM, with their padding. A fusion is one instruction: all within
stays on the chip. Exceptions:

  slice and dynamic-slice read the tiles that hold what they take, gather the rows;
  dynamic-update-slice and scatter change an operand in place if it lies in HBM, as the
    result does: they write the tiles or rows that they touch, and read them, too, where
    they do not fill them or may add to what is there.

How much of a tile moves with a part of it is not documented. What is known is how much
on-chip memory the compiler (libtpu 0.0.42) gives to an instruction:

  a gather of n rows of 1024 columns gets n times 4 KB for what it reads, be it f32,
    bf16 or int8: of each tile it reads rows of 512 bytes, which hold two rows of bf16;
    so does a scatter;
  a dynamic-update-slice of a single row, in HBM, gets several whole tiles.

A part is taken to begin where a tile does, so that the count is the least.
"""

import dataclasses
import math

from gqa_t5x.analysis.hlo.parse import HBM, Computation, Instruction, Module

SLICES = {'slice', 'dynamic-slice', 'gather'}
UPDATES = {'dynamic-update-slice', 'scatter'}
# What passes the elements of an array on, each by itself.
VIEWS = {'bitcast', 'reshape', 'transpose', 'copy', 'convert'}


def base_opcode(i: Instruction) -> str:
  """Returns the opcode without `-start`."""
  return i.opcode.removesuffix('-start')


def body(module: Module, computation: Computation, i: Instruction) -> Computation:
  """Returns what an instruction does, as a computation of its operands.

  Of a fusion that is its computation, with the fusions within it written out. Any other
  instruction stands alone, the start of an asynchronous one for all of it.
  """
  if base_opcode(i) == 'fusion':
    return Computation(i.name, _written_out(module, i.called('calls')[0]))
  parameters = {
    name: Instruction(
      name, 'parameter', computation.instructions[name].type_text, (), literal=str(n)
    )
    for n, name in enumerate(dict.fromkeys(i.operands))
  }
  only = dataclasses.replace(
    i, opcode=base_opcode(i), type_text=_result(computation, i).type_text, is_root=True
  )
  return Computation(i.name, {**parameters, i.name: only})


def _result(computation: Computation, i: Instruction) -> Instruction:
  """Returns the instruction that has the result: itself, or the done of a start."""
  if not i.opcode.endswith('-start'):
    return i
  for user in computation.users.get(i.name, []):
    if user.opcode.endswith('-done'):
      return user
  raise ValueError(f'{i.name} is started in {computation.name}, and never done.')


def _written_out(module: Module, name: str) -> dict[str, Instruction]:
  """Returns a computation's instructions with those of its fusions in their place.

  A fusion's name goes to its result. Its parameters become bitcasts of its operands.
  """
  found: dict[str, Instruction] = {}
  for i in module.computations[name].instructions.values():
    if i.opcode != 'fusion':
      found[i.name] = i
      continue
    inner = _written_out(module, i.called('calls')[0])
    names = {n: i.name if x.is_root else f'{i.name}/{n}' for n, x in inner.items()}
    for n, x in inner.items():
      operands = tuple(names[operand] for operand in x.operands)
      if x.opcode == 'parameter':
        x = dataclasses.replace(x, opcode='bitcast')
        operands = (i.operands[int(x.literal)],)
      is_root = x.is_root and i.is_root
      found[names[n]] = dataclasses.replace(
        x, name=names[n], operands=operands, is_root=is_root
      )
  return found


def moved(
  computation: Computation, i: Instruction, inside: Computation
) -> tuple[float, float]:
  """Returns the bytes that an instruction reads and writes; `inside` is its `body`."""
  read, written, in_place = 0.0, 0.0, set()
  shapes, root = _result(computation, i).shapes, inside.root
  names = root.operands if root.opcode == 'tuple' else [root.name] * len(shapes)
  for name, shape in zip(names, shapes, strict=True):
    if shape.space != HBM:
      continue
    updates = _updates(inside, name)
    for update in updates:
      more, less = _touched(inside, inside.instructions[update])
      read, written = read + more, written + less
    in_place.update(updates)
    written += 0 if updates else shape.nbytes
  # An array that is read by several names is read once.
  sources: dict[str, float] = {}
  operands = i.operands if base_opcode(i) == 'fusion' else dict.fromkeys(i.operands)
  for number, name in enumerate(operands):
    source = computation.through(name, 'bitcast').name
    shapes = computation.instructions[name].shapes
    whole = sum(shape.nbytes for shape in shapes if shape.space == HBM)
    if whole:
      share = _share(inside, inside.parameters[number].name, in_place)
      sources[source] = min(sources.get(source, 0) + share * whole, whole)
  return read + sum(sources.values()), written


def _updates(inside: Computation, name: str) -> list[str]:
  """Returns what makes a result out of a parameter in HBM, in place; or nothing."""
  updates = []
  while True:
    i = inside.instructions[name]
    if i.opcode in UPDATES:
      updates.append(name)
    elif i.opcode == 'parameter':
      return updates if i.shape.space == HBM else []
    elif i.opcode != 'bitcast':
      return []
    name = i.operands[0]


def _touched(inside: Computation, i: Instruction) -> tuple[float, float]:
  """Returns the bytes that an update in place reads and writes of its array."""
  whole = inside.instructions[i.operands[0]].shape
  update = inside.instructions[i.operands[1]].shape
  part, parts = update.dims, 1
  if i.opcode == 'scatter':
    update = inside.instructions[i.operands[-1]].shape
    window = i.numbers('update_window_dims')
    sizes = iter([update.dims[d] for d in window])
    alone = i.numbers('inserted_window_dims') + i.numbers('input_batching_dims')
    part = [1 if d in alone else next(sizes) for d in range(len(whole.dims))]
    parts = math.prod(n for d, n in enumerate(update.dims) if d not in window)
    whole = whole.in_rows()
  nbytes = min(parts * whole.nbytes_of(part), whole.nbytes)
  is_read = i.opcode == 'scatter' or not whole.fills_tiles(part)
  return nbytes if is_read else 0, nbytes


def _share(inside: Computation, name: str, in_place: set[str]) -> float:
  """Returns the part of a parameter that is read; what is read twice counts twice.

  What the updates `in_place` read of the array that they change is counted elsewhere.
  """
  root, share = inside.root, 0.0
  results = set(root.operands) if root.opcode == 'tuple' else {root.name}
  todo = [(name, False)]
  while todo:
    name, is_updated = todo.pop()
    if name in results and not is_updated:
      return 1
    for user in inside.users.get(name, []):
      alone = user.operands[0] == name and user.operands.count(name) == 1
      if user.name in in_place and alone:
        todo.append((user.name, True))
      elif user.opcode in VIEWS:
        todo.append((user.name, is_updated))
      elif user.opcode in SLICES and alone:
        share += _taken(inside, user)
      elif not (user.is_root and user.opcode == 'tuple'):
        return 1
  return share


def _taken(inside: Computation, i: Instruction) -> float:
  """Returns the part of an array that a slice or a gather takes."""
  whole = inside.instructions[i.operands[0]].shape
  part, parts = i.shape.dims, 1
  if i.opcode == 'gather':
    offsets = i.numbers('offset_dims')
    parts = math.prod(n for d, n in enumerate(i.shape.dims) if d not in offsets)
    part = i.numbers('slice_sizes')
    whole = whole.in_rows()
  return parts * whole.nbytes_of(part) / whole.nbytes
