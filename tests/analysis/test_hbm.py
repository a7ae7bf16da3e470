# ruff: noqa: E501
"""Bytes that instructions move in HBM, against numbers worked out by hand.

A case is a program, under its name and the bytes that it reads and writes. What has a
type alone is a parameter, and the last line is the result. Layouts: no tile where none
is needed; S(1) and S(3) are memories on the chip, S(6) one of scalars. The order
within the tuple of a start says nothing.
"""

import re

import pytest

from helpers.hlo_programs import moved, program

CASES = """
# a result on the chip: 16384 0
%x = f32[16,256]
%y = f32[16,256]{1,0:S(1)} negate(%x)

# an operand that is used twice is read once: 16384 16384
%x = f32[16,256]
%y = f32[16,256] add(%x, %x)

# one array by two names is read once: 16384 0
%x = f32[16,256]
%z = f32[16,256] bitcast(%x)
%y = f32[16,256]{1,0:S(1)} add(%x, %z)

# padding counts: 3 x 5 in a tile of 8 x 128: 4096 0
%x = f32[3,5]{1,0:T(8,128)}
%y = f32[3,5]{1,0:T(8,128)S(3)} negate(%x)

# nothing is read to make numbers: 0 16384
%y = f32[16,256] iota(), iota_dimension=0

# all results in HBM are written: 16384 16448
%x = f32[16,256]
%y = (f32[16,256], s32[16,256]{1,0:S(1)}, s32[16]) sort(%x), to_apply=%add

# another shape: 0 0
%x = f32[16,256]
%y = f32[4096] bitcast(%x)

# a custom call that gives a name: 0 0
%x = f32[16,256]
%y = f32[32,256]{1,0:S(3)} custom-call(%x, %x), custom_call_target="ConcatBitcast"

# a dynamic slice: 1024 1024
%x = f32[16,256]
%i = s32[]{:S(6)}
%y = f32[1,256] dynamic-slice(%x, %i, %i)

# a part of a tile reads the whole tile: 8192 0
%x = f32[16,256]{1,0:T(8,128)}
%y = f32[1,256]{1,0:T(1,128)S(1)} slice(%x), slice={[3:4], [0:256]}

# a gather reads rows of 512 bytes, here 3 x 2, of which each has two of bf16: 3072 0
%x = bf16[64,256]{1,0:T(8,128)(2,1)}
%i = s32[3]{0:T(128)S(1)}
%y = bf16[3,256]{1,0:T(8,128)(2,1)S(1)} gather(%x, %i), offset_dims={1}, slice_sizes={1,256}

# a gather reads no more than there is: 4096 0
%x = f32[8,128]{1,0:T(8,128)}
%i = s32[99]{0:T(128)S(1)}
%y = f32[99,128]{1,0:T(8,128)S(1)} gather(%x, %i), offset_dims={1}, slice_sizes={1,128}

# a whole row of tiles is written: 0 8192
%x = f32[16,256]{1,0:T(8,128)}
%u = f32[8,256]{1,0:T(8,128)S(1)}
%i = s32[]{:S(6)}
%y = f32[16,256]{1,0:T(8,128)} dynamic-update-slice(%x, %u, %i, %i)

# a part of a tile is read as well: 8192 8192
%x = f32[16,256]{1,0:T(8,128)}
%u = f32[16,1]{1,0:T(8,128)S(1)}
%i = s32[]{:S(6)}
%y = f32[16,256]{1,0:T(8,128)} dynamic-update-slice(%x, %u, %i, %i)

# not in place: from HBM to the chip: 16384 0
%x = f32[16,256]{1,0:T(8,128)}
%u = f32[8,256]{1,0:T(8,128)S(1)}
%i = s32[]{:S(6)}
%y = f32[16,256]{1,0:T(8,128)S(1)} dynamic-update-slice(%x, %u, %i, %i)

# not in place: from the chip to HBM: 8192 16384
%x = f32[16,256]{1,0:T(8,128)S(1)}
%u = f32[8,256]{1,0:T(8,128)}
%i = s32[]{:S(6)}
%y = f32[16,256]{1,0:T(8,128)} dynamic-update-slice(%x, %u, %i, %i)

# a scatter adds to 3 rows of 2 x 512 bytes: 3072 3072
%x = f32[64,256]{1,0:T(8,128)}
%i = s32[3]{0:T(128)S(1)}
%u = f32[3,256]{1,0:T(8,128)S(1)}
%y = f32[64,256]{1,0:T(8,128)} scatter(%x, %i, %u), update_window_dims={1}, inserted_window_dims={0}, to_apply=%add

# a copy to the chip: 16384 0
%x = f32[16,256]
%s = (f32[16,256]{1,0:S(1)}, f32[16,256], u32[]{:S(2)}) copy-start(%x)
%y = f32[16,256]{1,0:S(1)} copy-done(%s)

# a copy from the chip: 0 16384
%x = f32[16,256]{1,0:S(1)}
%s = (f32[16,256], f32[16,256]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%x)
%y = f32[16,256] copy-done(%s)

# an update in place that is started and done: 0 1024
%x = f32[16,256]
%u = f32[1,256]{1,0:S(1)}
%i = s32[]{:S(6)}
%s = ((f32[16,256]), f32[16,256], s32[]{:S(2)}) dynamic-update-slice-start(%x, %u, %i, %i)
%y = f32[16,256] dynamic-update-slice-done(%s)

# 8 numbers of a parameter, which a fusion in the fusion renames: 32 32
renamed:
  %b = f32[16,256]
  %flat = f32[4096] bitcast(%b)
fused:
  %p = f32[16,256]
  %i = s32[]
  %inner = f32[4096] fusion(%p), kind=kLoop, calls=%renamed
  %taken = f32[8] dynamic-slice(%inner, %i)
main:
  %x = f32[16,256]
  %i = s32[]{:S(6)}
  %y = f32[8] fusion(%x, %i), kind=kLoop, calls=%fused

# what is sliced and read whole is read whole: 16384 0
fused:
  %p = f32[16,256]
  %i = s32[]
  %taken = f32[1,256] dynamic-slice(%p, %i, %i)
  %zero = f32[] constant(0)
  %sum = f32[256] reduce(%p, %zero), dimensions={0}, to_apply=%add
main:
  %x = f32[16,256]
  %i = s32[]{:S(6)}
  %y = f32[256]{0:S(1)} fusion(%x, %i), kind=kInput, calls=%fused

# no array is there to be changed in place: all is written: 1024 16384
fused:
  %u = f32[1,256]
  %i = s32[]
  %zero = f32[] constant(0)
  %zeros = f32[16,256] broadcast(%zero), dimensions={}
  %new = f32[16,256] dynamic-update-slice(%zeros, %u, %i, %i)
main:
  %u = f32[1,256]
  %i = s32[]{:S(6)}
  %y = f32[16,256] fusion(%u, %i), kind=kLoop, calls=%fused

# changed in place, and then read whole: 16384 1024
fused:
  %p = f32[16,256]
  %u = f32[1,256]
  %i = s32[]
  %new = f32[16,256] dynamic-update-slice(%p, %u, %i, %i)
  %zero = f32[] constant(0)
  %sum = f32[256] reduce(%new, %zero), dimensions={0}, to_apply=%add
  %pair = (f32[16,256], f32[256]) tuple(%new, %sum)
main:
  %x = f32[16,256]
  %u = f32[1,256]{1,0:S(1)}
  %i = s32[]{:S(6)}
  %y = (f32[16,256], f32[256]{0:S(1)}) fusion(%x, %u, %i), calls=%fused

# changed in place, and one row of it is read: 1024 1024
fused:
  %p = f32[16,256]
  %u = f32[1,256]
  %i = s32[]
  %new = f32[16,256] dynamic-update-slice(%p, %u, %i, %i)
  %row = f32[1,256] dynamic-slice(%new, %i, %i)
  %pair = (f32[16,256], f32[1,256]) tuple(%new, %row)
main:
  %x = f32[16,256]
  %u = f32[1,256]{1,0:S(1)}
  %i = s32[]{:S(6)}
  %y = (f32[16,256], f32[1,256]{1,0:S(1)}) fusion(%x, %u, %i), calls=%fused

# a row of bf16 that is sliced as f32, operands in another order: 512 0
row:
  %q = f32[16,256]
  %j = s32[]
  %wide = f32[16,256] convert(%q)
  %one = f32[1,256] dynamic-slice(%wide, %j, %j)
  %flat = f32[256] bitcast(%one)
fused:
  %i = s32[]
  %p = bf16[16,256]
  %one = f32[256] fusion(%p, %i), kind=kLoop, calls=%row
  %other = f32[256] negate(%one)
main:
  %x = bf16[16,256]
  %i = s32[]{:S(6)}
  %y = f32[256]{0:S(1)} fusion(%i, %x), kind=kLoop, calls=%fused

# three words of an embedding table: 3 x 2 rows of 512 bytes: 3072 0
fused:
  %table = bf16[64,256]{1,0:T(8,128)(2,1)}
  %i = s32[3]{0:T(128)}
  %ids = s32[3] custom-call(%i), custom_call_target="AssumeGatherIndicesInBound"
  %taken = bf16[3,256]{1,0:T(8,128)(2,1)} gather(%table, %ids), offset_dims={1}, slice_sizes={1,256}
  %y = bf16[3,256]{1,0:T(8,128)(2,1)} reshape(%taken)
main:
  %x = bf16[64,256]{1,0:T(8,128)(2,1)}
  %i = s32[3]{0:T(128)S(1)}
  %y = bf16[3,256]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %i), calls=%fused
"""


def instructions(lines):
  """Writes out which of the lines are parameters, and which is the result."""
  lines = lines.strip().split('\n')
  number = iter(range(len(lines)))
  *others, root = (
    line if re.search(r' [\w-]+\(', line) else f'{line} parameter({next(number)})'
    for line in map(str.strip, lines)
  )
  return '\n'.join([*others, f'ROOT {root}'])


@pytest.mark.parametrize(
  'case', CASES.strip().split('\n\n'), ids=lambda case: case.split('\n')[0][2:]
)
def test_bytes(case):
  title, lines = case.split('\n', 1)
  *called, entry = re.split(r'^(\w+):\n', lines, flags=re.M)
  pairs = zip(called[1:-1:2], called[2::2], strict=True)
  computations = (f'%{n} () -> () {{\n{instructions(i)}\n}}\n' for n, i in pairs)
  expected = tuple(map(int, title.split()[-2:]))
  assert moved(program(instructions(entry), ''.join(computations))) == expected


def test_what_is_started_and_never_done():
  start = '%s = (f32[8], f32[8], u32[]{:S(2)}) copy-start(%x)'
  with pytest.raises(ValueError, match='s is started in main, and never done'):
    moved(program(instructions(f'%x = f32[8]\n{start}')))
