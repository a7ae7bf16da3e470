"""Step by step equals all at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x.analysis.costs import formulas
from gqa_t5x.decoding import beam_search, generate, sampling
from gqa_t5x.model import network
from helpers import model_oracle as oracle

B, T = oracle.B, oracle.T
PROMPT_LENGTHS = np.array([3, 0, 4, 1])


def empty_cache(module, params, inputs, length):
  """Makes the cache as T5X does: by a call on tokens that are all ones."""
  ones = jnp.ones((inputs.shape[0], length), jnp.int32)
  _, variables = module.apply(
    {'params': params},
    encoder_input_tokens=jnp.ones_like(inputs),
    decoder_input_tokens=ones,
    decoder_target_tokens=ones,
    mutable=['cache'],
    decode=True,
    enable_dropout=False,
  )
  return variables['cache']


@functools.cache
def prefilled_steps(cfg, index_shape):
  """Compiles T5X's decoding: `(params, batch, starts)` -> logits and the cache.

  A prompt of starts[b] tokens is filled in at once; then row b is fed its tokens from
  there on, one at a time. Logits are those of the prompt and `[step, B, V]`.
  """
  module = network.Transformer(cfg)

  @oracle.jit
  def run(params, batch, starts):
    inputs, tokens = batch['encoder_input_tokens'], batch['decoder_input_tokens']
    encoded = module.apply(
      {'params': params}, inputs, enable_dropout=False, method=module.encode
    )

    def call(cache, tokens, **options):
      logits, variables = module.apply(
        {'params': params, 'cache': cache},
        encoded,
        inputs,
        tokens,
        jnp.ones_like(tokens),
        enable_dropout=False,
        mutable=['cache'],
        method=module.decode,
        **options,
      )
      return logits, variables['cache']

    prompt = jnp.where(jnp.arange(T) <= starts[:, None], tokens, 0)
    prompt_logits, cache = call(
      empty_cache(module, params, inputs, T),
      prompt,
      prefill=True,
      prefill_lengths=jnp.sum(prompt != 0, axis=1),
    )
    index = cache['decoder']['cache_index'].reshape(index_shape)
    cache = cache | {'decoder': cache['decoder'] | {'cache_index': index}}

    def step(cache, i):
      position = jnp.minimum(starts + i, T - 1)
      token = jnp.take_along_axis(tokens, position[:, None], axis=1)
      logits, cache = call(cache, token, decode=True, max_decode_length=T)
      return cache, logits[:, 0]

    cache, logits = jax.lax.scan(step, cache, jnp.arange(T))
    return prompt_logits, logits, cache

  return run


@pytest.mark.parametrize(
  ('K', 'R', 'index_shape'),
  [(1, None, (B,)), (2, None, (2, 2)), (4, None, (B,)), (1, 15, (B,)), (2, 4, (2, 2))],
)
def test_steps_after_a_prefill_equal_the_full_forward_pass(K, R, index_shape):
  """Prompts of 3, 0, 4 and 1 tokens after the start token, then steps."""
  cfg = oracle.config(K, kv_head_dim=R)
  batch = oracle.batch(pairs_of_full_length())
  expected = expected_of_full_length(cfg)
  run = prefilled_steps(cfg, index_shape)
  prefilled, steps, cache = run(oracle.params(cfg), batch, PROMPT_LENGTHS)
  for b, start in enumerate(PROMPT_LENGTHS):
    np.testing.assert_allclose(
      prefilled[b, : start + 1], expected[b][: start + 1], atol=1e-4, rtol=1e-4
    )
    np.testing.assert_allclose(
      steps[: T - start, b], expected[b][start:], atol=1e-4, rtol=1e-4
    )
  np.testing.assert_array_equal(
    np.ravel(cache['decoder']['cache_index']), PROMPT_LENGTHS + T
  )


@functools.cache
def pairs_of_full_length():
  rng = np.random.default_rng(5)
  return [(inputs, rng.integers(2, oracle.V, T)) for inputs, _ in oracle.examples()]


@functools.cache
def expected_of_full_length(cfg):
  return [
    oracle.oracle_logits(oracle.params(cfg), x, oracle.shift_right(y))
    for x, y in pairs_of_full_length()
  ]


@functools.cache
def kept_steps(cfg):
  """Compiles `(params, batch) -> ([step, B, V], first cache, kept K and V)`."""
  module = network.Transformer(cfg)

  @oracle.jit
  def run(params, batch):
    inputs = batch['encoder_input_tokens']
    first_cache, kept = generate.prepare(module, params, inputs, T)

    def step(cache, token):
      logits, cache = generate.step(module, params, kept, cache, inputs, token, T)
      return cache, logits

    _, logits = jax.lax.scan(step, first_cache, batch['decoder_input_tokens'].T)
    return logits, first_cache, kept

  return run


@pytest.mark.parametrize(
  ('K', 'R'), [*((K, None) for K in oracle.KV_HEADS), *oracle.LATENT]
)
def test_steps_with_kept_cross_attention_equal_the_full_forward_pass(K, R):
  cfg = oracle.config(K, kv_head_dim=R)
  steps, _, _ = kept_steps(cfg)(oracle.params(cfg), oracle.batch())
  oracle.assert_logits(np.swapaxes(steps, 0, 1), cfg)


@pytest.mark.parametrize('R', [None, 9])
def test_the_cache_made_on_ones_holds_no_trace_of_them(R):
  K, size = 2, R or oracle.H
  cfg = oracle.config(K, kv_head_dim=R)
  make = oracle.jit(functools.partial(empty_cache, network.Transformer(cfg), length=T))
  leaves = oracle.flat(
    make(oracle.params(cfg), inputs=oracle.batch()['encoder_input_tokens'])
  )
  assert len(leaves) == 1 + 2 * oracle.DECODER_LAYERS
  shapes = {
    'cache_index': (),
    'cached_key': (B, K, size, T),
    'cached_value': (B, K, T, size),
  }
  for name, leaf in leaves.items():
    assert leaf.shape == shapes[name.rpartition('/')[2]], name
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf), err_msg=name)


def traced_step(cfg):
  """Returns a step's program, and what is kept for it; nothing is computed."""
  module = network.Transformer(cfg)
  params = oracle.initial_shapes(cfg)['params']
  inputs, token = jnp.ones((B, oracle.S), jnp.int32), jnp.ones(B, jnp.int32)
  prepare = functools.partial(generate.prepare, module, max_length=T)
  cache, kept = jax.eval_shape(prepare, params, inputs)
  step = functools.partial(generate.step, module, max_length=T)
  return str(jax.make_jaxpr(step)(params, kept, cache, inputs, token)), kept


