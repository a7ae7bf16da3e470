"""Bytes that instructions move in HBM, against numbers worked out by hand."""

import pytest

from helpers.hlo_programs import moved

# Layouts: no tile where none is needed; S(1) and S(3) are memories on the chip.
X = '%x = f32[16,256]{1,0} parameter(0)'  # 16384 bytes.


@pytest.mark.parametrize(
  ('body', 'expected'),
  [
    (f'{X}\nROOT %y = f32[16,256]{{1,0}} negate(%x)', (16384, 16384)),
    (f'{X}\nROOT %y = f32[16,256]{{1,0:S(1)}} negate(%x)', (16384, 0)),
    # An operand is read once, however often it is used.
    (f'{X}\nROOT %y = f32[16,256]{{1,0}} add(%x, %x)', (16384, 16384)),
    # Padding counts: 3 x 5 in a tile of 8 x 128.
    (
      '%x = f32[3,5]{1,0:T(8,128)} parameter(0)\n'
      'ROOT %y = f32[3,5]{1,0:T(8,128)S(3)} negate(%x)',
      (4096, 0),
    ),
    (f'{X}\nROOT %y = f32[4096]{{0}} bitcast(%x)', (0, 0)),
    (f'{X}\nROOT %y = (f32[16,256]{{1,0}}) tuple(%x)', (0, 0)),
    (
      f'{X}\nROOT %y = f32[32,256]{{1,0:S(3)}} custom-call(%x, %x),'
      ' custom_call_target="ConcatBitcast"',
      (0, 0),
    ),
    # Slices and gathers.
    (
      f'{X}\nROOT %y = f32[2,256]{{1,0:S(1)}} slice(%x), slice={{[0:2], [0:256]}}',
      (2048, 0),
    ),
    (
      f'{X}\n%i = s32[]{{:S(6)}} parameter(1)\n'
      'ROOT %y = f32[1,256]{1,0} dynamic-slice(%x, %i, %i)',
      (1024, 1024),
    ),
    # Of a part of a tile the whole is read.
    (
      '%x = f32[16,256]{1,0:T(8,128)} parameter(0)\n'
      'ROOT %y = f32[1,256]{1,0:T(1,128)S(1)} slice(%x), slice={[3:4], [0:256]}',
      (8192, 0),
    ),
    # In place: a whole row of tiles is written, a part of one is read as well.
    (
      '%x = f32[16,256]{1,0:T(8,128)} parameter(0)\n'
      '%u = f32[8,256]{1,0:T(8,128)S(1)} parameter(1)\n%i = s32[]{:S(6)} parameter(2)\n'
      'ROOT %y = f32[16,256]{1,0:T(8,128)} dynamic-update-slice(%x, %u, %i, %i)',
      (0, 8192),
    ),
    (
      '%x = f32[16,256]{1,0:T(8,128)} parameter(0)\n'
      '%u = f32[16,1]{1,0:T(8,128)S(1)} parameter(1)\n%i = s32[]{:S(6)} parameter(2)\n'
      'ROOT %y = f32[16,256]{1,0:T(8,128)} dynamic-update-slice(%x, %u, %i, %i)',
      (8192, 8192),
    ),
    (
      '%x = f32[16,256]{1,0:T(8,128)S(3)} parameter(0)\n'
      '%u = f32[16,1]{1,0:T(8,128)S(3)} parameter(1)\n%i = s32[]{:S(6)} parameter(2)\n'
      'ROOT %y = f32[16,256]{1,0:T(8,128)S(3)} dynamic-update-slice(%x, %u, %i, %i)',
      (0, 0),
    ),
    # A gather reads rows of 512 bytes of each tile: of 3 x 256 numbers, 3 x 2 rows.
    (
      '%x = f32[64,256]{1,0:T(8,128)} parameter(0)\n'
      '%i = s32[3]{0:T(128)S(1)} parameter(1)\n'
      'ROOT %y = f32[3,256]{1,0:T(8,128)S(1)} gather(%x, %i), offset_dims={1},'
      ' collapsed_slice_dims={0}, start_index_map={0}, slice_sizes={1,256}',
      (3 * 2 * 512, 0),
    ),
    # Two rows of bf16 lie in one.
    (
      '%x = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)\n'
      '%i = s32[3]{0:T(128)S(1)} parameter(1)\n'
      'ROOT %y = bf16[3,256]{1,0:T(8,128)(2,1)S(1)} gather(%x, %i), offset_dims={1},'
      ' collapsed_slice_dims={0}, start_index_map={0}, slice_sizes={1,256}',
      (3 * 2 * 512, 0),
    ),
    # More than there is cannot be read.
    (
      '%x = f32[8,128]{1,0:T(8,128)} parameter(0)\n'
      '%i = s32[99]{0:T(128)S(1)} parameter(1)\n'
      'ROOT %y = f32[99,128]{1,0:T(8,128)S(1)} gather(%x, %i), offset_dims={1},'
      ' collapsed_slice_dims={0}, start_index_map={0}, slice_sizes={1,128}',
      (4096, 0),
    ),
    # A scatter adds to 3 rows of 2 x 512 bytes, in place.
    (
      '%x = f32[64,256]{1,0:T(8,128)} parameter(0)\n'
      '%i = s32[3]{0:T(128)S(1)} parameter(1)\n'
      '%u = f32[3,256]{1,0:T(8,128)S(1)} parameter(2)\n'
      'ROOT %y = f32[64,256]{1,0:T(8,128)} scatter(%x, %i, %u), update_window_dims={1},'
      ' inserted_window_dims={0}, scatter_dims_to_operand_dims={0},'
      ' index_vector_dim=1, to_apply=%add',
      (3 * 2 * 512, 3 * 2 * 512),
    ),
    # Not in place: from HBM into an array on the chip, or back.
    (
      '%x = f32[16,256]{1,0:T(8,128)} parameter(0)\n'
      '%u = f32[8,256]{1,0:T(8,128)S(1)} parameter(1)\n%i = s32[]{:S(6)} parameter(2)\n'
      'ROOT %y = f32[16,256]{1,0:T(8,128)S(1)} dynamic-update-slice(%x, %u, %i, %i)',
      (16384, 0),
    ),
    (
      '%x = f32[16,256]{1,0:T(8,128)S(1)} parameter(0)\n'
      '%u = f32[8,256]{1,0:T(8,128)} parameter(1)\n%i = s32[]{:S(6)} parameter(2)\n'
      'ROOT %y = f32[16,256]{1,0:T(8,128)} dynamic-update-slice(%x, %u, %i, %i)',
      (8192, 16384),
    ),
    # One array by two names.
    (
      f'{X}\n%z = f32[16,256]{{1,0}} bitcast(%x)\n'
      'ROOT %y = f32[16,256]{1,0:S(1)} add(%x, %z)',
      (16384, 0),
    ),
    # To the chip and back; the order within the tuple says nothing.
    (
      f'{X}\n%s = (f32[16,256]{{1,0:S(1)}}, f32[16,256]{{1,0}}, u32[]{{:S(2)}})'
      ' copy-start(%x)\nROOT %y = f32[16,256]{1,0:S(1)} copy-done(%s)',
      (16384, 0),
    ),
    (
      '%x = f32[16,256]{1,0:S(1)} parameter(0)\n'
      '%s = (f32[16,256]{1,0}, f32[16,256]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%x)\n'
      'ROOT %y = f32[16,256]{1,0} copy-done(%s)',
      (0, 16384),
    ),
    (
      f'{X}\n%s = ((f32[16,256]{{1,0}}), f32[4,256]{{1,0:S(1)}}, s32[]{{:S(2)}})'
      ' slice-start(%x), slice={[0:4], [0:256]}\n'
      'ROOT %y = f32[4,256]{1,0:S(1)} slice-done(%s)',
      (4096, 0),
    ),
    # Within HBM, both.
    (
      f'{X}\n%s = (f32[16,256]{{1,0}}, f32[16,256]{{1,0}}, u32[]{{:S(2)}})'
      ' copy-start(%x)\nROOT %y = f32[16,256]{1,0} copy-done(%s)',
      (16384, 16384),
    ),
    (
      f'{X}\n%u = f32[1,256]{{1,0:S(1)}} parameter(1)\n'
      '%i = s32[]{:S(6)} parameter(2)\n'
      '%s = ((f32[16,256]{1,0}), f32[16,256]{1,0}, s32[]{:S(2)})'
      ' dynamic-update-slice-start(%x, %u, %i, %i)\n'
      'ROOT %y = f32[16,256]{1,0} dynamic-update-slice-done(%s)',
      (0, 1024),
    ),
    # What is broadcast from nothing is only written; a tuple's arrays all are.
    ('ROOT %y = f32[16,256]{1,0} iota(), iota_dimension=0', (0, 16384)),
    (
      f'{X}\nROOT %y = (f32[16,256]{{1,0}}, s32[16,256]{{1,0:S(1)}}, s32[16]{{0}})'
      ' sort(%x), dimensions={1}, to_apply=%add',
      (16384, 16384 + 64),
    ),
  ],
)  # fmt: skip
def test_bytes(body, expected):
  assert moved(body) == expected


