"""Parsing of compiled programs, against sizes worked out by hand."""

import pytest

from gqa_t5x.analysis import hlo


@pytest.mark.parametrize(
  ('text', 'size', 'nbytes', 'space'),
  [
    ('f32[]', 4, 4, 0),
    ('f32[3,5]{1,0}', 60, 60, 0),
    # One tile of 8 x 128.
    ('f32[3,5]{1,0:T(8,128)}', 60, 8 * 128 * 4, 0),
    # The fastest dimension is the first: 5 pads to 8, 3 to 128.
    ('f32[3,5]{0,1:T(8,128)S(1)}', 60, 8 * 128 * 4, 1),
    ('bf16[64,1,64,512]{3,2,0,1:T(8,128)(2,1)}', 4_194_304, 4_194_304, 0),
    # H = 64 pads to 128.
    ('bf16[64,1,512,64]{3,2,0,1:T(8,128)(2,1)}', 4_194_304, 8_388_608, 0),
    ('bf16[64,1,64,1]{3,2,0,1:T(8,128)(2,1)S(3)}', 8192, 64 * 64 * 128 * 2, 3),
    ('pred[64]{0:T(512)(128)(4,1)}', 64, 512, 0),
    ('s32[]{:T(128)}', 4, 512, 0),
    ('bf16[4096]{0:T(1024)(128)(2,1)}', 8192, 8192, 0),
    ('f32[<=10,2]{1,0}', 80, 80, 0),
    ('s4[16]{0}', 8, 8, 0),
    ('f8e4m3fn[16]{0}', 16, 16, 0),
    ('token[]', 0, 0, 0),
  ],
)
def test_shape(text, size, nbytes, space):
  (shape,) = hlo.parse_shapes(text)
  assert (shape.size, shape.nbytes, shape.space) == (size, nbytes, space)


def test_tuple_shape():
  text = '((s32[]{:T(128)}, /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)S(1)}), u32[])'
  assert [(s.dtype, s.dims, s.space) for s in hlo.parse_shapes(text)] == [
    ('s32', (), 0),
    ('bf16', (2, 3), 1),
    ('u32', (), 0),
  ]


PROGRAM = """HloModule jit_f, is_scheduled=true

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.2 = f32[] add(%x, %y)
}

ENTRY %main.3_spmd (p.0: f32[8], p.1: f32[4,8]) -> f32[8] {
  %p.1 = f32[4,8]{1,0} parameter(1)
  %p.0 = f32[8]{0} parameter(0), metadata={op_name="a, b={c}"}
  %zero = f32[] constant(0)
  %all-reduce.4 = f32[8]{0} all-reduce(%p.0), to_apply=%add.1
  %pair = (f32[8]{0}, f32[]) tuple(%all-reduce.4, %zero)
  ROOT %reduce.5 = f32[8]{0} reduce(%p.1, %zero), dimensions={0}, to_apply=%add.1
}
"""


def test_program():
  module = hlo.parse(PROGRAM)
  assert module.entry == 'main.3_spmd'
  assert list(module.computations) == ['add.1', 'main.3_spmd']
  entry = module.computations['main.3_spmd']
  assert list(entry.instructions) == [
    'p.1',
    'p.0',
    'zero',
    'all-reduce.4',
    'pair',
    'reduce.5',
  ]
  assert entry.root.name == 'reduce.5'
  assert {n: p.name for n, p in entry.parameters.items()} == {0: 'p.0', 1: 'p.1'}
  assert [user.name for user in entry.users['zero']] == ['pair', 'reduce.5']
  reduced = entry.instructions['all-reduce.4']
  assert (reduced.opcode, reduced.operands) == ('all-reduce', ('p.0',))
  assert reduced.attribute('to_apply') == 'add.1'
  assert reduced.attribute('dimensions') is None
  assert entry.instructions['zero'].literal == '0'


@pytest.mark.parametrize(
  'text', ['', 'an error message', '%f (x: f32[]) -> f32[] {\n}']
)
def test_no_program(text):
  with pytest.raises(ValueError, match='This is no HLO module'):
    hlo.parse(text)
