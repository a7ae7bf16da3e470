"""Hugging Face folders that are refused: one line with file, tensor and numbers."""

import json

import numpy as np
import pytest
from etils import epath

from gqa_t5x.checkpoints import weight_files
from gqa_t5x.errors import BadInput
from helpers.huggingface_folders import refused, shard, weights, write
from helpers.trees import D, H, N, tiny_state, write_msgpack, write_orbax

NH = N * H


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ({'model_type': 'bert'}, "has model_type 'bert', not one of t5, mt5, umt5"),
    ({'model_type': None}, 'has model_type None'),
    ({'model_type': 'longt5'}, 'umt5: its encoder attends locally'),
    ({'model_type': 'switch_transformers'}, 'its MLPs are choices among experts'),
    ({'model_type': 't5gemma'}, 'its positions are rotary'),
    ({'model_type': 'bart'}, 'its positions are learned'),
    ({'feed_forward_proj': 'gelu'}, "has feed_forward_proj 'gelu'; this project"),
    ({'dense_act_fn': 'relu'}, "has dense_act_fn 'relu', and feed_forward_proj"),
    ({'is_gated_act': False}, 'has is_gated_act False'),
    ({'d_model': None}, 'has d_model None, expected a number'),
    ({'num_heads': '4'}, "has num_heads '4', expected a number"),
    ({'num_layers': 0}, 'has num_layers 0, expected a number'),
  ],
)
def test_config_of_another_model(config, message, tmp_path):
  folder = write(tmp_path / 't5', **config)
  assert refused(folder).startswith(f'{folder / "config.json"} ')
  assert message in refused(folder)


Q = 'decoder.block.1.layer.0.SelfAttention.q.weight'
BIAS = 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ({'d_model': 7}, 'shared.weight has shape (11, 6), expected (11, 7)'),
    ({'vocab_size': 12}, 'lm_head.weight has shape (11, 6), expected (12, 6)'),
    ({'num_heads': 2}, f'{Q} has shape (8, 6), expected (4, 6)'),
    ({'num_heads': 2, 'd_kv': 4}, f'{BIAS} has shape (32, 4), expected (32, 2)'),
    ({'d_kv': 3}, f'{Q} has shape (8, 6), expected (12, 6)'),
    ({'num_layers': 2}, 'encoder.block.1.layer.0.SelfAttention.k.weight is missing'),
    ({'num_decoder_layers': 1}, f'{Q} is extra'),
    (
      {'feed_forward_proj': 'relu', 'is_gated_act': False},
      'encoder.block.0.layer.1.DenseReluDense.wi.weight is missing',
    ),
  ],
)
def test_tensors_that_config_does_not_speak_of(config, message, tmp_path):
  folder = write(tmp_path / 't5', **config)
  start = f'{folder / "model.safetensors"} does not fit config.json beside it: '
  assert refused(folder).startswith(start)
  assert message in refused(folder)


def test_tensor_of_integers(tmp_path):
  tensors = weights() | {Q: np.zeros((NH, D), np.int8)}
  folder = write(tmp_path / 't5', tensors)
  assert f'{Q} is I8; parameters must be floating point' in refused(folder)


def test_missing_and_damaged_config(tmp_path):
  folder = write(tmp_path / 't5')
  config = folder / 'config.json'
  config.write_text(config.read_text()[:50])
  assert refused(folder).startswith(f'{config} is truncated or damaged: ')
  config.write_text('[]')
  assert refused(folder) == f'{config} is damaged: it holds no JSON object'
  config.unlink()
  assert refused(folder) == f'{config} is missing: the folder is only partly copied'


def test_truncated_safetensors(tmp_path):
  folder = write(tmp_path / 't5')
  file = folder / 'model.safetensors'
  data = file.read_bytes()
  for length in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
    file.write_bytes(data[:length])
    start = f'{file} is truncated or damaged ({length} bytes): '
    assert refused(folder).startswith(start)
  file.write_bytes(data + b'\0')
  assert f'damaged ({len(data) + 1} bytes)' in refused(folder)


