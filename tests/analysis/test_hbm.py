"""Bytes that instructions move in HBM, against numbers worked out by hand.

Layouts: no tile where none is needed; S(1) and S(3) are memories on the chip, S(6) one
of scalars. f32[16,256] has 16384 bytes.
"""

import pytest

from helpers.hlo_programs import moved

ONE_BY_ONE = {
  'an operand and a result': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    ROOT %y = f32[16,256]{1,0} negate(%x)
    """,
    (16384, 16384),
  ),
  'a result on the chip': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    ROOT %y = f32[16,256]{1,0:S(1)} negate(%x)
    """,
    (16384, 0),
  ),
  'an operand that is used twice is read once': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    ROOT %y = f32[16,256]{1,0} add(%x, %x)
    """,
    (16384, 16384),
  ),
  'one array by two names is read once': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    %z = f32[16,256]{1,0} bitcast(%x)
    ROOT %y = f32[16,256]{1,0:S(1)} add(%x, %z)
    """,
    (16384, 0),
  ),
  'padding counts: 3 x 5 in a tile of 8 x 128': (
    """
    %x = f32[3,5]{1,0:T(8,128)} parameter(0)
    ROOT %y = f32[3,5]{1,0:T(8,128)S(3)} negate(%x)
    """,
    (4096, 0),
  ),
  'nothing is read to make numbers': (
    'ROOT %y = f32[16,256]{1,0} iota(), iota_dimension=0',
    (0, 16384),
  ),
  'all results in HBM are written': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    ROOT %y = (f32[16,256]{1,0}, s32[16,256]{1,0:S(1)}, s32[16]{0}) sort(%x), to_apply=%add
    """,  # noqa: E501
    (16384, 16384 + 64),
  ),
  'another shape': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    ROOT %y = f32[4096]{0} bitcast(%x)
    """,
    (0, 0),
  ),
  'a tuple': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    ROOT %y = (f32[16,256]{1,0}) tuple(%x)
    """,
    (0, 0),
  ),
  'a custom call that gives a name': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    ROOT %y = f32[32,256]{1,0:S(3)} custom-call(%x, %x), custom_call_target="ConcatBitcast"
    """,  # noqa: E501
    (0, 0),
  ),
}
PARTS = {
  'a slice': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    ROOT %y = f32[2,256]{1,0:S(1)} slice(%x), slice={[0:2], [0:256]}
    """,
    (2048, 0),
  ),
  'a dynamic slice': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    %i = s32[]{:S(6)} parameter(1)
    ROOT %y = f32[1,256]{1,0} dynamic-slice(%x, %i, %i)
    """,
    (1024, 1024),
  ),
  'a part of a tile reads the whole tile': (
    """
    %x = f32[16,256]{1,0:T(8,128)} parameter(0)
    ROOT %y = f32[1,256]{1,0:T(1,128)S(1)} slice(%x), slice={[3:4], [0:256]}
    """,
    (8192, 0),
  ),
  'a gather reads rows of 512 bytes: of 3 x 256 numbers, 3 x 2 rows': (
    """
    %x = f32[64,256]{1,0:T(8,128)} parameter(0)
    %i = s32[3]{0:T(128)S(1)} parameter(1)
    ROOT %y = f32[3,256]{1,0:T(8,128)S(1)} gather(%x, %i), offset_dims={1}, slice_sizes={1,256}
    """,  # noqa: E501
    (3 * 2 * 512, 0),
  ),
  'two rows of bf16 lie in one': (
    """
    %x = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
    %i = s32[3]{0:T(128)S(1)} parameter(1)
    ROOT %y = bf16[3,256]{1,0:T(8,128)(2,1)S(1)} gather(%x, %i), offset_dims={1}, slice_sizes={1,256}
    """,  # noqa: E501
    (3 * 2 * 512, 0),
  ),
  'a gather reads no more than there is': (
    """
    %x = f32[8,128]{1,0:T(8,128)} parameter(0)
    %i = s32[99]{0:T(128)S(1)} parameter(1)
    ROOT %y = f32[99,128]{1,0:T(8,128)S(1)} gather(%x, %i), offset_dims={1}, slice_sizes={1,128}
    """,  # noqa: E501
    (4096, 0),
  ),
}
IN_PLACE = {
  'a whole row of tiles is written': (
    """
    %x = f32[16,256]{1,0:T(8,128)} parameter(0)
    %u = f32[8,256]{1,0:T(8,128)S(1)} parameter(1)
    %i = s32[]{:S(6)} parameter(2)
    ROOT %y = f32[16,256]{1,0:T(8,128)} dynamic-update-slice(%x, %u, %i, %i)
    """,
    (0, 8192),
  ),
  'a part of a tile is read as well': (
    """
    %x = f32[16,256]{1,0:T(8,128)} parameter(0)
    %u = f32[16,1]{1,0:T(8,128)S(1)} parameter(1)
    %i = s32[]{:S(6)} parameter(2)
    ROOT %y = f32[16,256]{1,0:T(8,128)} dynamic-update-slice(%x, %u, %i, %i)
    """,
    (8192, 8192),
  ),
  'all of it on the chip': (
    """
    %x = f32[16,256]{1,0:T(8,128)S(3)} parameter(0)
    %u = f32[16,1]{1,0:T(8,128)S(3)} parameter(1)
    %i = s32[]{:S(6)} parameter(2)
    ROOT %y = f32[16,256]{1,0:T(8,128)S(3)} dynamic-update-slice(%x, %u, %i, %i)
    """,
    (0, 0),
  ),
  'not in place: from HBM to the chip': (
    """
    %x = f32[16,256]{1,0:T(8,128)} parameter(0)
    %u = f32[8,256]{1,0:T(8,128)S(1)} parameter(1)
    %i = s32[]{:S(6)} parameter(2)
    ROOT %y = f32[16,256]{1,0:T(8,128)S(1)} dynamic-update-slice(%x, %u, %i, %i)
    """,
    (16384, 0),
  ),
  'not in place: from the chip to HBM': (
    """
    %x = f32[16,256]{1,0:T(8,128)S(1)} parameter(0)
    %u = f32[8,256]{1,0:T(8,128)} parameter(1)
    %i = s32[]{:S(6)} parameter(2)
    ROOT %y = f32[16,256]{1,0:T(8,128)} dynamic-update-slice(%x, %u, %i, %i)
    """,
    (8192, 16384),
  ),
  'a scatter adds to 3 rows of 2 x 512 bytes': (
    """
    %x = f32[64,256]{1,0:T(8,128)} parameter(0)
    %i = s32[3]{0:T(128)S(1)} parameter(1)
    %u = f32[3,256]{1,0:T(8,128)S(1)} parameter(2)
    ROOT %y = f32[64,256]{1,0:T(8,128)} scatter(%x, %i, %u), update_window_dims={1}, inserted_window_dims={0}, to_apply=%add
    """,  # noqa: E501
    (3 * 2 * 512, 3 * 2 * 512),
  ),
}
# The order within the tuple of a start says nothing.
ASYNCHRONOUS = {
  'a copy to the chip': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    %s = (f32[16,256]{1,0:S(1)}, f32[16,256]{1,0}, u32[]{:S(2)}) copy-start(%x)
    ROOT %y = f32[16,256]{1,0:S(1)} copy-done(%s)
    """,
    (16384, 0),
  ),
  'a copy from the chip': (
    """
    %x = f32[16,256]{1,0:S(1)} parameter(0)
    %s = (f32[16,256]{1,0}, f32[16,256]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%x)
    ROOT %y = f32[16,256]{1,0} copy-done(%s)
    """,
    (0, 16384),
  ),
  'a copy within HBM': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    %s = (f32[16,256]{1,0}, f32[16,256]{1,0}, u32[]{:S(2)}) copy-start(%x)
    ROOT %y = f32[16,256]{1,0} copy-done(%s)
    """,
    (16384, 16384),
  ),
  'a slice': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    %s = ((f32[16,256]{1,0}), f32[4,256]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:4], [0:256]}
    ROOT %y = f32[4,256]{1,0:S(1)} slice-done(%s)
    """,  # noqa: E501
    (4096, 0),
  ),
  'an update in place': (
    """
    %x = f32[16,256]{1,0} parameter(0)
    %u = f32[1,256]{1,0:S(1)} parameter(1)
    %i = s32[]{:S(6)} parameter(2)
    %s = ((f32[16,256]{1,0}), f32[16,256]{1,0}, s32[]{:S(2)}) dynamic-update-slice-start(%x, %u, %i, %i)
    ROOT %y = f32[16,256]{1,0} dynamic-update-slice-done(%s)
    """,  # noqa: E501
    (0, 1024),
  ),
}


def by_name(*tables):
  return [pytest.param(*case, id=name) for t in tables for name, case in t.items()]


@pytest.mark.parametrize(
  ('entry', 'expected'), by_name(ONE_BY_ONE, PARTS, IN_PLACE, ASYNCHRONOUS)
)
def test_bytes(entry, expected):
  assert moved(entry) == expected


FUSIONS = {
  '8 numbers of a parameter, which a fusion in the fusion renames': (
    """
    %renamed (b: f32[16,256]) -> f32[4096] {
      %b = f32[16,256]{1,0} parameter(0)
      ROOT %flat = f32[4096]{0} bitcast(%b)
    }
    %fused (p: f32[16,256], i: s32[]) -> f32[8] {
      %p = f32[16,256]{1,0} parameter(0)
      %i = s32[] parameter(1)
      %inner = f32[4096]{0} fusion(%p), kind=kLoop, calls=%renamed
      ROOT %taken = f32[8]{0} dynamic-slice(%inner, %i)
    }
    """,
    """
    %x = f32[16,256]{1,0} parameter(0)
    %i = s32[]{:S(6)} parameter(1)
    ROOT %y = f32[8]{0} fusion(%x, %i), kind=kLoop, calls=%fused
    """,
    (32, 32),
  ),
  'one row in place, and that row as a second result': (
    """
    %fused (p: f32[16,256], u: f32[1,256], i: s32[]) -> (f32[16,256], f32[1,256]) {
      %p = f32[16,256]{1,0} parameter(0)
      %u = f32[1,256]{1,0} parameter(1)
      %i = s32[] parameter(2)
      %twice = f32[1,256]{1,0} add(%u, %u)
      %new = f32[16,256]{1,0} dynamic-update-slice(%p, %twice, %i, %i)
      ROOT %pair = (f32[16,256]{1,0}, f32[1,256]{1,0}) tuple(%new, %twice)
    }
    """,
    """
    %x = f32[16,256]{1,0} parameter(0)
    %u = f32[1,256]{1,0} parameter(1)
    %i = s32[]{:S(6)} parameter(2)
    ROOT %y = (f32[16,256]{1,0}, f32[1,256]{1,0:S(1)}) fusion(%x, %u, %i), calls=%fused
    """,
    (1024, 1024),
  ),
  'what is sliced and read whole is read whole': (
    """
    %fused (p: f32[16,256], i: s32[]) -> f32[256] {
      %p = f32[16,256]{1,0} parameter(0)
      %i = s32[] parameter(1)
      %taken = f32[1,256]{1,0} dynamic-slice(%p, %i, %i)
      %zero = f32[] constant(0)
      ROOT %sum = f32[256]{0} reduce(%p, %zero), dimensions={0}, to_apply=%add
    }
    """,
    """
    %x = f32[16,256]{1,0} parameter(0)
    %i = s32[]{:S(6)} parameter(1)
    ROOT %y = f32[256]{0:S(1)} fusion(%x, %i), kind=kInput, calls=%fused
    """,
    (16384, 0),
  ),
  'no array is there to be changed in place: all is written': (
    """
    %fused (u: f32[1,256], i: s32[]) -> f32[16,256] {
      %u = f32[1,256]{1,0} parameter(0)
      %i = s32[] parameter(1)
      %zero = f32[] constant(0)
      %zeros = f32[16,256]{1,0} broadcast(%zero), dimensions={}
      ROOT %new = f32[16,256]{1,0} dynamic-update-slice(%zeros, %u, %i, %i)
    }
    """,
    """
    %u = f32[1,256]{1,0} parameter(0)
    %i = s32[]{:S(6)} parameter(1)
    ROOT %y = f32[16,256]{1,0} fusion(%u, %i), kind=kLoop, calls=%fused
    """,
    (1024, 16384),
  ),
  'changed in place, and then read whole': (
    """
    %fused (p: f32[16,256], u: f32[1,256], i: s32[]) -> (f32[16,256], f32[256]) {
      %p = f32[16,256]{1,0} parameter(0)
      %u = f32[1,256]{1,0} parameter(1)
      %i = s32[] parameter(2)
      %new = f32[16,256]{1,0} dynamic-update-slice(%p, %u, %i, %i)
      %zero = f32[] constant(0)
      %sum = f32[256]{0} reduce(%new, %zero), dimensions={0}, to_apply=%add
      ROOT %pair = (f32[16,256]{1,0}, f32[256]{0}) tuple(%new, %sum)
    }
    """,
    """
    %x = f32[16,256]{1,0} parameter(0)
    %u = f32[1,256]{1,0:S(1)} parameter(1)
    %i = s32[]{:S(6)} parameter(2)
    ROOT %y = (f32[16,256]{1,0}, f32[256]{0:S(1)}) fusion(%x, %u, %i), calls=%fused
    """,
    (16384, 1024),
  ),
  'changed in place, and one row of it is read': (
    """
    %fused (p: f32[16,256], u: f32[1,256], i: s32[]) -> (f32[16,256], f32[1,256]) {
      %p = f32[16,256]{1,0} parameter(0)
      %u = f32[1,256]{1,0} parameter(1)
      %i = s32[] parameter(2)
      %new = f32[16,256]{1,0} dynamic-update-slice(%p, %u, %i, %i)
      %row = f32[1,256]{1,0} dynamic-slice(%new, %i, %i)
      ROOT %pair = (f32[16,256]{1,0}, f32[1,256]{1,0}) tuple(%new, %row)
    }
    """,
    """
    %x = f32[16,256]{1,0} parameter(0)
    %u = f32[1,256]{1,0:S(1)} parameter(1)
    %i = s32[]{:S(6)} parameter(2)
    ROOT %y = (f32[16,256]{1,0}, f32[1,256]{1,0:S(1)}) fusion(%x, %u, %i), calls=%fused
    """,
    (1024, 1024),
  ),
  'a row of bf16 that is sliced as f32, operands in another order': (
    """
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
    """,
    """
    %x = bf16[16,256]{1,0} parameter(0)
    %i = s32[]{:S(6)} parameter(1)
    ROOT %y = f32[256]{0:S(1)} fusion(%i, %x), kind=kLoop, calls=%fused
    """,
    (512, 0),
  ),
  'three words of an embedding table: 3 x 2 rows of 512 bytes': (
    """
    %fused (table: bf16[64,256], i: s32[3]) -> bf16[3,256] {
      %table = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
      %i = s32[3]{0:T(128)} parameter(1)
      %ids = s32[3]{0} custom-call(%i), custom_call_target="AssumeGatherIndicesInBound"
      %taken = bf16[3,256]{1,0:T(8,128)(2,1)} gather(%table, %ids), offset_dims={1}, slice_sizes={1,256}
      ROOT %y = bf16[3,256]{1,0:T(8,128)(2,1)} reshape(%taken)
    }
    """,  # noqa: E501
    """
    %x = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
    %i = s32[3]{0:T(128)S(1)} parameter(1)
    ROOT %y = bf16[3,256]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %i), calls=%fused
    """,
    (3072, 0),
  ),
}


@pytest.mark.parametrize(('computations', 'entry', 'expected'), by_name(FUSIONS))
def test_fusions(computations, entry, expected):
  assert moved(entry, computations) == expected


def test_what_is_started_and_never_done():
  entry = """
  %x = f32[16,256]{1,0} parameter(0)
  ROOT %s = (f32[16,256]{1,0:S(1)}, f32[16,256]{1,0}, u32[]{:S(2)}) copy-start(%x)
  """
  with pytest.raises(ValueError, match='s is started in main, and never done'):
    moved(entry)
