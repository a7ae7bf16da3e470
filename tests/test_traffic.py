"""What compiled programs move and compute, against numbers worked out by hand."""

import textwrap

import pytest

from gqa_t5x.analysis import hlo, traffic

ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def program(body, more=''):
  """A module whose entry has the given lines."""
  lines = textwrap.indent(textwrap.dedent(body).strip(), '  ')
  return hlo.parse(
    f'HloModule test\n{ADD}\n{textwrap.dedent(more)}\n'
    f'ENTRY %main () -> f32[] {{\n{lines}\n}}\n'
  )


def moved(body, more='', **kwargs):
  """Returns (bytes read, bytes written) of a program."""
  counted = traffic.count(program(body, more), **kwargs)
  return counted.read_bytes, counted.written_bytes


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
      ROOT %y = (f32[16,256]{{1,0}}, f32[1,256]{{1,0:S(1)}}) fusion(%x, %u, %i),
      """.rstrip()
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
  ],
)
def test_fusions(fused, body, expected):
  lines = '\n'.join(line.strip() for line in body.split('\n'))
  assert moved(lines, fused) == expected


LOOP = """
%body (s: (s32[], f32[256])) -> (s32[], f32[256]) {{
  %s = (s32[], f32[256]{{0}}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %v = f32[256]{{0}} get-tuple-element(%s), index=1
  %w = f32[256]{{0:S(1)}} negate(%v)
  ROOT %t = (s32[], f32[256]{{0}}) tuple(%n, %w)
}}

%condition (c: (s32[], f32[256])) -> pred[] {{
  %c = (s32[], f32[256]{{0}}) parameter(0)
  %i = s32[]{{:S(6)}} get-tuple-element(%c), index=0
  %end = s32[]{{:S(6)}} {end}
  ROOT %less = pred[]{{:S(6)}} compare(%i, %end), direction=LT
}}
"""
WHILE = """
%s = (s32[], f32[256]{0}) parameter(0)
ROOT %w = (s32[], f32[256]{0}) while(%s), condition=%condition, body=%body
"""


def test_loops():
  seven = LOOP.format(end='constant(7)')
  assert moved(WHILE, seven) == (7 * 1024, 0)
  assert moved(WHILE, seven, trips={'body': 2}) == (2 * 1024, 0)
  unknown = LOOP.format(end='get-tuple-element(%c), index=0')
  assert moved(WHILE, unknown, trips={'body': 3}) == (3 * 1024, 0)
  with pytest.raises(ValueError, match='Loop w may stop early; say how often body'):
    moved(WHILE, unknown)
  assert traffic.main_loop(program(WHILE, unknown)) == 'body'
  with pytest.raises(ValueError, match='0 loops of the program may stop early'):
    traffic.main_loop(program(WHILE, seven))


def test_a_conditional_counts_its_costlier_branch():
  branches = """
  %small (p: f32[16,256]) -> f32[] {
    %p = f32[16,256]{1,0} parameter(0)
    ROOT %zero = f32[]{:S(6)} constant(0)
  }
  %large (q: f32[16,256]) -> f32[] {
    %q = f32[16,256]{1,0} parameter(0)
    %zero = f32[]{:S(6)} constant(0)
    ROOT %sum = f32[]{:S(6)} reduce(%q, %zero), dimensions={0,1}, to_apply=%add
  }
  """
  body = (
    f"""{X}
  %i = s32[]{{:S(6)}} parameter(1)
  ROOT %y = f32[]{{:S(6)}} conditional(%i, %x, %x),
  """.rstrip()
    + ' branch_computations={%small, %large}'
  )
  lines = '\n'.join(line.strip() for line in body.split('\n'))
  assert moved(lines, textwrap.dedent(branches)) == (16384, 0)


# 4096 numbers of 4 bytes in, among 4 devices.
IN = '%x = f32[4096]{0} parameter(0)'


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    ('all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}', 3 * 16384),
    ('reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add', 12288),
    ('all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add', 24576),
    ('all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add', 24576),
    ('all-reduce(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add', 24576),
    ("all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add", 24576),
    (
      "all-reduce(%x), replica_groups=mesh['a'=2,'b'=2] {'a','b'}, to_apply=%add",
      24576,
    ),
    ('all-to-all(%x), replica_groups={{0,1,2,3}}, dimensions={0}', 12288),
    ('collective-permute(%x), source_target_pairs={{0,1},{1,0}}', 16384),
  ],
)
def test_collectives(line, expected):
  kind = line.partition('(')[0]
  counted = traffic.count(program(f'{IN}\nROOT %y = f32[4096]{{0}} {line}'))
  assert counted.collectives == {kind: expected}
  asynchronous = line.replace(kind, f'{kind}-start', 1)
  started = f"""
  {IN}
  %s = (f32[4096]{{0}}, f32[4096]{{0}}) {asynchronous}
  ROOT %y = f32[4096]{{0}} {kind}-done(%s)
  """
  assert traffic.count(program(started)) == counted


def test_a_sum_of_which_a_part_is_kept_is_a_reduce_scatter():
  fused = """
  %all-reduce-scatter.1 (p: f32[4096]) -> f32[1024] {
    %p = f32[4096]{0} parameter(0)
    %sum = f32[4096]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
    %i = s32[] constant(0)
    ROOT %part = f32[1024]{0} dynamic-slice(%sum, %i)
  }
  """
  body = f"""
  {IN}
  ROOT %y = f32[1024]{{0}} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  """
  counted = traffic.count(program(body, fused))
  assert counted.collectives == {'reduce-scatter': 12288}
  assert (counted.read_bytes, counted.written_bytes) == (16384, 4096)


@pytest.mark.parametrize(
  ('left', 'right', 'out', 'options', 'expected'),
  [
    # 3 x 5 by 5 x 7.
    ('[3,5]', '[5,7]', '[3,7]', 'dim_labels=bf_io->bf', 2 * 3 * 5 * 7),
    ('[3,5]', '[7,5]', '[3,7]', 'dim_labels=bf_oi->bf', 2 * 3 * 5 * 7),
    # A batch of 4 such products, as TPU programs write them: its positions are those of
    # a window as large as the batch, of which one each is within the array.
    (
      '[4,3,5]',
      '[4,5,7]',
      '[4,3,7]',
      'window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf',
      2 * 4 * 3 * 5 * 7,
    ),
    # An ordinary convolution over 6 positions by 3, padded by 1: 2 + 4 * 3 + 2 meet.
    (
      '[2,6,5]',
      '[3,5,7]',
      '[2,6,7]',
      'window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f',
      2 * 2 * 5 * 7 * 16,
    ),
  ],
)
def test_flops(left, right, out, options, expected):
  body = f"""
  %x = f32{left} parameter(0)
  %y = f32{right} parameter(1)
  ROOT %z = f32{out} convolution(%x, %y), {options}
  """
  assert traffic.count(program(body)).flops == expected


def test_flops_of_a_dot():
  body = """
  %x = f32[4,3,5] parameter(0)
  %y = f32[4,5,7] parameter(1)
  ROOT %z = f32[4,3,7] dot(%x, %y), lhs_batch_dims={0}, lhs_contracting_dims={2}
  """
  assert traffic.count(program(body)).flops == 2 * 4 * 3 * 5 * 7


def test_the_costliest_instructions():
  body = f"""
  {X}
  %a = f32[16,256]{{1,0:S(1)}} negate(%x)
  ROOT %b = f32[16,256]{{1,0}} negate(%x)
  """
  found = traffic.by_instruction(program(body), 'main')
  assert [(t.hbm_bytes, i.name) for t, i in found] == [
    (32768, 'b'),
    (16384, 'a'),
    (0, 'x'),
  ]
