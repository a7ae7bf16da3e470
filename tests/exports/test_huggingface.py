"""Folders for transformers: the very tensors, and each key/value head repeated."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from gqa_t5x.checkpoints import weight_files
from helpers import (
  exports,
  golden_huggingface,
  huggingface_folders,
  model_oracle,
  trees,
)
from helpers.model_oracle import N

INPUTS = exports.inputs(3, 150, 40)


def weights(folder):
  """Name -> array of all tensors in a folder, by the library safetensors."""
  files = folder.glob('*.safetensors')
  return {n: x for file in files for n, x in safetensors.load_file(file).items()}


# Keys of config.json that change what is computed.
COMPUTED = (
  *('model_type', 'vocab_size', 'd_model', 'd_ff', 'd_kv', 'num_heads', 'num_layers'),
  *('num_decoder_layers', 'relative_attention_num_buckets', 'layer_norm_epsilon'),
  *('relative_attention_max_distance', 'eos_token_id', 'decoder_start_token_id'),
  *('pad_token_id', 'is_encoder_decoder', 'feed_forward_proj'),
)


@pytest.mark.parametrize('case', golden_huggingface.CASES)
def test_what_transformers_wrote_comes_out_again(case, tmp_path):
  there = golden_huggingface.write(tmp_path / 'there', case)
  exports.command(there, tmp_path / 'again', 'huggingface')
  expected, got = weights(there), weights(tmp_path / 'again')
  config, again = (
    json.loads((folder / 'config.json').read_text())
    for folder in (there, tmp_path / 'again')
  )
  if case in ('tied', 'mt5_tied', 'other_numbers'):  # Logits of their own, in T5X.
    expected['lm_head.weight'] = expected['shared.weight']
  if case == 'gated_silu':  # Scaled logits of their own: T5X's are divided beforehand.
    expected['lm_head.weight'] = expected['lm_head.weight'] / np.float32(8**0.5)
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(got[name], value, strict=True)
  changes = {'mt5': 't5'}  # The same model, by another name.
  config['model_type'] = changes.get(config['model_type'], config['model_type'])
  assert {n: again[n] for n in COMPUTED} == {n: config[n] for n in COMPUTED}
  assert again['tie_word_embeddings'] == ('lm_head.weight' not in got)


@pytest.mark.parametrize(('K', 'encoder'), [(1, N), (2, 1), (N, N)])
def test_heads_are_repeated_for_their_queries(K, encoder, tmp_path):
  """Query head n reads key/value head n // G: rows of k and v, by hand."""
  tree = trees.tiny_state(K, encoder_kv_heads=encoder, moments=False)
  source = trees.write_t5x(tmp_path / f'checkpoint_{trees.STEP}', tree)
  exports.command(source, tmp_path / 'out', 'huggingface')
  got, flat = weights(tmp_path / 'out'), dict(trees.flat(tree['target']))
  assert got.keys() == {name for name, _ in huggingface_folders.TABLE.values()}
  for path, (name, _) in huggingface_folders.TABLE.items():
    expected = flat[path]
    if expected.ndim == 2 and 'embedding' not in path.rpartition('/')[2]:
      expected = expected.T
    if path.endswith(('key/kernel', 'value/kernel')):
      G = N // (encoder if path.startswith('encoder') else K)
      H = trees.H
      rows = [expected[n // G * H : (n // G + 1) * H] for n in range(N)]
      expected = np.concatenate(rows)
    if path.endswith('rel_embedding'):
      expected = flat[path].T
    np.testing.assert_array_equal(got[name], expected, strict=True)


@pytest.mark.parametrize('K', [1, 2, N])
def test_a_latent_head_becomes_what_each_query_head_reads(K, tmp_path):
  """Of head n // G the R numbers, times the map of query head n."""
  cfg = model_oracle.config(K, kv_head_dim=5)
  source = exports.checkpoint(tmp_path / 'run', cfg)
  exports.command(source, tmp_path / 'out', 'huggingface')
  got, flat = weights(tmp_path / 'out'), model_oracle.flat(model_oracle.params(cfg))
  module = 'decoder/layers_1/encoder_decoder_attention'
  for name, there in {'key': 'k', 'value': 'v'}.items():
    shared = flat[f'{module}/{name}/kernel'].reshape(-1, K, 5)
    up = flat[f'{module}/{name}_up/kernel'].reshape(5, N, -1)
    heads = [shared[:, n * K // N] @ up[:, n] for n in range(N)]
    kernel = got[f'decoder.block.1.layer.1.EncDecAttention.{there}.weight'].T
    np.testing.assert_allclose(
      kernel, np.concatenate(heads, axis=1), rtol=1e-5, atol=1e-6
    )
  assert not [name for name in got if '_up' in name]


def oracle(folder):
  """The model of transformers; the test is skipped without it."""
  torch, transformers = map(pytest.importorskip, ('torch', 'transformers'))
  torch.set_grad_enabled(False)
  return torch, transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


CASES = {
  **{f'K={K}': dict(num_kv_heads=K) for K in (1, 2, N)},
  **{f'latent {K}': dict(num_kv_heads=K, kv_head_dim=5) for K in (1, 2)},
  **{name: dict(num_kv_heads=2, **sizes) for name, sizes in exports.FAMILY.items()},
}


@pytest.mark.parametrize('case', CASES)
def test_transformers_computes_the_same(case, tmp_path):
  pytest.importorskip('transformers')
  cfg = model_oracle.config(**CASES[case])
  tokens = exports.TOKENS if case == 'numbers' else {}
  start, eos = tokens.values() if tokens else (0, 1)
  source = exports.checkpoint(tmp_path / 'run', cfg, **tokens)
  exports.command(source, tmp_path / 'out', 'huggingface')
  torch, model = oracle(tmp_path / 'out')
  batch = model_oracle.batch()
  there = model(
    input_ids=torch.tensor(batch['encoder_input_tokens']).long(),
    attention_mask=torch.tensor(batch['encoder_input_tokens'] > 0),
    decoder_input_ids=torch.tensor(batch['decoder_input_tokens']).long(),
  ).logits.numpy()
  here = np.asarray(model_oracle.forward(cfg)(model_oracle.params(cfg), batch))
  real = batch['decoder_target_tokens'] > 0
  np.testing.assert_allclose(there[real], here[real], atol=1e-4)
  said = model.generate(
    input_ids=torch.tensor(INPUTS).long(),
    attention_mask=torch.tensor(INPUTS > 0),
    max_new_tokens=24,
    do_sample=False,
    use_cache=False,  # transformers 5.24 fails if the decoder is the deeper stack.
  ).numpy()
  expected, _ = exports.greedy(cfg, INPUTS, 24, start=start, eos=eos)
  np.testing.assert_array_equal(said[:, 0], start)
  np.testing.assert_array_equal(said[:, 1:], expected[:, : said.shape[1] - 1])


def test_large_models_are_in_several_files(tmp_path, monkeypatch):
  monkeypatch.setattr(weight_files, 'MOST_BYTES', 400)
  there = huggingface_folders.write(tmp_path / 'there')
  exports.command(there, tmp_path / 'out', 'huggingface')
  files = sorted((tmp_path / 'out').glob('*.safetensors'))
  assert len(files) > 3
  assert files[0].name == f'model-00001-of-{len(files):05}.safetensors'
  for file in files:
    tensors = safetensors.load_file(file).values()
    assert len(tensors) == 1 or sum(x.nbytes for x in tensors) <= 400
  index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
  expected = weights(there)
  assert index['weight_map'].keys() == expected.keys()
  assert index['metadata']['total_size'] == sum(x.nbytes for x in expected.values())
  # And our own reader finds them by the index.
  assert huggingface_folders.opened(tmp_path / 'out').keys() == (
    huggingface_folders.opened(there).keys()
  )
  for name, value in weights(tmp_path / 'out').items():
    np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize(
  ('given', 'flags', 'dtype'),
  [
    (np.float32, [], 'float32'),
    (ml_dtypes.bfloat16, [], 'bfloat16'),
    (np.float32, ['--dtype=float16'], 'float16'),
    (ml_dtypes.bfloat16, ['--dtype=float32'], 'float32'),
  ],
)
def test_dtype(given, flags, dtype, tmp_path):
  tensors = huggingface_folders.weights(given)
  there = huggingface_folders.write(tmp_path / 'there', tensors)
  exports.command(there, tmp_path / 'out', 'huggingface', *flags)
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['torch_dtype'] == dtype
  for name, value in weights(tmp_path / 'out').items():
    assert value.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(value, tensors[name].astype(dtype))


def test_several_dtypes_become_float32(tmp_path):
  """As after a conversion of 16 bits, whose new kernels are float32."""
  tensors = huggingface_folders.weights(np.float16)
  name = 'decoder.block.1.layer.0.SelfAttention.k.weight'
  tensors[name] = tensors[name].astype(np.float32)
  there = huggingface_folders.write(tmp_path / 'there', tensors)
  exports.command(there, tmp_path / 'out', 'huggingface')
  assert {x.dtype.name for x in weights(tmp_path / 'out').values()} == {'float32'}


def test_generation_config_and_tokenizer_travel(tmp_path):
  there = huggingface_folders.write(
    tmp_path / 'there', eos_token_id=7, decoder_start_token_id=3
  )
  names = ('tokenizer.json', 'spiece.model', 'tokenizer_config.json')
  for name in names:
    (there / name).write_text(name)
  exports.command(there, tmp_path / 'out', 'huggingface')
  for name in names:
    assert (tmp_path / 'out' / name).read_text() == name
  text = (tmp_path / 'out' / 'generation_config.json').read_text()
  expected = {'pad_token_id': 0, 'eos_token_id': 7, 'decoder_start_token_id': 3}
  assert json.loads(text) == expected


@pytest.mark.parametrize(
  ('name', 'there'),
  [('my.json', 'tokenizer.json'), ('vocabulary.model', 'spiece.model')],
)
def test_a_vocabulary_that_is_given(name, there, tmp_path):
  source = exports.checkpoint(tmp_path / 'run', model_oracle.config(2))
  (tmp_path / name).write_text('tokens')
  flag = f'--vocabulary={tmp_path / name}'
  exports.command(source, tmp_path / 'out', 'huggingface', flag)
  assert (tmp_path / 'out' / there).read_text() == 'tokens'


def test_bad_input(tmp_path):
  source = exports.checkpoint(tmp_path / 'run', model_oracle.config(2))
  out = tmp_path / 'out'
  said = exports.refused(source, out, 'huggingface', dtype='int8')
  assert said == '--dtype=int8 is unknown; choose one of float32, bfloat16, float16'
  said = exports.refused(source, out, 'huggingface', vocabulary='none.model')
  assert said == '--vocabulary=none.model: there is no such file'