@pytest.mark.parametrize(
  'fields', [{}, {'logits_via_embedding': True}, {'kv_head_dim': 9}]
)
def test_all_kernels_of_a_step_are_transposed_on_a_cpu(fields):
  """That they change nothing is seen where steps equal the full forward pass."""
  cfg = oracle.config(2, **fields)
  program, kept = traced_step(cfg)
  kernels = jax.tree.leaves(kept['transposed'])
  assert sum(x.size for x in kernels) == formulas.step_kernels(cfg)
  assert program.count('optimization_barrier') == sum(x.ndim == 2 for x in kernels)
  of_heads = [x.shape for x in kernels if x.ndim == 3]
  R, (N, H) = cfg.kv_head_dim, (oracle.N, oracle.H)
  modules = 2 * oracle.DECODER_LAYERS if R else 0
  assert sorted(of_heads) == sorted(modules * [(N, R, H), (N, H, R)])


@pytest.mark.parametrize('R', [None, 9])
def test_bfloat16_steps_equal_bfloat16_forward(R):
  """Both round alike, but for the order of sums: sqrt(40) roundings, as for the
  whole model against float32 (test_network.py)."""
  fields = {'dtype': jnp.bfloat16, 'float32_attention_logits': True, 'kv_head_dim': R}
  cfg = oracle.config(2, **fields)
  params, batch = oracle.params(oracle.config(2, kv_head_dim=R)), oracle.batch()
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  steps, cache, _ = kept_steps(cfg)(params, batch)
  full = np.asarray(oracle.forward(cfg)(params, batch))
  assert {x.dtype for x in jax.tree.leaves(cache) if x.ndim} == {jnp.dtype('bfloat16')}
  real = batch['decoder_target_tokens'] > 0
  difference = (np.swapaxes(steps, 0, 1) - full)[real]
  relative = np.sqrt(np.mean(difference**2) / np.mean(full[real] ** 2))
  assert relative < np.sqrt(40) * float(jnp.finfo(jnp.bfloat16).eps) / 2


def test_decoding_has_float32_attention_logits_in_any_case():
  """Whether they are asked for or not, a step is the same program."""
  asked_for, not_asked_for = (
    traced_step(oracle.config(2, dtype=jnp.bfloat16, float32_attention_logits=given))[0]
    for given in (True, False)
  )
  assert asked_for == not_asked_for
  assert f'f32[{B},2,2,1,{T}]' in asked_for


