"""Reading both of T5X's layouts and writing the legacy one."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from gqa_t5x.checkpoints import folders, t5x_layouts, writer
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, Unit
from gqa_t5x.errors import BadInput
from helpers.trees import (
  STEP,
  flat,
  nest,
  tiny_state,
  write_msgpack,
  write_orbax,
)

KEY = 'target/decoder/layers_0/self_attention/key/kernel'


def read(folder):
  tensors = folders.open_checkpoint(epath.Path(folder))
  return {path: tensor.read() for path, tensor in tensors.items()}


def write(folder, tree):
  """Writes a nested tree by the writer, one unit a tensor."""
  tensors = {path: LazyTensor.of(array) for path, array in flat(tree)}
  units = [Unit({p: t}, lambda p=p, t=t: {p: t.read()}) for p, t in tensors.items()]
  sizes = []
  writer.write_checkpoint(epath.Path(folder), units, sizes.append)
  assert sum(sizes) == sum(array.nbytes for _, array in flat(tree))
  return folder


def assert_same(got, tree):
  expected = dict(flat(tree))
  assert set(got) == set(expected)
  for path, value in expected.items():
    np.testing.assert_array_equal(got[path], value)
    assert got[path].dtype == value.dtype, path


@pytest.mark.parametrize('make', [write_msgpack, write_orbax, write])
def test_each_layout_is_read_whole(make, tmp_path):
  tree = tiny_state()
  assert_same(read(make(tmp_path / 'checkpoint_1000', tree)), tree)


def test_bfloat16_and_tensors_of_zeros_survive(tmp_path):
  tree = tiny_state()
  norm = tree['target']['decoder']['decoder_norm']
  norm['scale'] = norm['scale'].astype(ml_dtypes.bfloat16)
  tree['target']['encoder']['encoder_norm']['scale'][:] = 0
  assert_same(read(write(tmp_path / 'checkpoint_1000', tree)), tree)


def test_older_orbax_with_a_msgpack_and_a_folder_a_tensor(tmp_path):
  tree = tiny_state(moments=False)
  state = tmp_path / 'checkpoint_1000' / 'state'
  write(state, tree)
  (state / 'checkpoint').unlink()
  names = {path: f'PLACEHOLDER://{path.replace("/", ".")}' for path, _ in flat(tree)}
  names['state/step'] = tree['state']['step']
  aggregate = write_msgpack(tmp_path / 'msgpack', nest(names)) / 'checkpoint'
  aggregate.rename(state / 'checkpoint')
  assert_same(read(state.parent), tree)


def test_layout_written_is_that_of_t5x(tmp_path):
  from flax import serialization

  folder = write(tmp_path / 'checkpoint_1000', tiny_state())
  tree = serialization.msgpack_restore((folder / 'checkpoint').read_bytes())
  assert set(tree) == {'version', 'optimizer'}
  assert tree['version'] == 3
  assert set(tree['optimizer']) == {'target', 'state'}
  assert tree['optimizer']['state']['step'] == np.int32(STEP)
  attention = tree['optimizer']['target']['decoder']['layers_0']['self_attention']
  name = 'target.decoder.layers_0.self_attention.key.kernel'
  assert attention['key']['kernel'] == {
    'driver': 'zarr',
    'dtype': 'float32',
    'kvstore': {'driver': 'file', 'path': f'{name}/'},
    'metadata': {
      'shape': [6, 8],
      'chunks': [6, 8],
      'compressor': {'id': 'zstd', 'level': 1},
    },
  }
  zarray = json.loads((folder / name / '.zarray').read_text())
  assert zarray['shape'] == [6, 8]
  assert zarray['dtype'] == '<f4'
  moments = tree['optimizer']['state']['param_states']['decoder']['decoder_norm']
  assert moments['scale']['v']['driver'] == 'zarr'
  for name in ('m', 'v_row', 'v_col'):
    np.testing.assert_array_equal(moments['scale'][name], [0.0])


@pytest.mark.parametrize(
  ('shape', 'expected'),
  [
    ((4096, 4096), [4096, 4096]),  # 64 MiB in float32: one chunk
    ((32128, 4096), [4016, 4096]),
    ((4096, 10240), [4096, 2560]),
    ((), []),
    ((7,), [7]),
  ],
)
def test_chunks_hold_at_most_64_mib(shape, expected):
  assert writer._chunks(shape, 4) == expected


def test_paths_in_a_bucket():
  path = epath.Path('gs://bucket/a/checkpoint_5')
  assert t5x_layouts.kvstore(path) == {
    'driver': 'gcs',
    'bucket': 'bucket',
    'path': 'a/checkpoint_5/',
  }
  leaf = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': 'target.x'}}
  name = t5x_layouts._tensor_folder(leaf)
  spec = t5x_layouts._absolute_spec(leaf, name, t5x_layouts.kvstore(path), ocdbt=False)
  assert spec['kvstore'] == {
    'driver': 'gcs',
    'bucket': 'bucket',
    'path': 'a/checkpoint_5/target.x/',
  }


class TestDamage:
  def broken(self, folder):
    with pytest.raises(BadInput) as error:
      read(folder)
    assert '\n' not in str(error.value)
    return str(error.value)

  def test_truncated_msgpack(self, tmp_path):
    file = write_msgpack(tmp_path / 'checkpoint_1000', tiny_state()) / 'checkpoint'
    file.write_bytes(file.read_bytes()[:5000])
    message = self.broken(file.parent)
    assert f'{file} is truncated or damaged (5000 bytes)' in message

  def test_missing_tensor_folder(self, tmp_path):
    folder = write(tmp_path / 'checkpoint_1000', tiny_state())
    name = KEY.replace('/', '.')
    (folder / name / '.zarray').unlink()
    message = self.broken(folder)
    assert f'{folder} is only partly written or copied: cannot open 1 of' in message
    assert f'tensors: {KEY} (' in message

  def test_missing_chunk_is_not_read_as_zeros(self, tmp_path):
    folder = write(tmp_path / 'checkpoint_1000', tiny_state())
    (folder / KEY.replace('/', '.') / '0.0').unlink()
    message = self.broken(folder)
    assert f'cannot read the tensor {KEY} of {folder}' in message
    assert '0.0' in message
    assert 'missing' in message

  def test_truncated_chunk(self, tmp_path):
    folder = write(tmp_path / 'checkpoint_1000', tiny_state())
    chunk = folder / KEY.replace('/', '.') / '0.0'
    chunk.write_bytes(chunk.read_bytes()[:20])
    assert f'cannot read the tensor {KEY} of {folder}' in self.broken(folder)

  def test_orbax_without_its_data(self, tmp_path):
    folder = write_orbax(tmp_path / 'checkpoint_1000', tiny_state())
    for file in folder.glob('state/**/d/*'):
      file.write_bytes(file.read_bytes()[:100])
    message = self.broken(folder)
    assert 'target/' in message
    assert str(folder) in message

  def test_orbax_with_truncated_metadata(self, tmp_path):
    folder = write_orbax(tmp_path / 'checkpoint_1000', tiny_state())
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
    from flax import serialization

    file = write(folder, tiny_state()) / 'checkpoint'
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
  def test_specification_of_a_tensor(self, edit, message, tmp_path):
    folder = tmp_path / 'checkpoint_1000'
    text = self.edited(folder, lambda key: edit(key['kernel']))
    assert text.startswith(str(folder))
    assert message in text

  @pytest.mark.parametrize('leaf', ['text', None, [1, 2], 1j])
  def test_leaf_that_is_no_array(self, leaf, tmp_path):
    folder = tmp_path / 'checkpoint_1000'
    text = self.edited(folder, lambda key: key.update(kernel=leaf))
    kind = type(leaf).__name__
    expected = f'{folder / "checkpoint"}: {KEY} is of type {kind}, not an array'
    assert text == expected

  def test_optimizer_that_is_no_tree(self, tmp_path):
    write_msgpack(tmp_path / 'checkpoint_1000', np.arange(3))
    assert 'is damaged: it does not hold a tree of t' in self.broken(
      tmp_path / 'checkpoint_1000'
    )


class TestTwoLayouts:
  """Files of two layouts in one folder."""

  def test_legacy_and_orbax(self, tmp_path):
    folder = write_msgpack(tmp_path / 'checkpoint_1000', tiny_state())
    write_orbax(folder, tiny_state())
    for call in (folders.find_checkpoint, folders.open_checkpoint):
      with pytest.raises(BadInput) as error:
        call(epath.Path(folder))
      assert str(error.value) == (
        f'{folder} has two checkpoints, {folder / "checkpoint"} and'
        f' {folder / "state/_METADATA"}; keep one'
      )

  def test_orbax_with_the_msgpack_of_older_versions(self, tmp_path):
    folder = write_orbax(tmp_path / 'checkpoint_1000', tiny_state())
    (folder / 'state' / 'checkpoint').write_bytes(b'')
    assert_same(read(folder), tiny_state())

  def test_tensor_that_the_msgpack_does_not_name(self, tmp_path):
    folder = write(tmp_path / 'checkpoint_1000', tiny_state())
    (folder / 'target.other').mkdir()
    (folder / 'target.other' / '.zarray').write_text('{}')
    assert_same(read(folder), tiny_state())

  def test_model_dir_with_a_checkpoint_of_each_layout(self, tmp_path):
    write_msgpack(tmp_path / 'checkpoint_5', tiny_state())
    write_orbax(tmp_path / 'checkpoint_10', tiny_state())
    found = folders.find_checkpoint(epath.Path(tmp_path))
    assert found.name == 'checkpoint_10'


class TestWholeOrNothing:
  def failing(self, error, after=3):
    """Units of which the fourth raises."""
    tensors = {p: LazyTensor.of(a) for p, a in flat(tiny_state())}

    def fail():
      raise error

    units = [Unit({p: t}, lambda p=p, t=t: {p: t.read()}) for p, t in tensors.items()]
    path, tensor = next(iter(tensors.items()))
    return [*units[:after], Unit({path: tensor}, fail)]

  @pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('bug')])
  def test_any_exception_leaves_nothing(self, error, tmp_path):
    target = epath.Path(tmp_path / 'new' / 'sub' / 'checkpoint_1000')
    with pytest.raises(type(error)):
      writer.write_checkpoint(target, self.failing(error), lambda n: None)
    assert list(tmp_path.iterdir()) == []

  @pytest.mark.parametrize(
    'error',
    [
      OSError(28, 'No space left on device'),
      ValueError('RESOURCE_EXHAUSTED: "0.0": No space left on device [code=28]'),
    ],
  )
  def test_disk_that_fills_up(self, error, tmp_path):
    target = epath.Path(tmp_path / 'checkpoint_1000')
    with pytest.raises(BadInput) as caught:
      writer.write_checkpoint(target, self.failing(error), lambda n: None)
    text = str(caught.value)
    assert text.startswith(f'no disk space for {target}: it ran out while writing, ')
    assert re.search(r'1,064 bytes are needed, [0-9,]+ are free', text)
    assert list(tmp_path.iterdir()) == []

  def test_remains_of_a_killed_run_are_cleared(self, tmp_path):
    remains = tmp_path / 'checkpoint_1000.tmp-convert'
    (remains / 'target.other').mkdir(parents=True)
    (remains / 'checkpoint').write_text('half')
    folder = write(tmp_path / 'checkpoint_1000', tiny_state())
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint_1000']
    assert not (folder / 'target.other').exists()
    assert_same(read(folder), tiny_state())

  def test_two_conversions_do_not_write_the_same_checkpoint(self, tmp_path):
    target = epath.Path(tmp_path / 'checkpoint_1000')
    inner = []

    def second():
      with pytest.raises(BadInput, match='another conversion is writing'):
        writer.write_checkpoint(target, [], inner.append)
      return {'target/x': np.ones(3, np.float32)}

    spec = LazyTensor.of(np.ones(3, np.float32))
    writer.write_checkpoint(target, [Unit({'target/x': spec}, second)], inner.append)
    assert inner == [12]
    np.testing.assert_array_equal(read(target)['target/x'], np.ones(3))
