"""Int8 against NumPy: the rounding, the parameters, attention, and whole decodes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gqa_t5x.decoding import generate
from gqa_t5x.model import attention, network, quantize, sharding
from helpers import model_oracle as oracle

B, S, V = oracle.B, oracle.S, oracle.V
HEADS = [(K, None) for K in oracle.KV_HEADS] + [(1, 15), (2, 9)]


def rounded(x, axis):
  """The rounding, one group of numbers that share a scale after the other."""
  x = np.moveaxis(np.asarray(x).astype(np.float32), axis, -1)
  codes, scales = np.zeros(x.shape, np.int32), np.zeros(x.shape[:-1], np.float32)
  for i in np.ndindex(scales.shape):
    scales[i] = scale = np.max(np.abs(x[i])) * np.float32(1 / 127)
    if scale > 0:
      codes[i] = [round(float(number / scale)) for number in x[i]]
  return np.moveaxis(codes, -1, axis), np.expand_dims(scales, axis)


def dequantized(x, axis):
  codes, scales = rounded(x, axis)
  return codes.astype(np.float32) * scales


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('axis', [0, 1])
def test_rounding(dtype, axis):
  """Zeros, an outlier, ties, numbers so small that their scale is not normal."""
  x = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
  x[4] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -127, 64, 3]
  x[2], x[:, 4], x[3, 1] = 0, 0, 5e3
  x[5] *= 1e-3
  x = jnp.asarray(x, dtype)
  got = jax.jit(quantize.to_int8, static_argnums=1)(x, axis)
  codes, scale = rounded(x, axis)
  assert (got.codes.dtype, got.scale.dtype) == (jnp.int8, jnp.float32)
  np.testing.assert_array_equal(got.codes, codes)
  np.testing.assert_array_equal(got.scale, scale)
  assert np.abs(got.codes).max() == 127
  assert (np.asarray(got.scale) == 0).any()


@pytest.mark.parametrize('bad', [np.inf, np.nan])
def test_what_is_not_finite_stays_so(bad):
  """It must not become a number."""
  codes, scale = quantize.to_int8(jnp.array([[1.0, bad], [1.0, 2.0]]), 1)
  finite = np.isfinite(codes * scale).all(axis=1)
  np.testing.assert_array_equal(finite, [False, True])


def test_numbers_at_the_end_of_float32():
  got = quantize.to_int8(jnp.array([[2e-43, 1e-44], [3e38, -3e38]]), 1)
  assert np.isfinite(got.scale).all()
  np.testing.assert_array_equal(got.codes[1], [127, -127])


def test_unknown_quantization():
  message = "quantize='int4' is unknown; choose None or one of weights, cache, weights_"
  with pytest.raises(ValueError, match=message):
    oracle.config(quantize='int4')


@pytest.mark.parametrize('call', [{}, {'method': 'encode'}])
def test_training_in_int8(call):
  module = network.Transformer(oracle.config(quantize='cache'))
  ones = np.ones((1, 2), np.int32)
  args = [ones] if call else [ones] * 3
  params = oracle.params(oracle.config())
  with pytest.raises(ValueError, match="quantize='cache' is for decoding: training"):
    module.apply({'params': params}, *args, **call)


# --- Parameters ---------------------------------------------------------------


@pytest.mark.parametrize('tied', [False, True])
def test_parameters(tied):
  """Kernels by column, the embedding by token if it makes the logits, no more."""
  cfg = oracle.config(2, kv_head_dim=9, logits_via_embedding=tied)
  params = oracle.params(cfg)
  before = oracle.flat(params)
  after = oracle.flat(quantize.params_to_int8(params))
  names = oracle.flat(quantize.axes_to_int8(names_of(cfg)))
  assert after.keys() == names.keys()
  for name, x in before.items():
    leaf = name.rpartition('/')[2]
    if leaf != 'kernel' and not (tied and leaf == 'embedding'):
      assert after[name] is x
      continue
    axis = 1 if leaf == 'embedding' else 0
    codes, scale = rounded(x, axis)
    np.testing.assert_array_equal(after.pop(name), codes)
    np.testing.assert_array_equal(after.pop(f'{name}_scale'), scale.squeeze(axis))
    spec = names[name]
    assert names[f'{name}_scale'] == PartitionSpec(spec[1 - axis])
  assert after.keys() <= before.keys()
  assert quantize.are_int8(quantize.params_to_int8(params))
  assert not quantize.are_int8(params)


def names_of(cfg):
  variables = oracle.axis_names(oracle.initial_shapes(cfg))
  return oracle.traverse_util.unflatten_dict(
    {name: PartitionSpec(*axes) for name, axes in variables.items()}, sep='/'
  )


@functools.cache
def rounded_params(cfg):
  """Float parameters whose values are those of int8, by NumPy."""
  flat = oracle.flat(oracle.params(cfg))
  for name, x in flat.items():
    if name.endswith('kernel'):
      flat[name] = dequantized(x, 0)
    elif name.endswith('/embedding') and cfg.logits_via_embedding:
      flat[name] = dequantized(x, 1)
  return oracle.traverse_util.unflatten_dict(flat, sep='/')


@pytest.mark.parametrize(('K', 'R'), HEADS)
def test_logits_of_int8_weights(K, R):
  """They equal the oracle's of the rounded parameters."""
  cfg = oracle.config(K, kv_head_dim=R)
  params = quantize.params_to_int8(oracle.params(cfg))
  logits = np.asarray(oracle.forward(cfg)(params, oracle.batch()))
  for got, (inputs, targets) in zip(logits, oracle.examples(), strict=True):
    shifted = oracle.shift_right(targets)
    expected = oracle.oracle_logits(rounded_params(cfg), inputs, shifted)
    np.testing.assert_allclose(got[: len(targets)], expected, atol=1e-4, rtol=1e-4)
    exact = oracle.oracle_logits(oracle.params(cfg), inputs, shifted)
    assert np.abs(expected - exact).max() > 1e-3


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_logits_of_a_tied_embedding(dtype):
  """In bfloat16, too, they are those of rounded parameters, to its precision."""
  cfg = oracle.config(
    2, logits_via_embedding=True, mlp_activations=('relu',), dtype=jnp.dtype(dtype)
  )
  params = quantize.params_to_int8(oracle.params(cfg))
  got = oracle.forward(cfg)(params, oracle.batch())
  assert got.dtype == jnp.float32
  expected = oracle.forward(dataclasses.replace(cfg, dtype=jnp.float32))(
    rounded_params(cfg), oracle.batch()
  )
  atol = 1e-4 if dtype == 'float32' else 0.05 * np.abs(expected).max()
  np.testing.assert_allclose(got, expected, atol=atol)


