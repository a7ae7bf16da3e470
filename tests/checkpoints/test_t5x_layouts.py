"""Reading both of T5X's layouts and writing the legacy one."""

import re

import ml_dtypes
import msgpack
import numpy as np
import pytest
from etils import epath
from flax import serialization

from gqa_t5x.checkpoints import folders, t5x_layouts
from gqa_t5x.checkpoints.tree import read_architecture
from gqa_t5x.errors import BadInput
from helpers.trees import (
  assert_same,
  flat,
  nest,
  read,
  tiny_state,
  write_msgpack,
  write_orbax,
  write_t5x,
)

KEY = 'target/decoder/layers_0/self_attention/key/kernel'


@pytest.mark.parametrize('make', [write_msgpack, write_orbax, write_t5x])
def test_each_layout_is_read_whole(make, tmp_path):
  tree = tiny_state()
  assert_same(read(make(tmp_path / 'checkpoint_1000', tree)), tree)


def scanned(tree):
  """The same state with all layers of a stack in one tensor, along axis 1, as umT5's.

  As T5X's scalable_t5 names them; the shared position bias goes to every layer.
  """
  result, layers = {}, {}
  for path, array in flat(tree['target']):
    stack, _, name = path.partition('/')
    if name.startswith('layers_'):
      _, _, name = name.partition('/')
      layers.setdefault(f'{stack}/{stack}/{name}', []).append(array)
    elif name.startswith('relpos_bias'):
      copies = [array + i for i in range(2 if stack == 'decoder' else 1)]
      layers[f'{stack}/{stack}/{name}'] = copies
    else:
      result[path] = array
  result |= {path: np.stack(arrays, axis=1) for path, arrays in layers.items()}
  moments = nest({f'{path}/v': array for path, array in result.items()})
  state = {'step': tree['state']['step'], 'param_states': moments}
  return {'target': nest(result), 'state': state}


@pytest.mark.parametrize('make', [write_msgpack, write_orbax, write_t5x])
def test_scanned_layers_are_read_one_by_one(make, tmp_path):
  """Without the optimizer's state, which belongs to all layers together."""
  tree = tiny_state(moments=False)
  got = read(make(tmp_path / 'checkpoint_1000', scanned(tree)))
  expected = dict(flat(tree))
  for stack, layers in (('encoder', 1), ('decoder', 2)):
    bias = expected.pop(f'target/{stack}/relpos_bias/rel_embedding')
    for i in range(layers):
      expected[f'target/{stack}/layers_{i}/relpos_bias/rel_embedding'] = bias + i
  assert got.keys() == expected.keys()
  for path, array in expected.items():
    np.testing.assert_array_equal(got[path], array)
  params = {p.removeprefix('target/'): a.shape for p, a in got.items() if 'target' in p}
  architecture = read_architecture(params)
  assert architecture.bias_per_layer
  assert architecture.num_layers == {'encoder': 1, 'decoder': 2}


def test_bfloat16_and_tensors_of_zeros_survive(tmp_path):
  tree = tiny_state()
  norm = tree['target']['decoder']['decoder_norm']
  norm['scale'] = norm['scale'].astype(ml_dtypes.bfloat16)
  tree['target']['encoder']['encoder_norm']['scale'][:] = 0
  assert_same(read(write_t5x(tmp_path / 'checkpoint_1000', tree)), tree)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_tensor_in_the_chunks_of_a_msgpack(dtype, tmp_path, monkeypatch):
  """As flax writes what is above 1 GiB."""
  tree = tiny_state()
  kernel = tree['target']['decoder']['logits_dense']['kernel'].astype(dtype)
  tree['target']['decoder']['logits_dense']['kernel'] = kernel
  monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 64)
  assert_same(read(write_msgpack(tmp_path / 'checkpoint_1000', tree)), tree)


