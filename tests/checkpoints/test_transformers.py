"""Every family against the library transformers itself: the extra `oracle`.

Golden arrays of the same stand in without it (test_huggingface_function.py).
"""

import numpy as np
import pytest

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')

import gqa_t5x  # noqa: E402
from helpers import make_golden_huggingface as golden  # noqa: E402

SIZE = golden.SIZE | {'d_model': 16, 'num_heads': 4, 'd_ff': 20, 'num_layers': 2}
UNTIED = {'tie_word_embeddings': False}
GATED = UNTIED | {'feed_forward_proj': 'gated-gelu'}
# Family -> kind of model, configuration, whether it has an output projection.
FAMILIES = {
  't5_1_0': ('T5', {}, False),
  't5_1_1': ('T5', GATED, True),
  'flan_ul2': ('T5', GATED | {'feed_forward_proj': 'gated-silu'}, True),
  'mt5': ('MT5', {'vocab_size': 60}, True),
  'byt5': ('T5', GATED | {'vocab_size': 384, 'num_decoder_layers': 1}, True),
  'umt5': ('UMT5', UNTIED, True),
}
B, S, T = 2, 21, 9


def make(family):
  kind, config, has_projection = FAMILIES[family]
  return golden.random_model(kind, SIZE | config, has_projection, scale=0.3).eval()


def batch(vocab_size):
  rng = np.random.default_rng(1)
  inputs = rng.integers(2, min(vocab_size, 32), (B, S))
  inputs[1, 13:] = 0
  return inputs, rng.integers(2, min(vocab_size, 32), (B, T))


def theirs(model, inputs, targets):
  decoder = torch.tensor(np.pad(targets[:, :-1], ((0, 0), (1, 0))))
  ids = torch.tensor(inputs)
  with torch.no_grad():
    found = model(input_ids=ids, attention_mask=ids > 0, decoder_input_ids=decoder)
  return found.logits.float().numpy()


def ours(model, inputs, targets):
  return model._module.apply(
    {'params': model.params},
    inputs,
    np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    targets,
    enable_dropout=False,
  )


@pytest.mark.parametrize('shards', ['10GB', '5KB'])
@pytest.mark.parametrize('family', FAMILIES)
def test_logits_and_greedy_tokens(family, shards, tmp_path):
  model = make(family)
  model.save_pretrained(tmp_path, max_shard_size=shards)
  assert (tmp_path / 'model.safetensors').exists() == (shards == '10GB')
  got = gqa_t5x.load(tmp_path)
  pair = batch(got.config.vocab_size)
  np.testing.assert_allclose(ours(got, *pair), theirs(model, *pair), atol=1e-4)
  ids = torch.tensor(pair[0])
  expected = model.generate(
    input_ids=ids, attention_mask=ids > 0, max_new_tokens=8, do_sample=False
  )
  rows = [row[row > 0].tolist() for row in pair[0]]
  for tokens, row in zip(got.generate(rows, max_length=8), expected, strict=True):
    row = row[1:].tolist()
    assert tokens == (row[: row.index(1)] if 1 in row else row)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_16_bits(dtype, tmp_path):
  """The same numbers, in float32: compared with the rounded model in float32."""
  model = make('t5_1_1').to(getattr(torch, dtype))
  model.save_pretrained(tmp_path)
  pair = batch(32)
  expected = theirs(model.float(), *pair)
  np.testing.assert_allclose(ours(gqa_t5x.load(tmp_path), *pair), expected, atol=1e-4)


@pytest.mark.parametrize('K', [1, 2])
@pytest.mark.parametrize('family', FAMILIES)
def test_fewer_heads_are_repeated_heads(family, K, tmp_path):
  """By the mean: transformers computes it with each mean in the place of its heads."""
  model = make(family)
  model.save_pretrained(tmp_path)
  got = gqa_t5x.load(tmp_path).convert(K, 'mean')
  N, H = SIZE['num_heads'], SIZE['d_kv']
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if name.startswith('decoder') and name.endswith(('k.weight', 'v.weight')):
        groups = weight.reshape(K, N // K, H, -1)
        weight.copy_(groups.mean(1, keepdim=True).expand_as(groups).reshape_as(weight))
  pair = batch(got.config.vocab_size)
  np.testing.assert_allclose(ours(got, *pair), theirs(model, *pair), atol=1e-4)


def test_pytorch_files(tmp_path):
  """As before safetensors: with a copy of the embedding, and of the projection."""
  model = make('t5_1_0')
  model.save_pretrained(tmp_path)
  (tmp_path / 'model.safetensors').unlink()
  torch.save(model.state_dict(), tmp_path / 'pytorch_model.bin')
  got, pair = gqa_t5x.load(tmp_path), batch(32)
  assert got.config.logits_via_embedding
  np.testing.assert_allclose(ours(got, *pair), theirs(model, *pair), atol=1e-4)
