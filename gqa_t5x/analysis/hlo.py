"""Compiled XLA programs as Python objects: what `compiled.as_text()` says.

The text is that of one device's program. A shape has a layout such as

  bf16[64,1,64,128]{3,2,0,1:T(8,128)(2,1)S(3)}

the dimensions from the fastest to the slowest, tiles, and S(n), the memory that it lies
in: none is HBM. Memory is tiled by its fastest dimensions, and each is padded to a
multiple of its tile; further tiles pack narrow types within a tile and pad nothing.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

HBM = 0
BITS = {
  'pred': 8,
  's2': 2,
  'u2': 2,
  's4': 4,
  'u4': 4,
  'bf16': 16,
  'token': 0,
  'opaque': 0,
}
_ARRAY = re.compile(r'(\w+)\[([^\]]*)\](?:\{([^}]*)\})?')
_TILE = re.compile(r'\(([\d,]+)\)')
_COMMENT = re.compile(r'/\*.*?\*/')


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array's shape and layout.

  Attributes:
    dtype: XLA's name of the type.
    dims: sizes.
    minor_to_major: dimensions, the fastest first.
    tile: sizes of the first tile, of the fastest dimensions, the slower first.
    space: number of the memory that it lies in.
  """

  dtype: str
  dims: tuple[int, ...]
  minor_to_major: tuple[int, ...] = ()
  tile: tuple[int, ...] = ()
  space: int = HBM

  @property
  def bits(self) -> int:
    """Of an element."""
    if self.dtype in BITS:
      return BITS[self.dtype]
    found = re.search(r'\d+', self.dtype)
    return int(found.group()) if found else 0

  @property
  def size(self) -> int:
    """Bytes of the elements alone."""
    return math.prod(self.dims) * self.bits // 8

  def padded(self, dims: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Returns the sizes in memory, from the slowest to the fastest dimension.

    Args:
      dims: other sizes in the same layout; by default its own.
    """
    dims = self.dims if dims is None else dims
    order = [dims[i] for i in reversed(self.minor_to_major)] or list(dims)
    order = [1] * (len(self.tile) - len(order)) + order
    first = len(order) - len(self.tile)
    tiles = [1] * first + list(self.tile)
    return tuple(-(-n // t) * t for n, t in zip(order, tiles, strict=True))

  def nbytes_of(self, dims: tuple[int, ...]) -> int:
    """Returns the bytes that an array of other sizes takes in this layout."""
    return math.prod(self.padded(dims)) * self.bits // 8

  @property
  def nbytes(self) -> int:
    """Bytes in memory, padding included."""
    return self.nbytes_of(self.dims)


def _parse_array(text: str) -> Shape:
  dtype, dims, layout = _ARRAY.match(text).groups()
  sizes = tuple(int(n.lstrip('<=')) for n in dims.split(',') if n)
  order, _, rest = (layout or '').partition(':')
  tiles = re.search(r'T((?:\([\d,]+\))+)', rest)
  tile = _TILE.search(tiles.group(1)).group(1) if tiles else ''
  space = re.search(r'S\((\d+)\)', rest)
  return Shape(
    dtype,
    sizes,
    tuple(int(n) for n in order.split(',') if n),
    tuple(int(n) for n in tile.split(',') if n),
    int(space.group(1)) if space else HBM,
  )


def parse_shapes(text: str) -> tuple[Shape, ...]:
  """Returns the arrays of a shape: one, or those of a tuple, flattened."""
  return tuple(_parse_array(m.group()) for m in _ARRAY.finditer(_COMMENT.sub('', text)))


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    name: its name in the computation.
    opcode: such as `fusion`.
    type_text: its shape as text.
    operands: names, in order.
    rest: attributes as text.
    is_root: whether it is the computation's result.
    literal: what stands between the parentheses, for constants and parameters.
  """

  name: str
  opcode: str
  type_text: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool
  literal: str

  @functools.cached_property
  def shapes(self) -> tuple[Shape, ...]:
    """Its arrays: one, or those of a tuple, flattened."""
    return parse_shapes(self.type_text)

  @property
  def shape(self) -> Shape:
    """Its array, or the first of a tuple."""
    return self.shapes[0]

  def attribute(self, name: str) -> str | None:
    """Returns an attribute's text, such as `body`'s or `dim_labels`'s."""
    found = re.search(rf'(?:^|, ){name}=(%?[\w.\->]+|\{{[^}}]*\}}|"[^"]*")', self.rest)
    return found.group(1).strip('%"') if found else None

  def called(self, name: str) -> list[str]:
    """Returns the computations that an attribute names."""
    text = self.attribute(name)
    return re.findall(r'[\w.\-]+', text) if text else []


@dataclasses.dataclass(frozen=True)
class Computation:
  """A list of instructions, in the order in which they run."""

  name: str
  instructions: dict[str, Instruction]

  @functools.cached_property
  def root(self) -> Instruction:
    """Its result."""
    return next(i for i in self.instructions.values() if i.is_root)

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Its parameters by their number."""
    return {
      int(i.literal): i for i in self.instructions.values() if i.opcode == 'parameter'
    }

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Name -> the instructions that use it."""
    users: dict[str, list[Instruction]] = {}
    for instruction in self.instructions.values():
      for name in dict.fromkeys(instruction.operands):
        users.setdefault(name, []).append(instruction)
    return users


@dataclasses.dataclass(frozen=True)
class Module:
  """A program.

  Attributes:
    computations: by name.
    entry: the name of the first.
  """

  computations: dict[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """Parses a program.

  Args:
    text: of `compiled.as_text()`.

  Raises:
    ValueError: if it is none.
  """
  computations, entry = {}, None
  name, instructions = None, {}
  for line in text.split('\n'):
    if name is None:
      if line.endswith('{') and line.startswith(('%', 'ENTRY')):
        words = line.split()
        is_entry = words[0] == 'ENTRY'
        name = words[1 if is_entry else 0].lstrip('%')
        entry = name if is_entry else entry
        instructions = {}
    elif line.startswith('}'):
      computations[name] = Computation(name, instructions)
      name = None
    else:
      instruction = _parse_instruction(line)
      if instruction is not None:
        instructions[instruction.name] = instruction
  if entry is None:
    raise ValueError(f'This is no HLO module: {text[:60]!r} ...')
  return Module(computations, entry)


def _parse_instruction(line: str) -> Instruction | None:
  left, equals, right = line.strip().partition(' = ')
  if not equals:
    return None
  is_root = left.startswith('ROOT ')
  end = _closing(right, 0) + 1 if right.startswith('(') else right.index(' ')
  type_text, right = right[:end], right[end:].lstrip()
  opcode, _, _ = right.partition('(')
  start = len(opcode)
  end = _closing(right, start)
  inside, rest = right[start + 1 : end], right[end + 1 :].removeprefix(', ')
  operands = () if opcode in ('constant', 'parameter') else tuple(_names(inside))
  rest = rest.partition(', metadata={')[0]
  return Instruction(
    left.removeprefix('ROOT ').lstrip('%'),
    opcode,
    type_text,
    operands,
    rest,
    is_root,
    inside,
  )


def _names(text: str) -> Iterator[str]:
  return (name.lstrip('%') for name in re.findall(r'%[\w.\-]+', text))


def _closing(text: str, start: int) -> int:
  """Returns where the parenthesis that opens at `start` closes."""
  depth = 0
  for found in re.compile(r'[()]').finditer(text, start):
    depth += 1 if found.group() == '(' else -1
    if depth == 0:
      return found.start()
  raise ValueError(f'no closing parenthesis in {text[start : start + 60]!r}')
