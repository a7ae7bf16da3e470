"""The whole model: logits against the oracle, shapes, counts, gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x.analysis.costs import formulas
from gqa_t5x.model import network, sizes
from helpers import make_golden
from helpers import model_oracle as oracle


@functools.cache
def padded_logits(K):
  cfg = oracle.config(K)
  return np.asarray(oracle.forward(cfg)(oracle.params(cfg), oracle.batch()))


def assert_golden(logits, batch, name):
  expected, real = make_golden.stored()[name], batch['decoder_target_tokens'] > 0
  np.testing.assert_allclose(logits[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('K', oracle.KV_HEADS)
def test_padded_logits_equal_the_oracle_of_unpadded_examples(K):
  logits = padded_logits(K)
  assert_golden(logits, oracle.batch(), f'padded/logits/{K}')
  assert logits.shape == (oracle.B, oracle.T, oracle.V)
  assert logits.dtype == np.float32
  assert np.isfinite(logits).all()
  oracle.assert_logits(logits, oracle.config(K))


@pytest.mark.parametrize('K', oracle.KV_HEADS)
def test_packed_examples_equal_the_same_examples_unpacked(K):
  cfg = oracle.config(K)
  packed = np.asarray(oracle.forward(cfg)(oracle.params(cfg), oracle.packed_batch()))
  assert_golden(packed, oracle.packed_batch(), f'packed/logits/{K}')
  first, second = oracle.TARGET_LENGTHS[::2], oracle.TARGET_LENGTHS[1::2]
  unpacked = []
  for row, a, b in zip(packed, first, second, strict=True):
    unpacked += [row[:a], row[a : a + b]]
  for b, got in enumerate(unpacked):
    expected = oracle.expected_logits(cfg)[b]
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_initial_variables():
  """No collections but parameters and their axes; T5X would save or refuse others."""
  assert oracle.initial_shapes(oracle.config(2)).keys() == {'params', 'params_axes'}


@pytest.mark.parametrize(
  ('heads', 'expected'),
  [
    ({}, (4, 4, 4)),
    ({'num_kv_heads': 2}, (4, 2, 2)),
    ({'self_attention_num_kv_heads': 2}, (4, 2, 4)),
    ({'cross_attention_num_kv_heads': 1}, (4, 4, 1)),
    ({'encoder_num_kv_heads': 2}, (2, 4, 4)),
    ({'num_kv_heads': 2, 'self_attention_num_kv_heads': 4}, (4, 4, 2)),
    ({'num_kv_heads': 1, 'encoder_num_kv_heads': 1}, (1, 1, 1)),
  ],
)
def test_heads_of_each_kind(heads, expected):
  """Of the encoder, of self-attention and of cross-attention."""
  shapes = oracle.flat(oracle.initial_shapes(oracle.config(**heads))['params'])
  for path, K in zip(
    (
      'encoder/layers_0/attention',
      'decoder/layers_1/self_attention',
      'decoder/layers_1/encoder_decoder_attention',
    ),
    expected,
    strict=True,
  ):
    for name in ('key', 'value'):
      assert shapes[f'{path}/{name}/kernel'].shape == (oracle.D, K * oracle.H)


def test_each_kind_with_other_heads_equals_the_oracle():
  cfg = oracle.config(2, self_attention_num_kv_heads=1, encoder_num_kv_heads=2)
  logits = oracle.forward(cfg)(oracle.params(cfg), oracle.batch())
  oracle.assert_logits(logits, cfg)


def test_logits_via_embedding():
  """The same as an output projection that is the scaled table."""
  tied, separate = oracle.config(2, logits_via_embedding=True), oracle.config(2)
  params = oracle.params(tied)
  assert 'logits_dense' not in params['decoder']
  got = oracle.forward(tied)(params, oracle.batch())
  kernel = params['token_embedder']['embedding'].T / np.sqrt(oracle.D)
  decoder = params['decoder'] | {'logits_dense': {'kernel': kernel}}
  expected = oracle.forward(separate)(params | {'decoder': decoder}, oracle.batch())
  np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('K', oracle.KV_HEADS)
def test_a_position_bias_in_each_layer(K):
  """Equal tables are one; another table of one layer counts, also while decoding."""
  own, shared = oracle.config(K, relpos_per_layer=True), oracle.config(K)
  params = oracle.params(shared)
  stacks = {name: dict(params[name]) for name in ('encoder', 'decoder')}
  for stack in stacks.values():
    bias = stack.pop('relpos_bias')
    layers = [name for name in stack if name.startswith('layers_')]
    stack |= {name: stack[name] | {'relpos_bias': bias} for name in layers}
  expected = oracle.forward(shared)(params, oracle.batch())
  got = oracle.forward(own)(params | stacks, oracle.batch())
  np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)

  same = {name: dict(stack) for name, stack in stacks.items()}
  last = dict(stacks['decoder'][layers[-1]])
  stacks['decoder'][layers[-1]] = last
  last['relpos_bias'] = {'rel_embedding': last['relpos_bias']['rel_embedding'][::-1]}
  changed = params | stacks
  full = oracle.forward(own)(changed, oracle.batch())
  assert np.abs(full - expected).max() > 0.01
  prompts = oracle.prompt_batch()
  beams = [
    oracle.decode(cfg, 'beam_search', 3)(tree, prompts, 1)
    for cfg, tree in ((shared, params), (own, params | same))
  ]
  np.testing.assert_array_equal(beams[0][0], beams[1][0])
  # The score of a decode is its log-probability by the full forward pass.
  tokens, scores = oracle.decode(own)(changed, prompts, oracle.V)
  inputs = oracle.batch()['encoder_input_tokens']
  batch = {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(tokens[:, 0, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': np.ones_like(tokens[:, 0]),
  }
  log_probs = jax.nn.log_softmax(oracle.forward(own)(changed, batch))
  chosen = np.take_along_axis(
    np.asarray(log_probs), np.asarray(tokens)[:, 0, :, None], 2
  )
  np.testing.assert_allclose(scores[:, 0], chosen.sum((1, 2)), atol=1e-3, rtol=1e-4)


# bfloat16 keeps 8 bits. Eight residual branches of about five roundings each add up
# like a random walk: sqrt(40) * eps / 2 of the size of the logits.
BFLOAT16_ERROR = np.sqrt(40) * float(jnp.finfo(jnp.bfloat16).eps) / 2


def test_bfloat16_is_close_to_float32():
  K = 2
  cfg = oracle.config(K, dtype=jnp.bfloat16, float32_attention_logits=True)
  logits = np.asarray(oracle.forward(cfg)(oracle.params(cfg), oracle.batch()))
  assert logits.dtype == np.float32
  real = oracle.batch()['decoder_target_tokens'] > 0
  error = np.sqrt(np.mean((logits - padded_logits(K))[real] ** 2))
  size = np.sqrt(np.mean(padded_logits(K)[real] ** 2))
  assert 1e-4 < error / size < BFLOAT16_ERROR


def test_float16_of_padded_inputs():
  """The mask fits float16, whose least value is -65504."""
  cfg = oracle.config(2, dtype=jnp.float16)
  logits = np.asarray(oracle.forward(cfg)(oracle.params(cfg), oracle.batch()))
  real = oracle.batch()['decoder_target_tokens'] > 0
  error = np.abs(logits - padded_logits(2))[real].max()
  assert error < 0.02 * np.abs(padded_logits(2)).max()


def sum_of_logits(forward, params):
  return jnp.sum(forward(params, oracle.batch()))


def test_what_rematerialisation_computes_again():
  """'minimal' only what has no weights: two products an attention, of three; 'full'
  also query, key, value of each and two products an MLP, of two."""
  counts = {}
  for policy in network.REMAT_POLICIES:
    cfg = oracle.config(
      2, remat_policy=policy, num_encoder_layers=1, num_decoder_layers=1
    )
    loss = functools.partial(sum_of_logits, oracle.forward(cfg).__wrapped__)
    text = str(jax.make_jaxpr(jax.grad(loss))(oracle.params(cfg)))
    counts[policy] = text.count('dot_general')
  assert counts['minimal'] - counts['none'] == 2 * 3
  assert counts['full'] - counts['minimal'] >= 3 * 3 + 2 * 2


# Exact parameter counts by K, or by K and R; None: MHA, as T5.1.1 was released.
COUNTS = {
  'tiny': {None: 9_472_768, 1: 9_243_392, 2: 9_276_160},
  'mini': {None: 26_941_952, 1: 24_189_440, 4: 25_369_088},
  'small': {None: 76_961_152, 1: 71_718_272, 2: 72_766_848},
  'base': {None: 247_577_856, 1: 221_625_600},
  'large': {None: 783_150_080, 8: 732_818_432},
  'xl': {None: 2_849_757_184, 8: 2_547_767_296},
  'xxl': {None: 11_135_332_352, 8: 9_726_046_208, (1, 512): 9_927_372_800},
  't5_1_0_small': {None: 60_506_624},
  't5_1_0_base': {None: 222_903_552},
  't5_1_0_large': {None: 737_668_096},
  't5_1_0_3b': {None: 2_851_598_336},
  't5_1_0_11b': {None: 11_307_321_344},
  'mt5_small': {None: 300_176_768},
  'mt5_base': {None: 582_401_280},
  'mt5_large': {None: 1_229_581_312},
  'mt5_xl': {None: 3_742_619_648},
  'mt5_xxl': {None: 12_921_057_280},
  'byt5_small': {None: 299_637_760},
  'byt5_base': {None: 581_653_248},
  'byt5_large': {None: 1_228_183_552},
  'byt5_xl': {None: 3_737_801_728},
  'byt5_xxl': {None: 12_906_899_328},
  'umt5_small': {None: 306_601_984},
  'umt5_base': {None: 592_043_520},
  'umt5_large': {None: 1_242_449_920},
  'umt5_xl': {None: 3_768_356_864},
  'umt5_xxl': {None: 12_972_531_712},
  # Both have as many parameters (Shazeer 2019).
  'shazeer_mha': {None: 209_748_480},
  'shazeer_mqa': {None: 209_748_480},
}


@pytest.mark.parametrize(
  ('size', 'heads', 'expected'),
  [
    ('shazeer_mha', {}, (8, 8, 8)),
    ('shazeer_mqa', {}, (1, 1, 1)),
    ('shazeer_mqa', {'num_kv_heads': None}, (1, 1, 1)),
    ('shazeer_mqa', {'num_kv_heads': 8, 'encoder_num_kv_heads': 8}, (8, 8, 8)),
    ('base', {'num_kv_heads': 3}, (12, 3, 3)),
  ],
)
def test_heads_of_a_size(size, heads, expected):
  cfg = network.config(size, **heads)
  assert (cfg.encoder_kv, cfg.self_kv, cfg.cross_kv) == expected


def heads(key):
  K, R = key if isinstance(key, tuple) else (key, None)
  return {'num_kv_heads': K, 'kv_head_dim': R}


def test_parameter_counts():
  """Of every size, by the formula that equals the trees (test_costs.py)."""
  counts = {
    size: {
      key: formulas.num_parameters(network.config(size, **heads(key)))
      for key in expected
    }
    for size, expected in COUNTS.items()
  }
  assert counts == COUNTS
  assert sizes.SIZES.keys() == COUNTS.keys()


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (
      lambda: network.config('huge'),
      f"size='huge' is unknown; choose one of {', '.join(sizes.SIZES)}.",
    ),
    (
      lambda: oracle.config(remat_policy='some'),
      "remat_policy='some'; choose one of none, minimal, full.",
    ),
    (
      lambda: network.config('base', cross_attention_num_kv_heads=5),
      'num_heads=12 is not divisible by num_kv_heads=5;'
      ' choose one of 1, 2, 3, 4, 6, 12.',
    ),
  ],
)
def test_bad_configs(make, message):
  with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
    make()


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('num_kv_heads', 0, 'num_heads=8 is not divisible by num_kv_heads=0'),
    ('encoder_num_kv_heads', 0, 'num_heads=8 is not divisible by num_kv_heads=0'),
    ('cross_attention_num_kv_heads', -2, 'num_heads=8 is not divisible by'),
    ('kv_head_dim', 0, 'kv_head_dim=0 must be from 1 to .* = 8 \\* 16 = 128'),
    ('kv_head_dim', 129, 'kv_head_dim=129 must be from 1 to .* = 8 \\* 16 = 128'),
    ('num_decoder_layers', 0, 'num_decoder_layers=0 must be at least 1'),
    ('vocab_size', -5, 'vocab_size=-5 must be at least 1'),
    ('relpos_num_buckets', 2, 'relpos_num_buckets=2 must be at least 4'),
    ('relpos_max_distance', 16, 'below twice relpos_max_distance=16'),
  ],
)
def test_numbers_that_make_no_sense(name, value, message):
  with pytest.raises(ValueError, match=message):
    network.config('tiny', **{name: value})


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_padding_is_finite_in_narrow_dtypes(dtype):
  """Padding attends to nothing: all of its logits are masked."""
  cfg, batch = oracle.config(2, dtype=dtype), oracle.batch()
  logits = oracle.forward(cfg)(oracle.params(cfg), batch)
  expected = oracle.forward(oracle.config(2))(oracle.params(cfg), batch)
  assert np.isfinite(logits).all()
  real = batch['decoder_target_tokens'] > 0
  np.testing.assert_allclose(logits[real], expected[real], atol=0.3)
