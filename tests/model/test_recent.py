"""Keys and values beside the cache, against arrays by hand and a loop without them."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x.decoding import generate
from gqa_t5x.model import network, recent, sharding
from helpers import model_oracle as oracle

B, n, K, H = 1, 2, 1, 2
# Three positions of two beams: key 100 s + 10 beam + 0 or 1.
RECENT = np.array(
  [
    [[[[0, 1]], [[10, 11]]]],
    [[[[100, 101]], [[110, 111]]]],
    [[[[200, 201]], [[210, 211]]]],
  ],
  np.float32,
)
IN_ORDER = np.array(
  [[0, 1], [10, 11], [100, 101], [110, 111], [200, 201], [210, 211]], np.float32
)


def a_cache(S, index):
  layer = {
    'cached_key': jnp.zeros((B, K, H, S * n)),
    'cached_value': jnp.zeros((B, K, S * n, H), jnp.bfloat16),
  }
  decoder = {'cache_index': jnp.asarray(index), 'layers_0': {'self_attention': layer}}
  return {'decoder': decoder}


def test_in_order():
  """Beams of a position are neighbours."""
  keys = recent.in_order('recent_key', jnp.asarray(RECENT))
  np.testing.assert_array_equal(keys[0, 0], IN_ORDER.T)
  values = recent.in_order('recent_value', jnp.asarray(RECENT))
  np.testing.assert_array_equal(values[0, 0], IN_ORDER)


@pytest.mark.parametrize(('S', 'positions'), [(40, 16), (16, 16), (5, 5)])
def test_beside(S, positions):
  decoder = recent.beside(a_cache(S, 0), n)['decoder']
  np.testing.assert_array_equal(decoder['recent_positions'], np.arange(positions))
  layer = decoder['layers_0']['self_attention']
  assert layer['recent_key'].shape == (positions, B, n, K, H)
  assert layer['recent_value'].dtype == jnp.bfloat16
  assert layer['cached_key'].shape == (B, K, H, S * n)


@pytest.mark.parametrize('now', [3, 4, 5])
def test_move(now, monkeypatch):
  """What is recent goes where it belongs, and what comes next is recent."""
  monkeypatch.setattr(recent, 'POSITIONS', 3)
  cache = recent.beside(a_cache(6, 2), n)
  decoder = cache['decoder']
  layer = decoder['layers_0']['self_attention']
  layer['recent_key'] = jnp.asarray(RECENT)
  layer['recent_value'] = jnp.asarray(RECENT, jnp.bfloat16)
  decoder['cache_index'] = jnp.asarray(now)
  moved = recent.move(cache)['decoder']
  np.testing.assert_array_equal(moved['recent_positions'], [now, now + 1, now + 2])
  expected = np.zeros((12, 2))
  expected[4:10] = IN_ORDER
  layer = moved['layers_0']['self_attention']
  np.testing.assert_array_equal(layer['cached_key'][0, 0], expected.T)
  np.testing.assert_array_equal(layer['cached_value'][0, 0], expected)


def test_key_positions():
  got = recent.key_positions(5, jnp.asarray([2, 3, 4]))
  np.testing.assert_array_equal(got, [0, 1, *[recent.NEVER] * 3, 2, 3, 4])


@functools.cache
def decoded(kind, platform, positions):
  """Decodes a little more than a cache of two moves, with forced tokens."""
  cfg = oracle.config(2)
  decode_fn, more = {
    'greedy': (generate.greedy, {}),
    'samples': (generate.temperature_sample, {'num_decodes': 3, 'topk': 4}),
    'beams': (generate.beam_search, {'num_decodes': 3}),
  }[kind]
  batch = oracle.batch()
  prompts = np.zeros((len(oracle.TARGET_LENGTHS), 7), np.int32)
  prompts[0, 1:4] = [5, 3, 8]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'platform', lambda: platform)
    patch.setattr(recent, 'POSITIONS', positions)
    run = oracle.jit(
      lambda params, inputs: generate.generate(
        network.Transformer(cfg), params, inputs, prompts, decode_fn, eos_id=1, **more
      )
    )
    return run(oracle.params(cfg), batch['encoder_input_tokens'])


@pytest.mark.parametrize('positions', [1, 3, 16])
@pytest.mark.parametrize('kind', ['greedy', 'samples', 'beams'])
def test_the_same_is_decoded(kind, positions):
  tokens, scores = decoded(kind, 'tpu', positions)
  expected_tokens, expected_scores = decoded(kind, 'cpu', 16)
  assert len(np.unique(expected_tokens)) > 5
  np.testing.assert_array_equal(tokens, expected_tokens)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)
