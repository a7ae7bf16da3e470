"""T5X's own decoding with our network; runs where T5X is installed.

For fewer K/V heads the reference is T5X's network with every K/V head repeated.
"""

import functools

import make_golden
import model_oracle as oracle
import numpy as np
import pytest

from gqa_t5x import network

pytest.importorskip('t5x.examples.t5.network')


def assert_decodes(got, expected):
  """Compares tokens and scores `[B, num_decodes]` of two decodes."""
  np.testing.assert_array_equal(got[0], expected[0])
  np.testing.assert_allclose(got[1], expected[1], atol=1e-4, rtol=1e-4)


def decode_both(K, *args, batch=None, **kwargs):
  """Returns (ours, T5X's): tokens and scores of each."""
  batch = batch or make_golden.decode_batch()
  cfg = oracle.config(K)
  ours = make_golden.t5x_decode(network.Transformer(cfg), *args, **kwargs)
  t5x = make_golden.t5x_decode(make_golden.t5x_module(), *args, **kwargs)
  return ours(oracle.params(cfg), batch), t5x(make_golden.t5x_params(K), batch)


@pytest.mark.parametrize('K', oracle.KV_HEADS)
def test_greedy_sampling(K):
  """T5X's temperature_sample gives the same with both networks, and so does ours."""
  ours, t5x = decode_both(K, 'greedy')
  assert_decodes(ours, t5x)
  cfg = oracle.config(K)
  inputs = make_golden.decode_batch()['encoder_input_tokens']
  tokens, scores = oracle.greedy(cfg)(oracle.params(cfg), inputs, 1)
  assert_decodes((tokens[:, None], scores[:, None]), t5x)


@pytest.mark.parametrize('K', oracle.KV_HEADS)
def test_beam_search(K):
  """Three beams a row, reordered from step to step."""
  (tokens, scores), t5x = decode_both(K, 'beam', num_decodes=3)
  assert tokens.shape == (oracle.B, 3, oracle.DECODE_LENGTH)
  assert (np.diff(scores) > 0).all()
  assert all(len(np.unique(row, axis=0)) == 3 for row in np.asarray(tokens))
  assert_decodes((tokens, scores), t5x)


@functools.cache
def prompts():
  rng = np.random.default_rng(6)
  return [rng.integers(2, oracle.V, length) for length in (3, 0, 5, 1)]


@pytest.mark.parametrize('K', oracle.KV_HEADS)
def test_prompt(K):
  """Filled in one pass, it gives what T5X gives by forcing it token by token, and
  what the full forward pass gives."""
  batch = make_golden.decode_batch(prompts=prompts())
  (tokens, scores), t5x = decode_both(K, 'greedy', prompted=True, batch=batch)
  assert_decodes((tokens, scores), t5x)
  params = oracle.params(oracle.config(K))
  for b, ((inputs, _), prompt) in enumerate(
    zip(oracle.examples(), prompts(), strict=True)
  ):
    row = np.asarray(tokens)[b, 0]
    row = row[: np.argmax(row == 1) + 1] if 1 in row else row
    logits = oracle.oracle_logits(params, inputs, oracle.shift_right(row))
    n = len(prompt)
    np.testing.assert_array_equal(row[:n], prompt)
    np.testing.assert_array_equal(row[n:], logits.argmax(-1)[n:])
    log_probs = np.log(oracle.softmax(logits))[np.arange(len(row)), row][n:]
    assert float(scores[b, 0]) == pytest.approx(log_probs.sum(), abs=1e-4)


def test_many_samples_after_a_prompt():
  """Greedy samples of a row are all alike: the cache index is repeated for each."""
  batch = make_golden.decode_batch(prompts=prompts())
  cfg = oracle.config(2)
  module, params = network.Transformer(cfg), oracle.params(cfg)
  one, _ = make_golden.t5x_decode(module, 'greedy', prompted=True)(params, batch)
  three, _ = make_golden.t5x_decode(module, 'greedy', num_decodes=3, prompted=True)(
    params, batch
  )
  np.testing.assert_array_equal(three, np.repeat(one, 3, axis=1))
