"""Hugging Face's folders compute what transformers computes: its logits, to 1e-4."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors import numpy as safetensors

from gqa_t5x.checkpoints import folders
from gqa_t5x.checkpoints.config import ModelConfig
from gqa_t5x.decoding import generate
from gqa_t5x.decoding.sampling import greedy
from gqa_t5x.model import network, sizes
from helpers import huggingface_folders as by_hand
from helpers.golden_huggingface import CASES, GOLDEN, write
from helpers.trees import run_convert as run


def convert(source, output, *flags):
  """Converts as a user does; returns the checkpoint."""
  assert run(f'--input={source}', f'--output={output}', *flags) == 0
  return output / 'checkpoint_0'


def opened(folder):
  """The network and the parameters of a checkpoint."""
  folder = folders.find_checkpoint(epath.Path(folder))
  params, architecture = folders.read_params(folder)
  fields = sizes.from_checkpoint(architecture, folders.read_config(folder))
  return network.Transformer(network.T5Config(**fields)), params


def logits(folder):
  """The logits of a checkpoint by this project's network."""
  module, params = opened(folder)
  targets = jnp.asarray(GOLDEN['decoder_inputs'])
  return module.apply(
    {'params': params},
    jnp.asarray(GOLDEN['inputs']),
    targets,
    jnp.ones_like(targets),
    enable_dropout=False,
  )


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
  folder = write(tmp_path / 'there', case)
  np.testing.assert_allclose(logits(folder), GOLDEN[f'{case}/logits'], atol=1e-4)
  # And after a conversion that keeps all heads, and another one of its result.
  flags = ('--num_kv_heads=2', '--compression=none')
  here = convert(folder, tmp_path / 'here', *flags)
  again = convert(here, tmp_path / 'again', *flags)
  np.testing.assert_allclose(logits(again), GOLDEN[f'{case}/logits'], atol=1e-4)


@pytest.mark.parametrize('case', CASES)
def test_greedy_tokens_are_those_of_transformers(case, tmp_path):
  module, params = opened(write(tmp_path / 'there', case))
  inputs, prompts = jnp.asarray(GOLDEN['inputs']), jnp.zeros((2, 12), jnp.int32)
  tokens, _ = generate.generate(module, params, inputs, prompts, greedy, eos_id=1)
  np.testing.assert_array_equal(tokens[:, 0], GOLDEN[f'{case}/greedy'])


@pytest.mark.parametrize('case', ['t5_1_0', 'umt5', 'byt5'])
def test_fewer_heads_are_the_mean_repeated(case, tmp_path):
  """For every query: a model with all heads, whose key/value heads are the means."""
  folder = write(tmp_path / 'there', case)
  gqa, params = opened(convert(folder, tmp_path / 'here', '--num_kv_heads=1'))
  mha, original = opened(folder)
  assert (mha.config.self_kv, gqa.config.self_kv, gqa.config.cross_kv) == (2, 1, 1)
  for layer in original['decoder'].values():
    for kind in ('self_attention', 'encoder_decoder_attention'):
      for name in ('key', 'value') if kind in layer else ():
        kernel_DNH = layer[kind][name]['kernel'].reshape(8, 2, 4)
        repeated = np.repeat(kernel_DNH.mean(1, keepdims=True), 2, axis=1)
        layer[kind][name]['kernel'] = repeated.reshape(8, 8)
  tokens = jnp.asarray(GOLDEN['inputs']), jnp.asarray(GOLDEN['decoder_inputs'])
  got, expected = (
    module.apply({'params': p}, *tokens, jnp.ones_like(tokens[1]), enable_dropout=False)
    for module, p in ((gqa, params), (mha, original))
  )
  np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_copy_of_the_embedding_is_no_projection(tmp_path):
  """As in the PyTorch files of T5 1.0; T5X has no kernel of logits there."""
  folder = write(tmp_path / 'there', 't5_1_0')
  tensors = safetensors.load_file(folder / 'model.safetensors')
  tensors['lm_head.weight'] = tensors['shared.weight'].copy()
  safetensors.save_file(tensors, folder / 'model.safetensors')
  module, params = opened(folder)
  assert module.config.logits_via_embedding
  assert 'logits_dense' not in params['decoder']
  np.testing.assert_allclose(logits(folder), GOLDEN['t5_1_0/logits'], atol=1e-4)


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('relative_attention_max_distance', 128),
    ('relative_attention_num_buckets', 8.5),
    ('layer_norm_epsilon', 1e-6),
  ],
)
def test_each_number_counts(name, value, tmp_path):
  folder = write(tmp_path / 'there', 'other_numbers', **{name: value})
  if name.endswith('buckets'):
    assert name in by_hand.refused(folder)
  else:
    difference = np.abs(logits(folder) - GOLDEN['other_numbers/logits'])
    assert difference.max() > 0.05


def test_ids_and_activation_are_read_and_kept(tmp_path):
  there = write(tmp_path / 'a', 'gated_silu', decoder_start_token_id=5, eos_token_id=3)
  folder = convert(there, tmp_path / 'b', '--num_kv_heads=1')
  assert folders.read_config(epath.Path(folder)) == ModelConfig(
    decoder_start_token_id=5, eos_token_id=3, mlp_activation='silu'
  )


def test_no_file_is_added_to_a_model_as_published(tmp_path):
  folder = convert(write(tmp_path / 'a', 'mt5'), tmp_path / 'b', '--num_kv_heads=1')
  assert not (folder / 'gqa_t5x_config.json').exists()
  assert folders.read_config(epath.Path(folder)) == ModelConfig()