def test_missing_shard(tmp_path):
  folder = write(tmp_path / 't5')
  names = shard(folder, weights())
  (folder / names[1]).unlink()
  index = folder / 'model.safetensors.index.json'
  message = f'{index} names {names[1]}, which is not there: the folder is only partly'
  assert refused(folder).startswith(message)


def test_index_that_does_not_fit_its_shards(tmp_path):
  folder = write(tmp_path / 't5')
  names = shard(folder, weights())
  index = folder / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  place = content['weight_map'][Q]
  other = names[(names.index(place) + 1) % 3]
  content['weight_map'][Q] = other
  index.write_text(json.dumps(content))
  assert refused(folder) == f'{index} says that {Q} is in {other}; it is not'
  index.write_text('{}')
  assert refused(folder) == f'{index} is damaged: it has no weight_map'


@pytest.mark.parametrize('name', ['flax_model.msgpack', 'tf_model.h5'])
def test_formats_that_are_not_read(name, tmp_path):
  folder = write(tmp_path / 't5')
  (folder / 'model.safetensors').rename(folder / name)
  assert refused(folder) == (
    f'{folder / name} is of a format that is not read; save the model as safetensors:'
    ' model.save_pretrained(FOLDER)'
  )


def test_torch_in_a_bucket():
  file = epath.Path('gs://bucket/t5/pytorch_model.bin')
  with pytest.raises(BadInput, match=r'gs://bucket/t5/.* on a local disk'):
    weight_files._open_torch(file)


def write_header(file, header, nbytes=0):
  """A safetensors file built by hand after the format's text."""
  text = json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(nbytes))


@pytest.mark.parametrize(
  ('header', 'message'),
  [
    ([1], 'its header is no JSON object'),
    ({'a': 3}, 'not subscriptable'),
    ({'a': {'dtype': 'F32', 'shape': [2]}}, 'data_offsets'),
    ({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 12]}}, 'has 12 bytes'),
    ({'a': {'dtype': 'F32', 'shape': [-1], 'data_offsets': [0, 8]}}, 'has shape [-1]'),
    ({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [4, 12]}}, 'begins at 4'),
    (
      {
        'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]},
        'b': {'dtype': 'F32', 'shape': [1], 'data_offsets': [4, 8]},
      },
      'b begins at 4 of the data, expected 8',
    ),
    (
      {'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}},
      'its tensors have 8 bytes, 12 are there',
    ),
  ],
)
def test_damaged_header(header, message, tmp_path):
  folder = write(tmp_path / 't5')
  file = folder / 'model.safetensors'
  write_header(file, header, 12)
  start = f'{file} is truncated or damaged ({file.stat().st_size} bytes): '
  assert refused(folder).startswith(start)
  assert message in refused(folder)


# --- Two layouts in one folder -----------------------------------------------


@pytest.mark.parametrize(
  ('make', 'file'),
  [(write_msgpack, 'checkpoint'), (write_orbax, 'state/_METADATA')],
)
def test_folder_of_t5x_and_hugging_face(make, file, tmp_path):
  folder = write(tmp_path / 't5')
  made = make(tmp_path / 'checkpoint_1000', tiny_state())
  for path in made.iterdir():
    path.rename(folder / path.name)
  assert refused(folder) == (
    f'{folder} has two checkpoints, {folder / file} and'
    f' {folder / "model.safetensors"}; keep one'
  )


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_one_file_and_an_index(name, tmp_path):
  folder = write(tmp_path / 't5')
  (folder / 'model.safetensors').rename(folder / name)
  (folder / f'{name}.index.json').write_text('{}')
  expected = f'{folder} has two models, {name} and {name}.index.json; keep one'
  assert refused(folder) == expected