SLICED = """
%bits (b: f32[16,256]) -> f32[4096] {
  %b = f32[16,256]{1,0} parameter(0)
  ROOT %flat = f32[4096]{0} bitcast(%b)
}

%fused (p: f32[16,256], i: s32[]) -> f32[8] {
  %p = f32[16,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %inner = f32[4096]{0} fusion(%p), kind=kLoop, calls=%bits
  ROOT %taken = f32[8]{0} dynamic-slice(%inner, %i)
}
"""
UPDATED = """
%fused (p: f32[16,256], u: f32[1,256], i: s32[]) -> (f32[16,256], f32[1,256]) {
  %p = f32[16,256]{1,0} parameter(0)
  %u = f32[1,256]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %twice = f32[1,256]{1,0} add(%u, %u)
  %new = f32[16,256]{1,0} dynamic-update-slice(%p, %twice, %i, %i)
  ROOT %pair = (f32[16,256]{1,0}, f32[1,256]{1,0}) tuple(%new, %twice)
}
"""
WHOLE = """
%fused (p: f32[16,256], i: s32[]) -> f32[256] {
  %p = f32[16,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %taken = f32[1,256]{1,0} dynamic-slice(%p, %i, %i)
  %zero = f32[] constant(0)
  ROOT %sum = f32[256]{0} reduce(%p, %zero), dimensions={0}, to_apply=%add
}
"""