@pytest.mark.parametrize(
  'text',
  ['{', '[]', '{"width": 3}', '{"eos_token_id": "1"}', '{"mlp_activation": "tanh"}'],
)
def test_damaged_file(text, tmp_path):
  folder = convert(write(tmp_path / 'a', 'mt5'), tmp_path / 'b', '--num_kv_heads=1')
  (folder / 'gqa_t5x_config.json').write_text(text)
  flags = (f'--input={folder}', f'--output={tmp_path / "c"}', '--num_kv_heads=1')
  assert run(*flags) == 1


@pytest.mark.parametrize(
  'changes',
  [
    {'pad_token_id': 3},
    {'eos_token_id': [1, 2]},
    {'dense_act_fn': 'gelu'},
    {'dense_act_fn': 'relu'},
    {'is_gated_act': False},
    {'feed_forward_proj': 'gelu'},
    {'d_kv': '4'},
    {'num_decoder_layers': 0},
    {'layer_norm_epsilon': 'small'},
    {'is_encoder_decoder': False},
  ],
)
def test_what_is_not_computed_is_refused_by_name(changes, tmp_path, capsys):
  folder = write(tmp_path / 'a', 'mt5', **changes)
  flags = (f'--input={folder}', f'--output={tmp_path / "b"}', '--num_kv_heads=1')
  assert run(*flags) == 1
  error = capsys.readouterr().err
  assert all(name in error for name in changes)
  assert not (tmp_path / 'b').exists()


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('method', ['mean', 'svd', 'first'])
def test_kernels_that_change_are_not_rounded_again(dtype, method, tmp_path):
  """To 16 bits: what is written is float32, and what float32 weights would give."""
  narrow = write(tmp_path / 'narrow', 'mt5', dtype)
  flags = ('--num_kv_heads=1', f'--method={method}', '--compression=none')
  got, _ = folders.read_params(convert(narrow, tmp_path / 'a', *flags))
  values = safetensors.load_file(narrow / 'model.safetensors')
  wide = tmp_path / 'wide'
  wide.mkdir()
  (wide / 'config.json').write_bytes((narrow / 'config.json').read_bytes())
  values = {name: value.astype(np.float32) for name, value in values.items()}
  safetensors.save_file(values, wide / 'model.safetensors')
  expected, _ = folders.read_params(convert(wide, tmp_path / 'b', *flags))
  for name in ('key', 'value'):
    kernels = [
      tree['decoder']['layers_0']['self_attention'][name]['kernel']
      for tree in (got, expected)
    ]
    assert kernels[0].dtype == np.float32
    np.testing.assert_array_equal(*kernels)
  assert got['token_embedder']['embedding'].dtype == dtype


@pytest.mark.parametrize('rows', [0, -3])
def test_an_embedding_that_differs_is_refused(rows, tmp_path, capsys):
  """In one number, or in how many rows there are."""
  tensors = by_hand.weights()
  other = tensors['shared.weight'].copy()
  other[2, 1] += 1e-3
  tensors['decoder.embed_tokens.weight'] = other[: len(other) + rows]
  folder = by_hand.write(tmp_path / 'a', tensors)
  flags = (f'--input={folder}', f'--output={tmp_path / "b"}', '--num_kv_heads=1')
  assert run(*flags) == 1
  assert (
    'shared.weight and decoder.embed_tokens.weight differ' in capsys.readouterr().err
  )
  assert not (tmp_path / 'b').exists()


@pytest.mark.parametrize(
  'name', ['model.safetensors', 'model-00002-of-00003.safetensors']
)
def test_a_pointer_of_git_lfs(name, tmp_path):
  folder = by_hand.write(tmp_path / 'a')
  if '00002' in name:
    by_hand.shard(folder, by_hand.weights())
  pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n'
  (folder / name).write_text(pointer)
  assert f'{name} is a pointer of Git LFS' in by_hand.refused(folder)


@pytest.mark.parametrize('name', ['checkpoint', 'state/_METADATA'])
def test_a_pointer_in_the_place_of_t5xs_files(name, tmp_path):
  file = tmp_path / 'checkpoint_7' / name
  file.parent.mkdir(parents=True)
  file.write_text('version https://git-lfs.github.com/spec/v1\n')
  assert f'{name} is a pointer of Git LFS' in by_hand.refused(tmp_path)


def test_a_link_into_the_cache_of_the_hub(tmp_path):
  folder = by_hand.write(tmp_path / 'blobs')
  snapshot = tmp_path / 'snapshots' / 'x'
  snapshot.mkdir(parents=True)
  for name, blob in (('model.safetensors', 'ab12'), ('config.json', 'cd34')):
    (folder / name).rename(folder / blob)
    (snapshot / name).symlink_to(folder / blob)
  for path in (snapshot, snapshot / 'model.safetensors'):
    output = tmp_path / f'out_{path.name}'
    assert run(f'--input={path}', f'--output={output}', '--num_kv_heads=1') == 0


@pytest.mark.parametrize(
  ('path', 'said'),
  [
    (
      'google/flan-t5-small',
      'hf download google/flan-t5-small --local-dir flan-t5-small',
    ),
    (
      'there/model.fp16.safetensors',
      'model.fp16.safetensors is there under another name',
    ),
    ('there', 'model.fp16.safetensors is there under another name'),
  ],
)
def test_hints(path, said, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  folder = by_hand.write(tmp_path / 'there')
  (folder / 'model.safetensors').rename(folder / 'model.fp16.safetensors')
  assert run(f'--input={path}', '--output=out', '--num_kv_heads=1') == 1
  assert said in capsys.readouterr().err
