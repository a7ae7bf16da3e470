# ruff: noqa: E501
"""Bytes that instructions move in HBM, against numbers worked out by hand.

Layouts: no tile where none is needed; S(1) and S(3) are memories on the chip, S(6) one
of scalars.
"""

import pytest

from helpers.hlo_programs import moved

X = 'f32[16,256]'  # 16384 bytes
TILED = 'f32[16,256]{1,0:T(8,128)}'
SCALAR = 's32[]{:S(6)}'


def entry(operands, *lines):
  """The lines of a program: its parameters by name and type, and what they are for."""
  numbered = enumerate(operands.items())
  parameters = [f'%{name} = {kind} parameter({n})' for n, (name, kind) in numbered]
  *others, root = lines
  return '\n'.join([*parameters, *others, f'ROOT {root}'])


def computation(name, operands, *lines):
  """What a fusion calls."""
  return f'%{name} () -> () {{\n{entry(operands, *lines)}\n}}\n'


@pytest.mark.parametrize(
  ('operands', 'lines', 'expected'),
  [
    # Whole arrays.
    pytest.param(
      dict(x=X),
      '%y = f32[16,256] negate(%x)',
      (16384, 16384),
      id='an operand and a result',
    ),
    pytest.param(
      dict(x=X),
      '%y = f32[16,256]{1,0:S(1)} negate(%x)',
      (16384, 0),
      id='a result on the chip',
    ),
    pytest.param(
      dict(x=X),
      '%y = f32[16,256] add(%x, %x)',
      (16384, 16384),
      id='an operand that is used twice is read once',
    ),
    pytest.param(
      dict(x=X),
      ('%z = f32[16,256] bitcast(%x)', '%y = f32[16,256]{1,0:S(1)} add(%x, %z)'),
      (16384, 0),
      id='one array by two names is read once',
    ),
    pytest.param(
      dict(x='f32[3,5]{1,0:T(8,128)}'),
      '%y = f32[3,5]{1,0:T(8,128)S(3)} negate(%x)',
      (4096, 0),
      id='padding counts: 3 x 5 in a tile of 8 x 128',
    ),
    pytest.param(
      dict(),
      '%y = f32[16,256] iota(), iota_dimension=0',
      (0, 16384),
      id='nothing is read to make numbers',
    ),
    pytest.param(
      dict(x=X),
      '%y = (f32[16,256], s32[16,256]{1,0:S(1)}, s32[16]) sort(%x), to_apply=%add',
      (16384, 16448),
      id='all results in HBM are written',
    ),
    pytest.param(dict(x=X), '%y = f32[4096] bitcast(%x)', (0, 0), id='another shape'),
    pytest.param(dict(x=X), '%y = (f32[16,256]) tuple(%x)', (0, 0), id='a tuple'),
    pytest.param(
      dict(x=X),
      '%y = f32[32,256]{1,0:S(3)} custom-call(%x, %x), custom_call_target="ConcatBitcast"',
      (0, 0),
      id='a custom call that gives a name',
    ),
    # Parts of arrays.
    pytest.param(
      dict(x=X),
      '%y = f32[2,256]{1,0:S(1)} slice(%x), slice={[0:2], [0:256]}',
      (2048, 0),
      id='a slice',
    ),
    pytest.param(
      dict(x=X, i=SCALAR),
      '%y = f32[1,256] dynamic-slice(%x, %i, %i)',
      (1024, 1024),
      id='a dynamic slice',
    ),
    pytest.param(
      dict(x=TILED),
      '%y = f32[1,256]{1,0:T(1,128)S(1)} slice(%x), slice={[3:4], [0:256]}',
      (8192, 0),
      id='a part of a tile reads the whole tile',
    ),
    pytest.param(
      dict(x='f32[64,256]{1,0:T(8,128)}', i='s32[3]{0:T(128)S(1)}'),
      '%y = f32[3,256]{1,0:T(8,128)S(1)} gather(%x, %i), offset_dims={1}, slice_sizes={1,256}',
      (3072, 0),
      id='a gather reads rows of 512 bytes: of 3 x 256 numbers, 3 x 2 rows',
    ),
    pytest.param(
      dict(x='bf16[64,256]{1,0:T(8,128)(2,1)}', i='s32[3]{0:T(128)S(1)}'),
      '%y = bf16[3,256]{1,0:T(8,128)(2,1)S(1)} gather(%x, %i), offset_dims={1}, slice_sizes={1,256}',
      (3072, 0),
      id='two rows of bf16 lie in one',
    ),
    pytest.param(
      dict(x='f32[8,128]{1,0:T(8,128)}', i='s32[99]{0:T(128)S(1)}'),
      '%y = f32[99,128]{1,0:T(8,128)S(1)} gather(%x, %i), offset_dims={1}, slice_sizes={1,128}',
      (4096, 0),
      id='a gather reads no more than there is',
    ),
    # Changes, in place where HBM has the array before and after.
    pytest.param(
      dict(x=TILED, u='f32[8,256]{1,0:T(8,128)S(1)}', i=SCALAR),
      '%y = f32[16,256]{1,0:T(8,128)} dynamic-update-slice(%x, %u, %i, %i)',
      (0, 8192),
      id='a whole row of tiles is written',
    ),
    pytest.param(
      dict(x=TILED, u='f32[16,1]{1,0:T(8,128)S(1)}', i=SCALAR),
      '%y = f32[16,256]{1,0:T(8,128)} dynamic-update-slice(%x, %u, %i, %i)',
      (8192, 8192),
      id='a part of a tile is read as well',
    ),
    pytest.param(
      dict(
        x='f32[16,256]{1,0:T(8,128)S(3)}', u='f32[16,1]{1,0:T(8,128)S(3)}', i=SCALAR
      ),
      '%y = f32[16,256]{1,0:T(8,128)S(3)} dynamic-update-slice(%x, %u, %i, %i)',
      (0, 0),
      id='all of it on the chip',
    ),
    pytest.param(
      dict(x=TILED, u='f32[8,256]{1,0:T(8,128)S(1)}', i=SCALAR),
      '%y = f32[16,256]{1,0:T(8,128)S(1)} dynamic-update-slice(%x, %u, %i, %i)',
      (16384, 0),
      id='not in place: from HBM to the chip',
    ),
    pytest.param(
      dict(x='f32[16,256]{1,0:T(8,128)S(1)}', u='f32[8,256]{1,0:T(8,128)}', i=SCALAR),
      '%y = f32[16,256]{1,0:T(8,128)} dynamic-update-slice(%x, %u, %i, %i)',
      (8192, 16384),
      id='not in place: from the chip to HBM',
    ),
    pytest.param(
      dict(
        x='f32[64,256]{1,0:T(8,128)}',
        i='s32[3]{0:T(128)S(1)}',
        u='f32[3,256]{1,0:T(8,128)S(1)}',
      ),
      '%y = f32[64,256]{1,0:T(8,128)} scatter(%x, %i, %u), update_window_dims={1}, inserted_window_dims={0}, to_apply=%add',
      (3072, 3072),
      id='a scatter adds to 3 rows of 2 x 512 bytes',
    ),
    # What is started and done later; the order within the tuple of a start says nothing.
    pytest.param(
      dict(x=X),
      (
        '%s = (f32[16,256]{1,0:S(1)}, f32[16,256], u32[]{:S(2)}) copy-start(%x)',
        '%y = f32[16,256]{1,0:S(1)} copy-done(%s)',
      ),
      (16384, 0),
      id='a copy to the chip',
    ),
    pytest.param(
      dict(x='f32[16,256]{1,0:S(1)}'),
      (
        '%s = (f32[16,256], f32[16,256]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%x)',
        '%y = f32[16,256] copy-done(%s)',
      ),
      (0, 16384),
      id='a copy from the chip',
    ),
    pytest.param(
      dict(x=X),
      (
        '%s = (f32[16,256], f32[16,256], u32[]{:S(2)}) copy-start(%x)',
        '%y = f32[16,256] copy-done(%s)',
      ),
      (16384, 16384),
      id='a copy within HBM',
    ),
    pytest.param(
      dict(x=X),
      (
        '%s = ((f32[16,256]), f32[4,256]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:4], [0:256]}',
        '%y = f32[4,256]{1,0:S(1)} slice-done(%s)',
      ),
      (4096, 0),
      id='a slice',
    ),
    pytest.param(
      dict(x=X, u='f32[1,256]{1,0:S(1)}', i=SCALAR),
      (
        '%s = ((f32[16,256]), f32[16,256], s32[]{:S(2)}) dynamic-update-slice-start(%x, %u, %i, %i)',
        '%y = f32[16,256] dynamic-update-slice-done(%s)',
      ),
      (0, 1024),
      id='an update in place',
    ),
  ],
)
def test_bytes(operands, lines, expected):
  lines = [lines] if isinstance(lines, str) else lines
  assert moved(entry(operands, *lines)) == expected


