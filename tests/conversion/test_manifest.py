"""The manifest: what it records, and that --verify finds every kind of damage."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from etils import epath
from flax import serialization

from gqa_t5x.conversion import manifest
from helpers.trees import D, H, convert, flat, tiny_shapes, tiny_state, write_msgpack
from helpers.trees import run_convert as run

KEY = 'target/decoder/layers_1/self_attention/key/kernel'
OUT = 'target/decoder/layers_1/self_attention/out/kernel'
MOMENT = 'state/param_states/decoder/layers_1/self_attention/key/kernel/v'
COPIED = 'target/decoder/layers_0/mlp/wo/kernel'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A checkpoint of 2 heads, made from 4 by mean; chunks are not compressed."""
  root = tmp_path_factory.mktemp('manifest')
  source = write_msgpack(root / 'mha' / 'checkpoint_1000', tiny_state())
  return convert(source, root / 'gqa', '--seed=7', '--compression=none')


@pytest.fixture
def copy(made, tmp_path):
  return shutil.copytree(made, tmp_path / 'gqa' / 'checkpoint_1000')


def record(folder):
  return json.loads((folder / 'gqa_t5x_manifest.json').read_text())


def test_says_where_the_checkpoint_is_from(made):
  got = record(made)
  assert got['format'] == 1
  assert got['method'] == {
    'name': 'mean',
    'grouping': 'contiguous',
    'seed': 7,
    'statistics': None,
  }
  heads = {'encoder': 4, 'self_attention': 2, 'cross_attention': 2}
  assert got['num_kv_heads'] == got['architecture']['num_kv_heads'] == heads
  assert got['source']['path'] == str(made.parent.parent / 'mha' / 'checkpoint_1000')
  assert got['source']['step'] == 1000
  assert got['source']['num_kv_heads'] == {**heads, **dict.fromkeys(heads, 4)}
  # Of each parameter four moments, and the step.
  count = 5 * len(tiny_shapes()) + 1
  assert got['source']['num_tensors'] == got['result']['num_tensors'] == count
  lines = [f'{p} {[*a.shape]} {a.dtype}\n' for p, a in sorted(flat(tiny_state()))]
  digest = hashlib.sha256(''.join(lines).encode()).hexdigest()
  assert got['source']['shapes_sha256'] == digest != got['result']['shapes_sha256']
  assert got['compression'] == 'none'
  assert got['versions'].keys() == {'gqa_t5x', 'python', 'numpy', 'tensorstore'}
  assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00', got['created'])


def test_lists_what_is_not_a_copy(made):
  """Checksums of the chunk files themselves: they hold the rows and nothing else."""
  changed = record(made)['changed']
  kernels = [
    f'decoder/layers_{layer}/{module}/{name}/kernel'
    for layer in (0, 1)
    for module in ('self_attention', 'encoder_decoder_attention')
    for name in ('key', 'value')
  ]
  moments = [f'{path}/{n}' for path in kernels for n in ('m', 'v', 'v_col', 'v_row')]
  expected = {f'target/{path}' for path in kernels}
  expected |= {f'state/param_states/{path}' for path in moments}
  assert changed.keys() == expected
  for path in (KEY, MOMENT):
    chunk = (made / path.replace('/', '.') / '0.0').read_bytes()
    assert changed[path] == {
      'shape': [D, 2 * H],
      'dtype': 'float32',
      'sha256': hashlib.sha256(chunk).hexdigest(),
    }


@pytest.mark.parametrize('path', ['checkpoint', 'model_dir'])
def test_verify_says_in_one_line_that_all_is_well(path, made, capsys):
  given = made if path == 'checkpoint' else made.parent
  assert run(f'--verify={given}') == 0
  out, err = capsys.readouterr()
  count = 5 * len(tiny_shapes()) + 1
  assert (out, err) == (
    f'{made} is whole: 40 tensors made by mean have their checksums,'
    f' all {count} their shapes\n',
    '',
  )


