"""Compiled XLA programs as Python objects: what `compiled.as_text()` says.

The text is that of one device's program. A shape has a layout such as

  bf16[64,1,64,128]{3,2,0,1:T(8,128)(2,1)S(3)}

the dimensions from the fastest to the slowest, tiles, and S(n), the memory that it lies
in: none is HBM. An array is cut into tiles of its fastest dimensions, each padded to a
multiple of its tile; every further tile cuts the tiles of the one before it in the same
way, and orders narrow types within them, so that (2,1) interleaves two rows of bf16.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

HBM = 0
_ARRAY = re.compile(r'(\w+)\[([^\]]*)\](?:\{([^}]*)\})?')
_TILE = re.compile(r'\(([\d,]+)\)')
_COMMENT = re.compile(r'/\*.*?\*/')
_ASIDE = re.compile(r'(?:^|, )(?:metadata|backend_config)=[{"]')
_COMPUTATION = re.compile(r'^(ENTRY %?|%)(\S+) [^\n]*\{\n(.*?)^\}', re.M | re.S)
_INSTRUCTION = re.compile(r'\s*(ROOT )?%?(\S+) = (.*?) ([\w\-]+)\(')
_NAME = re.compile(r'%([\w.\-]+)')
_PARENTHESIS = re.compile(r'[()]')


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array's shape and layout.

  Attributes:
    dtype: XLA's name of the type.
    dims: sizes.
    minor_to_major: dimensions, the fastest first.
    tiles: of each level, sizes of the fastest dimensions, the slower first.
    space: number of the memory that it lies in.
    bits: of an element in memory.
  """

  dtype: str
  dims: tuple[int, ...]
  minor_to_major: tuple[int, ...] = ()
  tiles: tuple[tuple[int, ...], ...] = ()
  space: int = HBM
  bits: int = 0

  @property
  def size(self) -> int:
    """Bytes of the elements alone."""
    return math.prod(self.dims) * self.bits // 8

  def _slowest_first(self, dims: Sequence[int]) -> list[int]:
    """Returns sizes of this array's dimensions in the order of its memory."""
    return [dims[d] for d in reversed(self.minor_to_major)] or list(dims)

  def nbytes_of(self, dims: Sequence[int]) -> int:
    """Returns the bytes that an array of other sizes takes in this layout.

    So many bytes are touched, too, when a part of this size is taken from the array, if
    the part begins where a tile does.
    """
    sizes = self._slowest_first(dims)
    for tile in self.tiles:
      sizes = [1] * (len(tile) - len(sizes)) + sizes
      outer = len(sizes) - len(tile)
      counts = [-(-n // t) for n, t in zip(sizes[outer:], tile, strict=True)]
      sizes = [*sizes[:outer], *counts, *tile]
    return math.prod(sizes) * self.bits // 8

  @functools.cached_property
  def nbytes(self) -> int:
    """Bytes in memory, padding included."""
    return self.nbytes_of(self.dims)

  def in_rows(self) -> 'Shape':
    """Returns the array in rows of 512 bytes, 128 words of 32 bits, instead of tiles.

    A row of a tile is the least that memory is addressed by. It holds several rows of a
    narrow type: two of bf16.
    """
    if not self.tiles or not self.bits:
      return self
    packed = max(1, 32 // self.bits)
    row = (128 * packed,) if len(self.tiles[0]) == 1 else (packed, 128)
    return dataclasses.replace(self, tiles=(row,))

  def fills_tiles(self, dims: Sequence[int]) -> bool:
    """Whether a part of these sizes fills its tiles if it begins where one does."""
    if not self.tiles:
      return True
    tile = self.tiles[0]
    part, whole = self._slowest_first(dims), self._slowest_first(self.dims)
    rows = zip(reversed(part), reversed(whole), reversed(tile), strict=False)
    return all(n == size or n % t == 0 for n, size, t in rows)


def _parse_array(dtype: str, dims: str, layout: str | None) -> Shape:
  order, _, rest = (layout or '').partition(':')
  tiles = re.search(r'T((?:\([\d,]+\))+)', rest)
  space = re.search(r'S\((\d+)\)', rest)
  packed = re.search(r'E\((\d+)\)', rest)
  # Types below 8 bits take 8, unless the layout says E(bits).
  return Shape(
    dtype,
    _whole_numbers(dims),
    _whole_numbers(order),
    tuple(map(_whole_numbers, _TILE.findall(tiles.group(1)))) if tiles else (),
    int(space.group(1)) if space else HBM,
    int(packed.group(1)) if packed else _bits(dtype),
  )


def _bits(dtype: str) -> int:
  """Returns the bits of a type by its name; a token and what is opaque have none."""
  found = re.search(r'\d+', dtype)
  return max(8, int(found.group())) if found else 8 * (dtype == 'pred')


def _whole_numbers(text: str) -> tuple[int, ...]:
  return tuple(map(int, re.findall(r'\d+', text)))


@functools.cache
def parse_shapes(text: str) -> tuple[Shape, ...]:
  """Returns the arrays of a shape: one, or those of a tuple, flattened."""
  found = _ARRAY.finditer(_COMMENT.sub('', text))
  return tuple(_parse_array(*match.groups()) for match in found)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    opcode: such as `fusion`.
    type_text: its shape as text.
    operands: names, in order.
    attributes: as text, without metadata and what the compiler notes for itself.
    aside: those two.
    is_root: whether it is the computation's result.
    literal: what stands between the parentheses, for constants and parameters.
  """

  name: str
  opcode: str
  type_text: str
  operands: tuple[str, ...]
  attributes: str = ''
  aside: str = ''
  is_root: bool = False
  literal: str = ''

  @property
  def shapes(self) -> tuple[Shape, ...]:
    """Its arrays: one, or those of a tuple, flattened."""
    return parse_shapes(self.type_text)

  @property
  def shape(self) -> Shape:
    """Its array, or the first of a tuple."""
    return self.shapes[0]

  def attribute(self, name: str) -> str | None:
    """Returns an attribute's text, such as `body`'s or `dim_labels`'s."""
    pattern = rf'(?:^|, ){name}=(%?[\w.\->]+|\{{[^}}]*\}}|"[^"]*")'
    found = re.search(pattern, self.attributes)
    return found.group(1).strip('%"') if found else None

  def numbers(self, name: str) -> tuple[int, ...]:
    """Returns the numbers of an attribute such as `dimensions={0,2}`."""
    return _whole_numbers(self.attribute(name) or '')

  def called(self, name: str) -> list[str]:
    """Returns the computations that an attribute names."""
    return re.findall(r'[\w.\-]+', self.attribute(name) or '')


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

  def through(self, name: str, *opcodes: str) -> Instruction:
    """Returns what a name stands for: the operand of instructions of these opcodes."""
    while self.instructions[name].opcode in opcodes:
      name = self.instructions[name].operands[0]
    return self.instructions[name]

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
  """A program: its computations by name, the first of them, and how many devices."""

  computations: dict[str, Computation]
  entry: str
  devices: int


def parse(text: str) -> Module:
  """Parses the text of `compiled.as_text()`; ValueError if it is no program."""
  computations, entry = {}, None
  for mark, name, lines in _COMPUTATION.findall(text):
    instructions = filter(None, map(_parse_instruction, lines.split('\n')))
    computations[name] = Computation(name, {i.name: i for i in instructions})
    entry = entry if mark == '%' else name
  if entry not in computations:
    raise ValueError(
      f'This is no HLO module: {text[:40]!r}; it takes the text of compiled.as_text().'
    )
  header = text.partition('\n')[0]
  devices = re.findall(r', (?:num_partitions|replica_count)=(\d+)', header)
  return Module(computations, entry, math.prod(map(int, devices)))


def _parse_instruction(line: str) -> Instruction | None:
  found = _INSTRUCTION.match(line)
  if not found:
    return None
  root, name, type_text, opcode = found.groups()
  end = _closing(line, found.end() - 1)
  inside, rest = line[found.end() : end], line[end + 1 :].removeprefix(', ')
  aside = _ASIDE.search(rest)
  cut = aside.start() if aside else len(rest)
  is_literal = opcode in ('constant', 'parameter')
  return Instruction(
    name,
    opcode,
    type_text,
    () if is_literal else tuple(_NAME.findall(inside)),
    rest[:cut],
    rest[cut:],
    bool(root),
    inside if is_literal else '',
  )


def _closing(text: str, start: int) -> int:
  """Returns where the parenthesis that opens at `start` closes."""
  depth = 0
  for found in _PARENTHESIS.finditer(text, start):
    depth += 1 if found.group() == '(' else -1
    if depth == 0:
      return found.start()
  raise ValueError(f'no closing parenthesis in {text[start : start + 60]!r}.')