FILLED = """
%fused (u: f32[1,256], i: s32[]) -> f32[16,256] {
  %u = f32[1,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = f32[] constant(0)
  %zeros = f32[16,256]{1,0} broadcast(%zero), dimensions={}
  ROOT %new = f32[16,256]{1,0} dynamic-update-slice(%zeros, %u, %i, %i)
}
"""
READ_AFTER = """
%fused (p: f32[16,256], u: f32[1,256], i: s32[]) -> (f32[16,256], f32[256]) {
  %p = f32[16,256]{1,0} parameter(0)
  %u = f32[1,256]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %new = f32[16,256]{1,0} dynamic-update-slice(%p, %u, %i, %i)
  %zero = f32[] constant(0)
  %sum = f32[256]{0} reduce(%new, %zero), dimensions={0}, to_apply=%add
  ROOT %pair = (f32[16,256]{1,0}, f32[256]{0}) tuple(%new, %sum)
}
"""
RENAMED = """
%row (q: f32[16,256], j: s32[]) -> f32[256] {
  %j = s32[] parameter(1)
  %q = f32[16,256]{1,0} parameter(0)
  %wide = f32[16,256]{1,0} convert(%q)
  %one = f32[1,256]{1,0} dynamic-slice(%wide, %j, %j)
  ROOT %flat = f32[256]{0} bitcast(%one)
}

%fused (i: s32[], p: bf16[16,256]) -> f32[256] {
  %i = s32[] parameter(0)
  %p = bf16[16,256]{1,0} parameter(1)
  %one = f32[256]{0} fusion(%p, %i), kind=kLoop, calls=%row
  ROOT %other = f32[256]{0} negate(%one)
}
"""
LOOKED_UP = """
%fused (table: bf16[64,256], i: s32[3]) -> bf16[3,256] {
  %table = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[3]{0:T(128)} parameter(1)
  %checked = s32[3]{0} custom-call(%i), custom_call_target="AssumeGatherIndicesInBound"
  %taken = bf16[3,256]{1,0:T(8,128)(2,1)} gather(%table, %checked), offset_dims={1},
  ROOT %y = bf16[3,256]{1,0:T(8,128)(2,1)} reshape(%taken)
}
""".replace(
  'offset_dims={1},',
  'offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}, slice_sizes={1,256}',
)


