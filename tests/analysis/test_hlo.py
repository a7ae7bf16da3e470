"""Parsing of compiled programs, against sizes worked out by hand."""

import pytest

from gqa_t5x.analysis.hlo import parse


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
    # Each level is padded: 1100 to 2 tiles of 1024 half bytes.
    ('s4[1100]{0:T(1024)(128)(8,1)E(4)}', 550, 2 * 1024 // 2, 0),
    # Narrow types are packed only where the layout says so.
    ('s4[16]{0}', 16, 16, 0),
    # A tile of one row is padded to the two rows that the next level interleaves.
    ('bf16[3,100]{1,0:T(1,128)(2,1)}', 600, 3 * 2 * 128 * 2, 0),
    # A tile of more dimensions than the array has.
    ('bf16[5]{0:T(2,128)(2,1)S(1)}', 10, 512, 1),
    ('f8e4m3fn[16]{0}', 16, 16, 0),
    ('token[]', 0, 0, 0),
  ],
)
def test_shape(text, size, nbytes, space):
  (shape,) = parse.parse_shapes(text)
  assert (shape.size, shape.nbytes, shape.space) == (size, nbytes, space)


def test_tuple_shape():
  text = '((s32[]{:T(128)}, /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)S(1)}), u32[])'
  assert [(s.dtype, s.dims, s.space) for s in parse.parse_shapes(text)] == [
    ('s32', (), 0),
    ('bf16', (2, 3), 1),
    ('u32', (), 0),
  ]


@pytest.mark.parametrize(
  ('text', 'part', 'nbytes', 'in_rows', 'fills'),
  [
    # Of 4096 numbers in 32 tiles of 8 rows: one row, two rows in one, or all eight.
    ('bf16[32000,4096]{1,0:T(8,128)(2,1)}', (1, 4096), 65536, 2 * 8192, False),
    ('bf16[32000,4096]{1,0:T(8,128)(2,1)}', (8, 4096), 65536, 65536, True),
    ('f32[32000,4096]{1,0:T(8,128)}', (1, 4096), 131072, 16384, False),
    ('s8[32000,1024]{1,0:T(8,128)(4,1)}', (1, 1024), 8192, 4096, False),
    # The dimension that is cut is the fastest, as that of tokens in a cache.
    ('bf16[64,512]{1,0:T(8,128)(2,1)}', (64, 1), 8 * 2048, 32 * 512, False),
    ('bf16[64,512]{0,1:T(8,128)(2,1)}', (64, 8), 2048, 2048, True),
    # All of a dimension is full, whatever its size.
    ('f32[3,5]{1,0:T(8,128)}', (3, 5), 4096, 3 * 512, True),
    ('f32[3,5]{1,0}', (1, 5), 20, 20, True),
    ('f32[512]{0:T(256)}', (1,), 1024, 512, False),
  ],
)
def test_part(text, part, nbytes, in_rows, fills):
  (shape,) = parse.parse_shapes(text)
  assert shape.nbytes_of(part) == nbytes
  assert shape.in_rows().nbytes_of(part) == in_rows
  assert shape.fills_tiles(part) is fills


PROGRAM = """HloModule jit_f, is_scheduled=true, replica_count=2, num_partitions=4

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.2 = f32[] add(%x, %y)
}

ENTRY %main.3_spmd (p.0: f32[8], p.1: f32[4,8]) -> f32[8] {
  %p.1 = f32[4,8]{1,0} parameter(1)
  %p.0 = f32[8]{0} parameter(0), metadata={op_name="a, b={c}"}
  %zero = f32[] constant(0)
  %all-reduce.4 = f32[8]{0} all-reduce(%p.0), to_apply=%add.1, metadata={op_name="f/add"}, backend_config={"a":"b, dimensions={7}"}
  %pair = (f32[8]{0}, f32[]) tuple(%all-reduce.4, %zero)
  ROOT %reduce.5 = f32[8]{0} reduce(%p.1, %zero), dimensions={0}, to_apply=%add.1
}
"""  # noqa: E501


def test_program():
  module = parse.parse(PROGRAM)
  assert (module.entry, module.devices) == ('main.3_spmd', 8)
  assert list(module.computations) == ['add.1', 'main.3_spmd']
  entry = module.computations['main.3_spmd']
  names = ['p.1', 'p.0', 'zero', 'all-reduce.4', 'pair', 'reduce.5']
  assert list(entry.instructions) == names
  assert entry.root.name == 'reduce.5'
  assert {n: p.name for n, p in entry.parameters.items()} == {0: 'p.0', 1: 'p.1'}
  assert [user.name for user in entry.users['zero']] == ['pair', 'reduce.5']
  reduced = entry.instructions['all-reduce.4']
  assert (reduced.opcode, reduced.operands) == ('all-reduce', ('p.0',))
  assert reduced.attribute('to_apply') == 'add.1'
  assert reduced.attribute('dimensions') is None
  assert reduced.aside.startswith(', metadata={')
  assert entry.root.numbers('dimensions') == (0,)
  assert entry.instructions['zero'].literal == '0'


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', 'This is no HLO module'),
    ('an error message', 'This is no HLO module'),
    ('%f (x: f32[]) -> f32[] {\n}', 'This is no HLO module'),
    (
      'ENTRY %main () -> (f32[]) {\n  ROOT %pair = (f32[]) tuple(%x\n}',
      'no closing parenthesis in',
    ),
  ],
)
def test_no_program(text, message):
  with pytest.raises(ValueError, match=message):
    parse.parse(text)