def test_older_orbax_with_a_msgpack_and_a_folder_a_tensor(tmp_path):
  tree = tiny_state(moments=False)
  state = tmp_path / 'checkpoint_1000' / 'state'
  write_t5x(state, tree)
  (state / 'checkpoint').unlink()
  names = {path: f'PLACEHOLDER://{path.replace("/", ".")}' for path, _ in flat(tree)}
  names['state/step'] = tree['state']['step']
  aggregate = write_msgpack(tmp_path / 'msgpack', nest(names)) / 'checkpoint'
  aggregate.rename(state / 'checkpoint')
  assert_same(read(state.parent), tree)


def test_paths_in_a_bucket():
  store = t5x_layouts.kvstore(epath.Path('gs://bucket/a/checkpoint_5'))
  assert store == {'driver': 'gcs', 'bucket': 'bucket', 'path': 'a/checkpoint_5/'}
  leaf = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': 'target.x'}}
  name = t5x_layouts._tensor_folder(leaf)
  spec = t5x_layouts._absolute_spec(leaf, name, store, ocdbt=False)
  assert spec['kvstore'] == {**store, 'path': 'a/checkpoint_5/target.x/'}


@pytest.fixture
def folder(tmp_path):
  return write_t5x(tmp_path / 'checkpoint_1000', tiny_state())


def array(content):
  """A msgpack with one array of flax, whose shape, dtype and bytes are given."""
  return msgpack.packb({'x': msgpack.ExtType(1, msgpack.packb(content))})