@pytest.mark.parametrize(
  ('fused', 'body', 'expected'),
  [
    # 8 numbers of a parameter, through a fusion in the fusion that only renames it.
    (
      SLICED,
      f"""{X}
      %i = s32[]{{:S(6)}} parameter(1)
      ROOT %y = f32[8]{{0}} fusion(%x, %i), kind=kLoop, calls=%fused""",
      (32, 32),
    ),
    # One row in place, and that row once more as a second result.
    (
      UPDATED,
      f"""{X}
      %u = f32[1,256]{{1,0}} parameter(1)
      %i = s32[]{{:S(6)}} parameter(2)
      ROOT %y = (f32[16,256]{{1,0}}, f32[1,256]{{1,0:S(1)}}) fusion(%x, %u, %i),"""
      + ' kind=kLoop, calls=%fused',
      (1024, 1024),
    ),
    # What is sliced and read whole, is read whole.
    (
      WHOLE,
      f"""{X}
      %i = s32[]{{:S(6)}} parameter(1)
      ROOT %y = f32[256]{{0:S(1)}} fusion(%x, %i), kind=kInput, calls=%fused""",
      (16384, 0),
    ),
    # Not in place: all is written, there being nothing to change.
    (
      FILLED,
      """%u = f32[1,256]{1,0} parameter(0)
      %i = s32[]{:S(6)} parameter(1)
      ROOT %y = f32[16,256]{1,0} fusion(%u, %i), kind=kLoop, calls=%fused""",
      (1024, 16384),
    ),
    # In place, but what is in place is read as well.
    (
      READ_AFTER,
      f"""{X}
      %u = f32[1,256]{{1,0:S(1)}} parameter(1)
      %i = s32[]{{:S(6)}} parameter(2)
      ROOT %y = (f32[16,256]{{1,0}}, f32[256]{{0:S(1)}}) fusion(%x, %u, %i),"""
      + ' kind=kLoop, calls=%fused',
      (16384, 1024),
    ),
    # In place, and of what is in place one row is read.
    (
      READ_AFTER.replace(
        '%sum = f32[256]{0} reduce(%new, %zero), dimensions={0}, to_apply=%add',
        '%sum = f32[1,256]{1,0} dynamic-slice(%new, %i, %i)',
      ),
      f"""{X}
      %u = f32[1,256]{{1,0:S(1)}} parameter(1)
      %i = s32[]{{:S(6)}} parameter(2)
      ROOT %y = (f32[16,256]{{1,0}}, f32[256]{{0:S(1)}}) fusion(%x, %u, %i),"""
      + ' kind=kLoop, calls=%fused',
      (1024, 1024),
    ),
    # A row of bf16, although it is sliced as f32, and operands in another order.
    (
      RENAMED,
      """%x = bf16[16,256]{1,0} parameter(0)
      %i = s32[]{:S(6)} parameter(1)
      ROOT %y = f32[256]{0:S(1)} fusion(%i, %x), kind=kLoop, calls=%fused""",
      (512, 0),
    ),
    # Three words of an embedding table: 3 x 2 rows of 512 bytes.
    (
      LOOKED_UP,
      """%x = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
      %i = s32[3]{0:T(128)S(1)} parameter(1)
      ROOT %y = bf16[3,256]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %i), kind=kCustom,"""
      + ' calls=%fused',
      (3072, 0),
    ),
  ],
)
def test_fusions(fused, body, expected):
  lines = '\n'.join(line.strip() for line in body.split('\n'))
  assert moved(lines, fused) == expected


def test_what_is_started_and_never_done():
  body = f"""
  {X}
  ROOT %s = (f32[16,256]{{1,0:S(1)}}, f32[16,256]{{1,0}}, u32[]{{:S(2)}}) copy-start(%x)
  """
  with pytest.raises(ValueError, match='s is started in main, and never done'):
    moved(body)
