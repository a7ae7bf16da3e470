"""Equal to T5X where T5X is not installed: files that it wrote (make_golden.py)."""

import functools
import json

import make_golden
import model_oracle as oracle
import numpy as np
import pytest


@functools.cache
def golden():
  with np.load(make_golden.PATH) as file:
    return dict(file)


def test_the_file_is_small_and_made_from_these_batches():
  assert make_golden.PATH.stat().st_size < 200_000
  for kind, batch in (('padded', oracle.batch()), ('packed', oracle.packed_batch())):
    for name, value in batch.items():
      np.testing.assert_array_equal(golden()[f'{kind}/{name}'], value)


def test_parameters_of_all_heads_are_those_of_t5x():
  """Names, shapes, dtypes and logical axes."""
  expected = json.loads(str(golden()['parameters']))
  assert make_golden.describe(oracle.initial_shapes(oracle.config())) == expected
  assert len(expected) == 1 + (2 + 9) + (3 + 2 * 14)


@pytest.mark.parametrize('K', [1, 2])
def test_parameters_of_fewer_heads_differ_in_keys_and_values_alone(K):
  expected = json.loads(str(golden()['parameters']))
  for layer in range(oracle.DECODER_LAYERS):
    for kind in ('self_attention', 'encoder_decoder_attention'):
      for name in ('key', 'value'):
        path = f'decoder/layers_{layer}/{kind}/{name}/kernel'
        shape, axes = [oracle.D, K * oracle.H], ['embed', 'joined_kv_heads']
        expected[path] = [shape, 'float32', axes]
  assert make_golden.describe(oracle.initial_shapes(oracle.config(K))) == expected


@pytest.mark.parametrize('K', oracle.KV_HEADS)
def test_padded_logits(K):
  cfg = oracle.config(K)
  logits = np.asarray(oracle.forward(cfg)(oracle.params(cfg), oracle.batch()))
  expected = golden()[f'padded/logits/{K}']
  real = oracle.batch()['decoder_target_tokens'] > 0
  np.testing.assert_allclose(logits[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('K', oracle.KV_HEADS)
def test_packed_logits(K):
  cfg, batch = oracle.config(K), oracle.packed_batch()
  logits = np.asarray(oracle.forward(cfg)(oracle.params(cfg), batch))
  real = batch['decoder_target_tokens'] > 0
  expected = golden()[f'packed/logits/{K}']
  np.testing.assert_allclose(logits[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('K', oracle.KV_HEADS)
def test_greedy(K):
  """Our decoding equals T5X's temperature sampling at temperature 0."""
  cfg = oracle.config(K)
  tokens, scores = oracle.greedy(cfg)(
    oracle.params(cfg), oracle.batch()['encoder_input_tokens'], 1
  )
  np.testing.assert_array_equal(tokens, golden()[f'greedy/tokens/{K}'])
  np.testing.assert_allclose(scores, golden()[f'greedy/scores/{K}'], atol=1e-4)