class TestDamage:
  def broken(self, folder):
    with pytest.raises(BadInput) as error:
      read(folder)
    assert '\n' not in str(error.value)
    return str(error.value)

  def test_truncated_msgpack(self, tmp_path):
    file = write_msgpack(tmp_path / 'checkpoint_1000', tiny_state()) / 'checkpoint'
    data = file.read_bytes()
    for length in range(0, len(data), 301):
      file.write_bytes(data[:length])
      start = f'{file} is truncated or damaged ({length} bytes): '
      assert self.broken(file.parent).startswith(start)

  @pytest.mark.parametrize(
    'content',
    [
      msgpack.packb({'x': 1}) + b'\0',  # goes on after its end
      b'\x81\xa1\xff\x01',  # a key that is not UTF-8
      b'\x81\xa1x\xdd\xff\xff\xff\xff',  # a list of 4 billion
      b'\x81\xa1x' * 2000 + b'\x01',  # too deep
      array([[3], 'int8', b'ab']),  # three elements in two bytes
      array([[2], 'int9', b'ab']),
      array([[1], 'object', b'abcdefgh']),
      array([[2], 'int8']),
    ],
  )
  def test_damaged_msgpack(self, content, tmp_path):
    file = tmp_path / 'checkpoint'
    file.write_bytes(content)
    start = f'{file} is truncated or damaged ({len(content)} bytes): '
    assert self.broken(tmp_path).startswith(start)

  @pytest.mark.parametrize(
    'content', [b'\x05', msgpack.packb([1, 2]), msgpack.packb({'optimizer': 3})]
  )
  def test_msgpack_of_something_else(self, content, tmp_path):
    file = tmp_path / 'checkpoint'
    file.write_bytes(content)
    message = f'{file} is damaged: it does not hold a tree of tensors'
    assert self.broken(tmp_path) == message

  def test_msgpack_that_does_not_fit_in_memory(self, tmp_path, monkeypatch):
    file = write_msgpack(tmp_path / 'checkpoint_1000', tiny_state()) / 'checkpoint'

    def fail(data):
      raise MemoryError

    monkeypatch.setattr(serialization, 'msgpack_restore', fail)
    message = self.broken(file.parent)
    assert message.startswith(f'{file} does not fit in memory: its tensors are in it')
    assert f'to read its {file.stat().st_size:,} bytes takes twice as much' in message

  @pytest.mark.parametrize('missing', [True, False])
  def test_missing_chunk_is_not_read_as_zeros_nor_is_a_truncated_one(
    self, missing, folder
  ):
    chunk = folder / KEY.replace('/', '.') / '0.0'
    data = chunk.read_bytes()
    chunk.unlink()
    if not missing:
      chunk.write_bytes(data[:20])
    message = self.broken(folder)
    assert f'cannot read the tensor {KEY} of {folder}' in message
    assert not missing or re.search(r'0\.0.* missing', message)

  def test_orbax_without_its_data_or_with_truncated_metadata(self, tmp_path):
    folder = write_orbax(tmp_path / 'checkpoint_1000', tiny_state())
    for file in folder.glob('state/**/d/*'):
      file.write_bytes(file.read_bytes()[:100])
    message = self.broken(folder)
    assert 'target/' in message
    assert str(folder) in message
    metadata = folder / 'state' / '_METADATA'
    metadata.write_bytes(metadata.read_bytes()[:1000])
    assert f'{metadata} is truncated or damaged' in self.broken(folder)

  def test_orbax_state_folder_alone(self, tmp_path):
    (tmp_path / 'checkpoint_1000' / 'state').mkdir(parents=True)
    message = self.broken(tmp_path / 'checkpoint_1000')
    assert 'has neither _METADATA nor checkpoint' in message

  def test_tensorflow_checkpoint(self, tmp_path):
    (tmp_path / 'checkpoint').write_text('model_checkpoint_path: "model.ckpt-1000"\n')
    assert 'convert_tf_checkpoint.py' in self.broken(tmp_path)

  def edited(self, folder, edit):
    """Changes the msgpack's entry of KEY."""
    file = folder / 'checkpoint'
    tree = serialization.msgpack_restore(file.read_bytes())
    edit(tree['optimizer']['target']['decoder']['layers_0']['self_attention']['key'])
    file.write_bytes(serialization.msgpack_serialize(tree))
    return self.broken(folder)

  @pytest.mark.parametrize(
    ('edit', 'message'),
    [
      (
        lambda spec: spec['metadata'].update(shape=[6, 9]),
        f'{KEY} (it has shape (6, 8), and [6, 9] in the file checkpoint)',
      ),
      (
        lambda spec: spec['kvstore'].update(path='target.encoder.encoder_norm.scale'),
        f'(target.encoder.encoder_norm.scale/ is the folder of {KEY})',
      ),
      (lambda spec: spec['kvstore'].pop('path'), f'{KEY} (damaged specification: no'),
      (lambda spec: spec.update(kvstore=None), f'{KEY} (damaged specification: no'),
      (lambda spec: spec.update(driver='zebra'), f'{KEY} ('),
      (lambda spec: spec.update(driver=None), f'{KEY} ('),
      (lambda spec: spec.pop('driver'), f'{KEY}/dtype is of type str, not an array'),
    ],
  )
  def test_specification_of_a_tensor(self, edit, message, folder):
    text = self.edited(folder, lambda key: edit(key['kernel']))
    assert text.startswith(str(folder))
    assert message in text

  @pytest.mark.parametrize('leaf', ['text', None, [1, 2], 1j])
  def test_leaf_that_is_no_array(self, leaf, folder):
    text = self.edited(folder, lambda key: key.update(kernel=leaf))
    kind = type(leaf).__name__
    expected = f'{folder / "checkpoint"}: {KEY} is of type {kind}, not an array'
    assert text == expected


class TestTwoLayouts:
  """Files of two layouts in one folder."""

  def test_legacy_and_orbax(self, tmp_path):
    folder = write_msgpack(tmp_path / 'checkpoint_1000', tiny_state())
    write_orbax(folder, tiny_state())
    message = f'{folder}/checkpoint and {folder}/state/_METADATA; keep one'
    for call in (folders.find_checkpoint, folders.open_checkpoint):
      with pytest.raises(BadInput, match=message):
        call(epath.Path(folder))

  def test_orbax_with_the_msgpack_of_older_versions(self, tmp_path):
    folder = write_orbax(tmp_path / 'checkpoint_1000', tiny_state())
    (folder / 'state' / 'checkpoint').write_bytes(b'')
    assert_same(read(folder), tiny_state())

  def test_tensor_that_the_msgpack_does_not_name(self, folder):
    (folder / 'target.other').mkdir()
    (folder / 'target.other' / '.zarray').write_text('{}')
    assert_same(read(folder), tiny_state())