def folder_of(checkpoint, path):
  return checkpoint / path.replace('/', '.')


def flip_a_bit(checkpoint):
  for path in (KEY, MOMENT):
    chunk = folder_of(checkpoint, path) / '0.0'
    data = bytearray(chunk.read_bytes())
    data[17] ^= 1
    chunk.write_bytes(data)


def truncate(checkpoint):
  chunk = folder_of(checkpoint, KEY) / '0.0'
  chunk.write_bytes(chunk.read_bytes()[:10])


def rewrite(edit):
  """What changes the tree of the msgpack."""

  def damage(checkpoint):
    file = checkpoint / 'checkpoint'
    tree = serialization.msgpack_restore(file.read_bytes())
    edit(tree['optimizer'])
    file.write_bytes(serialization.msgpack_serialize(tree))

  return damage


def another_shape(tree):
  decoder = tree['target']['decoder']
  decoder['layers_0']['mlp']['wo']['kernel'] = np.ones((3, 6), np.float32)
  key = decoder['layers_1']['self_attention']['key']
  key['kernel'] = np.ones((D, H), np.float32)


def rewrite_manifest(edit):
  """What changes the text of the manifest."""

  def damage(checkpoint):
    file = checkpoint / manifest.NAME
    file.write_text(edit(file.read_text()))

  return damage


DAMAGE = [
  (flip_a_bit, [f'{KEY} has another checksum', f'{MOMENT} has another checksum']),
  (truncate, [f'{KEY} cannot be read (cannot read the tensor {KEY} of {{path}}']),
  (
    lambda checkpoint: shutil.rmtree(folder_of(checkpoint, COPIED)),
    ['{path} is only partly written or copied: cannot open 1 of', COPIED],
  ),
  (
    rewrite(lambda tree: tree['target']['decoder']['layers_0']['mlp'].pop('wo')),
    [f'says, convert again: {COPIED} is missing'],
  ),
  (
    rewrite(lambda tree: tree['target']['decoder']['layers_1'].pop('self_attention')),
    [f'{KEY} is missing', f'{OUT} is missing'],
  ),
  (
    rewrite(lambda tree: tree['state']['param_states'].pop('token_embedder')),
    ['it has 212 tensors, the manifest lists 216'],
  ),
  (
    rewrite(another_shape),
    [
      f'{COPIED} has shape (3, 6), not (5, 6)',
      f'{KEY} is float32 [6, 2], not float32 [6, 4]',
    ],
  ),
  (
    rewrite_manifest(lambda text: text[:100]),
    [f'{{path}}/{manifest.NAME} is truncated or damaged: '],
  ),
  (
    rewrite_manifest(lambda text: '{"format": 2}'),
    ['is of format 2, this version of gqa_t5x reads 1'],
  ),
  (
    lambda checkpoint: (checkpoint / manifest.NAME).unlink(),
    [f'{{path}} has no {manifest.NAME}: only what this version'],
  ),
]


@pytest.mark.parametrize(('damage', 'messages'), DAMAGE)
def test_verify_finds_damage(damage, messages, copy, capsys):
  damage(copy)
  assert run(f'--verify={copy}') == 1
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('error: ')
  assert err.count('\n') == 1
  for message in messages:
    assert message.format(path=copy) in err
  if damage is truncate:  # no other tensor is named
    assert set(re.findall(r'(?:target|state)/[\w/]+', err)) == {KEY}


def test_a_converted_checkpoint_converts_again(made, tmp_path):
  """The manifest of the first is not taken for a part of the checkpoint."""
  got = manifest.verify(epath.Path(convert(made, tmp_path, '--num_kv_heads=1')))
  assert got['source']['num_kv_heads']['self_attention'] == 2
  assert got['source']['shapes_sha256'] == record(made)['result']['shapes_sha256']
  assert got['num_kv_heads']['cross_attention'] == 1
