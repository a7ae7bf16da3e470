"""Hugging Face's T5 v1.1 folders: every tensor finds T5X's place."""

import builtins
import contextlib
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors import numpy as safetensors

from gqa_t5x.checkpoints import folders
from gqa_t5x.checkpoints.tree import read_architecture
from gqa_t5x.errors import BadInput
from helpers.huggingface_folders import TABLE, opened, refused, shard, weights, write
from helpers.trees import STEP, N, tiny_shapes, tiny_state, write_msgpack


def assert_equals(tensors, expected):
  """Compares with Hugging Face's weights."""
  assert set(tensors) == {f'target/{path}' for path in TABLE} | {'state/step'}
  step = tensors['state/step']
  assert step.shape == ()
  assert step.dtype == np.int32
  assert step.read() == 0
  shapes = tiny_shapes()
  for path, (name, _) in TABLE.items():
    tensor = tensors[f'target/{path}']
    got, there = tensor.read(), expected[name]
    assert tensor.shape == got.shape == shapes[path], path
    assert tensor.dtype == got.dtype == there.dtype, path
    assert got.flags.c_contiguous, path
    if there.ndim == 1 or path == 'token_embedder/embedding':
      np.testing.assert_array_equal(got, there, path)
    else:
      np.testing.assert_array_equal(got, there.T, path)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_tensor_finds_its_place(dtype, tmp_path):
  tensors = opened(write(tmp_path / 't5', weights(dtype)))
  assert_equals(tensors, weights(dtype))
  shapes = {path: tensors[f'target/{path}'].shape for path in TABLE}
  assert read_architecture(shapes).num_heads == N


def test_shards(tmp_path):
  folder = write(tmp_path / 't5')
  shard(folder, weights())
  assert_equals(opened(folder), weights())


@pytest.mark.parametrize('file', ['', 'config.json', 'model.safetensors'])
def test_folder_is_found_by_any_of_its_files(file, tmp_path):
  folder = write(tmp_path / 't5')
  found = folders.find_checkpoint(epath.Path(folder / file))
  assert found == epath.Path(folder)
  assert not folders.step_is_known(found)


def test_step_of_t5x_is_known(tmp_path):
  folder = write_msgpack(tmp_path / 'checkpoint_1000', tiny_state())
  assert folders.step_is_known(epath.Path(folder))
  assert opened(folder)['state/step'].read() == STEP


def test_copies_of_the_embedding_and_an_unused_bias_are_ignored(tmp_path):
  extra = {
    'encoder.embed_tokens.weight': weights()['shared.weight'],
    'decoder.embed_tokens.weight': weights()['shared.weight'],
    'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight': np.zeros(
      (32, N), np.float32
    ),
  }
  assert_equals(opened(write(tmp_path / 't5', weights() | extra)), weights())


@pytest.mark.parametrize('name', ['encoder', 'decoder'])
def test_a_copy_of_the_embedding_stands_in(name, tmp_path):
  tensors = weights()
  tensors[f'{name}.embed_tokens.weight'] = tensors.pop('shared.weight')
  assert_equals(opened(write(tmp_path / 't5', tensors)), weights())


@pytest.mark.parametrize(
  'config',
  [
    {'model_type': 'mt5'},
    {'is_gated_act': None, 'relative_attention_num_buckets': None},
    # What transformers 5 writes for the same model.
    {'tie_word_embeddings': True, 'scale_decoder_outputs': False},
  ],
)
def test_other_ways_to_say_v1_1(config, tmp_path):
  assert_equals(opened(write(tmp_path / 't5', **config)), weights())


def test_layers_of_the_decoder_default_to_those_of_the_encoder(tmp_path):
  folder = write(tmp_path / 't5', num_decoder_layers=None, num_layers=2)
  assert 'encoder.block.1.layer.0.SelfAttention.q.weight is missing' in refused(folder)


def test_safetensors_goes_before_other_formats(tmp_path):
  folder = write(tmp_path / 't5')
  for name in ('pytorch_model.bin', 'flax_model.msgpack', 'tf_model.h5'):
    (folder / name).write_bytes(b'')
  assert_equals(opened(folder), weights())