def test_packed_examples_cannot_be_decoded():
  module, tokens = network.Transformer(oracle.config(2)), jnp.ones((B, 1), jnp.int32)
  with pytest.raises(ValueError, match='packed examples cannot be decoded; set pack'):
    module.apply(
      {},
      jnp.zeros((B, oracle.S, oracle.D)),
      tokens,
      tokens,
      tokens,
      encoder_segment_ids=tokens,
      decode=True,
      method=module.decode,
    )


# Inputs are encoded a few at a time.


@pytest.mark.parametrize(
  ('batch', 'length', 'copies', 'expected'),
  [
    (8, 512, 1, 8),
    (64, 2048, 1, 8),
    (60, 2048, 1, 6),
    (4, 2**15, 1, 1),
    (64, 2048, 8, 64),
    (60, 2048, 8, 6),  # Does not divide: as if there were one copy.
  ],
)
def test_inputs_encoded_together(monkeypatch, batch, length, copies, expected):
  mesh = jax.sharding.AbstractMesh((copies, 1), ('data', 'model'))
  monkeypatch.setattr(generate.sharding, 'current_mesh', lambda: mesh)
  assert generate.encoded_together(batch, length) == expected


def test_encoding_in_parts_changes_nothing(monkeypatch):
  cfg, batch = oracle.config(2), oracle.batch()
  params, inputs = oracle.params(cfg), batch['encoder_input_tokens']
  _, *whole = kept_steps(cfg)(params, batch)
  monkeypatch.setattr(generate, 'ENCODED_TOGETHER', 2 * inputs.shape[1])
  assert generate.encoded_together(*inputs.shape) == 2
  prepare = functools.partial(generate.prepare, network.Transformer(cfg), max_length=T)
  parts = list(oracle.jit(prepare)(params, inputs))
  assert jax.tree.structure(whole) == jax.tree.structure(parts)
  for a, b in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_no_room_for_a_token():
  module = network.Transformer(oracle.config(2))
  args = module, {}, np.ones((1, 2)), np.zeros((1, 0)), sampling.greedy
  with pytest.raises(ValueError, match=r'of shape \(1, 0\) leave no token to decode'):
    generate.generate(*args, eos_id=1)


DECODE_FNS = (sampling.greedy, sampling.temperature_sample, beam_search.beam_search)


@pytest.mark.parametrize('decode_fn', DECODE_FNS)
def test_the_first_token_of_a_prompt_is_read_first(decode_fn):
  """Each row begins with another one; greedy results are those of whole passes."""
  cfg, batch = oracle.config(2), oracle.batch()
  params, inputs = oracle.params(cfg), batch['encoder_input_tokens']
  starts = np.array([0, 5, 9, 5])
  prompts = np.zeros((B, T), np.int32)
  prompts[:, 0] = starts
  decode = functools.partial(decode_fn, num_decodes=1)
  run = functools.partial(generate.generate, network.Transformer(cfg), eos_id=-1)
  run = oracle.jit(functools.partial(run, decode_fn=decode))
  tokens, _ = run(params, inputs, prompts)
  read = np.concatenate([starts[:, None], tokens[:, 0]], axis=1)
  whole = {'encoder_input_tokens': inputs, 'decoder_input_tokens': read[:, :-1]}
  whole['decoder_target_tokens'] = np.ones_like(read[:, :-1])
  logits = np.asarray(oracle.forward(cfg)(params, whole))
  np.testing.assert_array_equal(read[:, 1:], logits.argmax(-1))


@pytest.mark.parametrize('decode_fn', DECODE_FNS)
def test_no_input_has_no_result(decode_fn):
  module = network.Transformer(oracle.config(2))
  params = oracle.params(oracle.config(2))
  nothing = np.zeros((0, 5), np.int32), np.zeros((0, T), np.int32)
  tokens, scores = generate.generate(
    module, params, *nothing, decode_fn, eos_id=1, num_decodes=1
  )
  assert (tokens.shape, tokens.dtype) == ((0, 1, T), jnp.int32)
  assert (scores.shape, scores.dtype) == ((0, 1), jnp.float32)


@pytest.mark.parametrize('temperature', [-1, -0.5, float('nan')])
def test_a_temperature_below_zero(temperature):
  with pytest.raises(ValueError, match=r'temperature=.* must be 0 \(greedy\) or more'):
    sampling.temperature_sample(
      jnp.zeros((1, 2), jnp.int32), {}, None, 1, temperature=temperature
    )