# --- Keys and values ----------------------------------------------------------


@pytest.mark.parametrize('K', oracle.KV_HEADS)
@pytest.mark.parametrize('T', [1, 3])
def test_attention(K, T, monkeypatch):
  """With keys and values of zeros, an outlier, and pending ones; as on a TPU, too."""
  rng = np.random.default_rng(K)
  N, R, P = oracle.N, 5, 2
  q = rng.standard_normal((B, T, N, R)).astype(np.float32)
  k, v, new_k, new_v = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((B, K, R, S), (B, K, S, R), (B, K, R, P), (B, K, P, R))
  )
  k[0, 0, :, 2], v[0, 0, 3], k[1, 0, 2, 1] = 0, 0, 80

  def int8(key, value):
    value = quantize.to_int8(value, 3)
    scale = jnp.swapaxes(value.scale, 2, 3)
    return quantize.to_int8(key, 2), quantize.Int8(value.codes, scale)

  expected = np.zeros((B, T, N, R))
  keys = np.concatenate([dequantized(k, 2), dequantized(new_k, 2)], 3)
  values = np.concatenate([dequantized(v, 3), dequantized(new_v, 3)], 2)
  for b, t, n in np.ndindex(B, T, N):
    logits = q[b, t, n] @ keys[b, n * K // N]
    expected[b, t, n] = oracle.softmax(logits) @ values[b, n * K // N]
  for platform in ('cpu', 'tpu'):
    monkeypatch.setattr(sharding, 'platform', lambda platform=platform: platform)
    got = attention.grouped_attention(q, *int8(k, v), pending=int8(new_k, new_v))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(('K', 'R'), HEADS)
def test_what_is_kept(K, R):
  """Of the inputs: int8, a scale for each position and head, and within half of it."""
  cfg = oracle.config(K, kv_head_dim=R)
  inputs = oracle.batch()['encoder_input_tokens']
  _, floats = prepare(cfg)(oracle.params(cfg), inputs)
  int8_cfg = dataclasses.replace(cfg, quantize='cache')
  cache, kept = prepare(int8_cfg)(oracle.params(cfg), inputs)
  for layer in range(oracle.DECODER_LAYERS):
    x, y = (
      tree['encoded_kv']['decoder'][f'layers_{layer}']['encoder_decoder_attention']
      for tree in (floats, kept)
    )
    for name, axis in (('cached_key', 2), ('cached_value', 3)):
      codes, scale = rounded(x[name], axis)
      assert y[name].dtype == jnp.int8
      assert y[f'{name}_scale'].shape == (B, K, 1, S)
      got_scale = y[f'{name}_scale'] if axis == 2 else y[f'{name}_scale'].mT
      np.testing.assert_allclose(got_scale, scale, rtol=1e-5)
      different = np.asarray(y[name]) != codes  # Ties, by the last bit of a float.
      assert different.mean() < 0.01
      assert np.abs(np.asarray(y[name]) - codes).max() <= 1
  for x in jax.tree.leaves(cache['decoder']['layers_0']):
    assert not np.any(x)


@functools.cache
def prepare(cfg):
  module = network.Transformer(cfg)
  return oracle.jit(lambda p, x: generate.prepare(module, p, x, 5))


# --- Whole decodes ------------------------------------------------------------


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize(('K', 'R'), HEADS)
def test_steps_equal_the_full_pass(K, R, platform, monkeypatch):
  """The score of a decode is that of its tokens in one pass, by the same rounding.

  'tpu' has pending keys and values, and kernels in int8 in each step.
  """
  cfg = oracle.config(K, kv_head_dim=R, quantize='weights_and_cache')
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  oracle.decode.cache_clear()
  params = oracle.params(cfg)
  for name, num_decodes in (('greedy', 1), ('beam_search', 3)):
    more = {'alpha': 0.0} if num_decodes > 1 else {}
    decode = oracle.decode(cfg, name, num_decodes, **more)
    tokens, scores = decode(params, oracle.prompt_batch(), -1)  # No end marker.
    monkeypatch.setattr(sharding, 'platform', lambda: 'cpu')
    expected = np.stack([score(cfg, tokens[:, i]) for i in range(num_decodes)], 1)
    np.testing.assert_allclose(scores, expected, atol=5e-3)
    exact = dataclasses.replace(cfg, quantize=None)
    assert np.abs(score(exact, tokens[:, -1]) - expected[:, -1]).max() > 1e-2
    monkeypatch.setattr(sharding, 'platform', lambda: platform)
  oracle.decode.cache_clear()


def score(cfg, tokens):
  """The log-probability of tokens `[B, T]`, in one pass."""
  tokens = np.asarray(tokens)
  params = quantize.prepared(oracle.params(cfg), cfg.quantize)
  batch = {
    'encoder_input_tokens': oracle.batch()['encoder_input_tokens'],
    'decoder_input_tokens': np.pad(tokens[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': np.ones_like(tokens),
  }
  log_probs = jax.nn.log_softmax(oracle.forward(cfg)(params, batch))
  return np.take_along_axis(log_probs, tokens[..., None], 2).sum((1, 2))


def test_samples_are_drawn_in_int8():
  """Several of an input, and those of an int8 tree are those of a float one."""
  cfg = oracle.config(2, quantize='weights_and_cache')
  decode = oracle.decode(cfg, 'temperature_sample', 3, topk=5)
  params, prompts = oracle.params(cfg), oracle.prompt_batch()
  tokens, scores = decode(params, prompts, 1)
  again = decode(quantize.params_to_int8(params), prompts, 1)
  np.testing.assert_array_equal(tokens, again[0])
  np.testing.assert_allclose(scores, again[1], rtol=1e-5)
  plain = oracle.decode(oracle.config(2), 'temperature_sample', 3, topk=5)
  assert np.abs(plain(params, prompts, 1)[1] - scores).max() > 1e-3