def test_opening_reads_nothing(tmp_path, monkeypatch):
  tensors = opened(write(tmp_path / 't5'))
  (tmp_path / 't5' / 'model.safetensors').unlink()
  with pytest.raises(BadInput) as error:
    tensors['target/token_embedder/embedding'].read()
  file = tmp_path / 't5' / 'model.safetensors'
  assert f'cannot read the tensor shared.weight of {file}: ' in str(error.value)


class Bucket(type(epath.backend.os_backend)):
  """A local folder as gs://bucket, with handles as TensorFlow gives them for it."""

  def __init__(self, folder):
    self.folder = folder

  def __getattribute__(self, name):
    method = super().__getattribute__(name)
    if name not in ('exists', 'isdir', 'listdir', 'stat'):
      return method
    return lambda path: method(self._local(path))

  def _local(self, path):
    return str(path).replace('gs://bucket', str(self.folder))

  @contextlib.contextmanager
  def open(self, path, mode):
    with builtins.open(self._local(path), mode) as handle:
      yield types.SimpleNamespace(read=handle.read, seek=handle.seek)


@pytest.mark.parametrize('sharded', [False, True])
def test_folder_in_a_bucket(sharded, tmp_path, monkeypatch):
  monkeypatch.setattr(epath.backend, 'tf_backend', Bucket(tmp_path))
  folder = write(tmp_path / 't5')
  if sharded:
    shard(folder, weights())
  assert_equals(opened('gs://bucket/t5'), weights())


# --- PyTorch ---------------------------------------------------------------------


def test_torch(tmp_path):
  torch = pytest.importorskip('torch')
  folder, expected = write(tmp_path / 't5'), weights()
  (folder / 'model.safetensors').unlink()
  state = {name: torch.from_numpy(a) for name, a in weights().items()}
  state['lm_head.weight'] = state['lm_head.weight'].to(torch.bfloat16)
  torch.save(state, folder / 'pytorch_model.bin')
  logits = expected['lm_head.weight'].astype(ml_dtypes.bfloat16)
  assert_equals(opened(folder), expected | {'lm_head.weight': logits})


class Tensor:
  """The part of torch.Tensor that is read here, over NumPy."""

  def __init__(self, array):
    self.array = array
    self.shape = list(array.shape)
    self.dtype = f'torch.{array.dtype.name}'

  def contiguous(self):
    return Tensor(np.ascontiguousarray(self.array))

  def view(self, dtype):
    return Tensor(self.array.view(dtype.removeprefix('torch.')))

  def numpy(self):
    assert self.dtype != 'torch.bfloat16', 'as torch: NumPy has no bfloat16'
    return self.array


def stand_in_for_torch():
  def load(file, **kwargs):
    assert kwargs == {'map_location': 'cpu', 'mmap': True, 'weights_only': True}
    return {name: Tensor(a) for name, a in safetensors.load_file(file).items()}

  return types.SimpleNamespace(
    load=load, int16='torch.int16', bfloat16='torch.bfloat16'
  )


@pytest.fixture
def torch_folder(tmp_path, monkeypatch):
  """A model of float32 in pytorch_model.bin, as the stand-in reads it."""
  monkeypatch.setitem(sys.modules, 'torch', stand_in_for_torch())
  folder = write(tmp_path / 't5')
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  return folder


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize('sharded', [False, True])
def test_torch_is_asked_for_a_memory_map(sharded, dtype, torch_folder):
  file = torch_folder / 'pytorch_model.bin'
  if sharded:
    file.unlink()
    shard(torch_folder, weights(dtype), 'bin', 'pytorch_model')
  else:
    safetensors.save_file(weights(dtype), file)
  assert_equals(opened(torch_folder), weights(dtype))


def test_damaged_torch(torch_folder):
  file = torch_folder / 'pytorch_model.bin'
  file.write_bytes(file.read_bytes()[:1000])
  message = refused(torch_folder)
  assert message.startswith(f'cannot read {file}: ')
  assert message.endswith('safetensors: model.save_pretrained(FOLDER)')


def test_without_torch(torch_folder, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  assert refused(torch_folder) == (
    f"{torch_folder / 'pytorch_model.bin'} needs PyTorch: pip install 'gqa_t5x[torch]',"
    ' or save the model as safetensors: model.save_pretrained(FOLDER)'
  )