@pytest.mark.parametrize(
  ('computations', 'operands', 'line', 'expected'),
  [
    pytest.param(
      computation('renamed', dict(b=X), '%flat = f32[4096] bitcast(%b)')
      + computation(
        'fused',
        dict(p=X, i='s32[]'),
        '%inner = f32[4096] fusion(%p), kind=kLoop, calls=%renamed',
        '%taken = f32[8] dynamic-slice(%inner, %i)',
      ),
      dict(x=X, i=SCALAR),
      '%y = f32[8] fusion(%x, %i), kind=kLoop, calls=%fused',
      (32, 32),
      id='8 numbers of a parameter, which a fusion in the fusion renames',
    ),
    pytest.param(
      computation(
        'fused',
        dict(p=X, u='f32[1,256]', i='s32[]'),
        '%twice = f32[1,256] add(%u, %u)',
        '%new = f32[16,256] dynamic-update-slice(%p, %twice, %i, %i)',
        '%pair = (f32[16,256], f32[1,256]) tuple(%new, %twice)',
      ),
      dict(x=X, u='f32[1,256]', i=SCALAR),
      '%y = (f32[16,256], f32[1,256]{1,0:S(1)}) fusion(%x, %u, %i), calls=%fused',
      (1024, 1024),
      id='one row in place, and that row as a second result',
    ),
    pytest.param(
      computation(
        'fused',
        dict(p=X, i='s32[]'),
        '%taken = f32[1,256] dynamic-slice(%p, %i, %i)',
        '%zero = f32[] constant(0)',
        '%sum = f32[256] reduce(%p, %zero), dimensions={0}, to_apply=%add',
      ),
      dict(x=X, i=SCALAR),
      '%y = f32[256]{0:S(1)} fusion(%x, %i), kind=kInput, calls=%fused',
      (16384, 0),
      id='what is sliced and read whole is read whole',
    ),
    pytest.param(
      computation(
        'fused',
        dict(u='f32[1,256]', i='s32[]'),
        '%zero = f32[] constant(0)',
        '%zeros = f32[16,256] broadcast(%zero), dimensions={}',
        '%new = f32[16,256] dynamic-update-slice(%zeros, %u, %i, %i)',
      ),
      dict(u='f32[1,256]', i=SCALAR),
      '%y = f32[16,256] fusion(%u, %i), kind=kLoop, calls=%fused',
      (1024, 16384),
      id='no array is there to be changed in place: all is written',
    ),
    pytest.param(
      computation(
        'fused',
        dict(p=X, u='f32[1,256]', i='s32[]'),
        '%new = f32[16,256] dynamic-update-slice(%p, %u, %i, %i)',
        '%zero = f32[] constant(0)',
        '%sum = f32[256] reduce(%new, %zero), dimensions={0}, to_apply=%add',
        '%pair = (f32[16,256], f32[256]) tuple(%new, %sum)',
      ),
      dict(x=X, u='f32[1,256]{1,0:S(1)}', i=SCALAR),
      '%y = (f32[16,256], f32[256]{0:S(1)}) fusion(%x, %u, %i), calls=%fused',
      (16384, 1024),
      id='changed in place, and then read whole',
    ),
    pytest.param(
      computation(
        'fused',
        dict(p=X, u='f32[1,256]', i='s32[]'),
        '%new = f32[16,256] dynamic-update-slice(%p, %u, %i, %i)',
        '%row = f32[1,256] dynamic-slice(%new, %i, %i)',
        '%pair = (f32[16,256], f32[1,256]) tuple(%new, %row)',
      ),
      dict(x=X, u='f32[1,256]{1,0:S(1)}', i=SCALAR),
      '%y = (f32[16,256], f32[1,256]{1,0:S(1)}) fusion(%x, %u, %i), calls=%fused',
      (1024, 1024),
      id='changed in place, and one row of it is read',
    ),
    pytest.param(
      computation(
        'row',
        dict(q=X, j='s32[]'),
        '%wide = f32[16,256] convert(%q)',
        '%one = f32[1,256] dynamic-slice(%wide, %j, %j)',
        '%flat = f32[256] bitcast(%one)',
      )
      + computation(
        'fused',
        dict(i='s32[]', p='bf16[16,256]'),
        '%one = f32[256] fusion(%p, %i), kind=kLoop, calls=%row',
        '%other = f32[256] negate(%one)',
      ),
      dict(x='bf16[16,256]', i=SCALAR),
      '%y = f32[256]{0:S(1)} fusion(%i, %x), kind=kLoop, calls=%fused',
      (512, 0),
      id='a row of bf16 that is sliced as f32, operands in another order',
    ),
    pytest.param(
      computation(
        'fused',
        dict(table='bf16[64,256]{1,0:T(8,128)(2,1)}', i='s32[3]{0:T(128)}'),
        '%ids = s32[3] custom-call(%i), custom_call_target="AssumeGatherIndicesInBound"',
        '%taken = bf16[3,256]{1,0:T(8,128)(2,1)} gather(%table, %ids), offset_dims={1}, slice_sizes={1,256}',
        '%y = bf16[3,256]{1,0:T(8,128)(2,1)} reshape(%taken)',
      ),
      dict(x='bf16[64,256]{1,0:T(8,128)(2,1)}', i='s32[3]{0:T(128)S(1)}'),
      '%y = bf16[3,256]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %i), calls=%fused',
      (3072, 0),
      id='three words of an embedding table: 3 x 2 rows of 512 bytes',
    ),
  ],
)
def test_fusions(computations, operands, line, expected):
  assert moved(entry(operands, line), computations) == expected


def test_what_is_started_and_never_done():
  start = f'%s = ({X}, {X}, u32[]{{:S(2)}}) copy-start(%x)'
  with pytest.raises(ValueError, match='s is started in main, and never done'):
    moved(entry({'x': X}, start))
