"""The cost model against parameter trees, JAX's matrix products, and Shazeer."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core
from jax.interpreters import partial_eval

from gqa_t5x.analysis.costs import formulas
from gqa_t5x.decoding import generate
from gqa_t5x.model import network
from helpers import model_oracle as oracle

KV_HEADS = oracle.KV_HEADS
BFLOAT16 = dict(dtype=jnp.bfloat16)
TIED = dict(logits_via_embedding=True)
MIXED_HEADS = dict(
  self_attention_num_kv_heads=1, cross_attention_num_kv_heads=2, encoder_num_kv_heads=2
)
LATENT = dict(num_kv_heads=2, kv_head_dim=9)
CONFIGS = [*({'num_kv_heads': K} for K in KV_HEADS), MIXED_HEADS, LATENT]

B, S, P = 3, 17, 7


def elements(leaves):
  return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def parameter_shapes(cfg):
  return oracle.flat(oracle.initial_shapes(cfg)['params'])


@pytest.mark.parametrize(
  'fields', [*CONFIGS, TIED, {'mlp_activations': ('relu',)}, {'num_encoder_layers': 3}]
)
def test_parameters_are_those_of_the_tree(fields):
  cfg = oracle.config(**fields)
  assert formulas.num_parameters(cfg) == elements(parameter_shapes(cfg).values())


def read_by_a_step(path):
  """Not the encoder, not what makes cross-attention K and V, not the whole table."""
  made_once = 'encoder/.*|.*/encoder_decoder_attention/(key|value)/kernel'
  return not re.fullmatch(f'{made_once}|token_embedder/.*', path)


@pytest.mark.parametrize('fields', [*CONFIGS, TIED])
def test_param_bytes_are_those_of_the_tree(fields):
  """Of the table, an embedding for each row of 3 inputs and 2 beams; or all of it."""
  cfg = oracle.config(**fields)
  shapes = parameter_shapes(cfg)
  read = elements(leaf for path, leaf in shapes.items() if read_by_a_step(path))
  read += (oracle.V if fields is TIED else 6) * oracle.D
  step = formulas.decode_step(cfg, 3, S, P, num_beams=2)
  assert step.param_bytes == 4 * read
  step = formulas.decode_step(cfg, 3, S, P, num_beams=2, param_itemsize=2)
  assert step.param_bytes == 2 * read


@functools.cache
def step_shapes(cfg, batch_size, input_length, cache_length):
  """Returns the shapes of what a decode step is given."""
  tokens = jax.ShapeDtypeStruct((batch_size, input_length), jnp.int32)
  params = oracle.initial_shapes(cfg)['params']
  cache, kept = jax.eval_shape(
    lambda params, tokens: generate.prepare(
      network.Transformer(cfg), params, tokens, cache_length
    ),
    params,
    tokens,
  )
  return params, kept, cache, tokens


@pytest.mark.parametrize('fields', [{'num_kv_heads': 2}, LATENT, TIED])
def test_param_bytes_in_int8(fields):
  """A byte for each element of a kernel, and of a table that makes the logits."""
  cfg = oracle.config(**fields)
  shapes = parameter_shapes(cfg)
  read = {path: x for path, x in shapes.items() if read_by_a_step(path)}
  kernels = elements(x for path, x in read.items() if path.endswith('kernel'))
  others = elements(read.values()) - kernels
  kernels += oracle.V * oracle.D if fields is TIED else 0
  others += 0 if fields is TIED else 6 * oracle.D
  int8 = oracle.config(**fields, quantize='weights')
  step = formulas.decode_step(int8, 3, S, P, num_beams=2, param_itemsize=2)
  assert step.param_bytes == kernels + 2 * others
  # That of memory takes norms and position biases for kernels, and has no scales.
  held = formulas.param_bytes(int8, 2)
  table = oracle.V * oracle.D
  assert held == elements(shapes.values()) + (0 if fields is TIED else table)
  assert formulas.param_bytes(cfg, 2) == 2 * elements(shapes.values())


INT8 = {'quantize': 'cache'}


@pytest.mark.parametrize(
  'fields',
  [*CONFIGS, {'num_kv_heads': 2} | BFLOAT16, {'num_kv_heads': 2} | INT8, LATENT | INT8],
)
def test_cache_bytes_are_those_of_the_cache(fields):
  cfg = oracle.config(**fields)
  _, kept, cache, _ = step_shapes(cfg, B, S, P)
  leaves = jax.tree.leaves(kept['encoded_kv'])
  cross = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  own = sum(
    leaf.size * leaf.dtype.itemsize
    for path, leaf in oracle.flat(cache).items()
    if not path.endswith('cache_index')
  )
  assert (cross > 0, own > 0) == (True, True)
  step = formulas.decode_step(cfg, B, S, P)
  assert (step.cross_kv_bytes, step.self_cache_bytes) == (cross, own)
  assert step.cache_bytes == cross + own


def test_beams_share_cross_attention_only():
  cfg = oracle.config(2)
  one = formulas.decode_step(cfg, B, S, P)
  four = formulas.decode_step(cfg, B, S, P, num_beams=4)
  assert four.cross_kv_bytes == one.cross_kv_bytes
  assert four.self_cache_bytes == 4 * one.self_cache_bytes
  assert four.flops == 4 * one.flops
  assert four.param_bytes == one.param_bytes + 4 * 3 * B * oracle.D


def products(jaxpr):
  """Yields the shapes of every matrix product: two operands, result, summed length."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (left, _), _ = equation.params['dimension_numbers']
      arrays = [v.aval for v in (*equation.invars, *equation.outvars)]
      yield arrays, int(np.prod([arrays[0].shape[axis] for axis in left]))
    for inner in jax_core.jaxprs_in_params(equation.params):
      yield from products(inner)


def count_products(function, shapes):
  """Returns FLOPs and bytes of the matrix products that JAX writes down."""
  jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  flops = touched = 0
  for arrays, summed in products(jaxpr):
    flops += 2 * arrays[2].size * summed
    touched += sum(array.size * array.dtype.itemsize for array in arrays)
  return flops, touched


def run_step(cfg, cache_length):
  return lambda *arrays: generate.step(network.Transformer(cfg), *arrays, cache_length)


def exact_prepare(cfg, lengths):
  """Returns FLOPs before the first step, by JAX and by formula."""
  params, _, _, tokens = step_shapes(cfg, *lengths)
  module = network.Transformer(cfg)
  prepare = functools.partial(generate.prepare, module, max_length=lengths[-1])
  flops, _ = count_products(prepare, (params, tokens))
  return flops, formulas.prepare_flops(cfg, *lengths[:2])


def exact_step(cfg, lengths):
  """Returns FLOPs of a step, by JAX and by formula."""
  newest = jax.ShapeDtypeStruct((lengths[0],), jnp.int32)
  flops, _ = count_products(
    run_step(cfg, lengths[-1]), (*step_shapes(cfg, *lengths), newest)
  )
  return flops, formulas.decode_step(cfg, *lengths).flops


LONGER = B + 2, S + 12, P + 4


@pytest.mark.parametrize(
  ('count', 'fields', 'lengths'),
  [
    *((exact_step, fields, (B, S, P)) for fields in [*CONFIGS, TIED]),
    (exact_step, MIXED_HEADS, LONGER),
    (exact_prepare, LATENT, LONGER),
    (exact_prepare, MIXED_HEADS, (B, S, P)),
    (exact_prepare, {'num_kv_heads': 1}, LONGER),
  ],
)
def test_decoding_is_exactly_its_matrix_products(count, fields, lengths):
  counted_by_jax, by_formula = count(oracle.config(**fields), lengths)
  assert counted_by_jax == by_formula


def apply_shapes(cfg, batch_size, input_length, target_length):
  """Returns a forward pass, and the shapes of what it is given."""

  def forward(params, inputs, targets):
    return network.Transformer(cfg).apply(
      {'params': params}, inputs, targets, targets, enable_dropout=False
    )

  inputs = jax.ShapeDtypeStruct((batch_size, input_length), jnp.int32)
  targets = jax.ShapeDtypeStruct((batch_size, target_length), jnp.int32)
  return forward, (oracle.initial_shapes(cfg)['params'], inputs, targets)


@pytest.mark.parametrize('fields', [*CONFIGS, {'mlp_activations': ('relu',)}])
def test_training_is_exactly_its_matrix_products(fields):
  cfg = oracle.config(**fields)
  forward, shapes = apply_shapes(cfg, 3, 11, 5)
  gradient = jax.grad(lambda *arrays: jnp.sum(jax.nn.log_softmax(forward(*arrays))))
  flops, touched = count_products(gradient, shapes)
  step = formulas.training_step(cfg, 3, 11, 5)
  assert (step.flops, 4 * step.weights + step.activation_bytes) == (flops, touched)


@pytest.mark.parametrize('float32_logits', [False, True])
def test_bytes_of_a_bfloat16_forward_pass(float32_logits):
  """JAX multiplies bfloat16 copies of the kernels, but for the last: float32."""
  cfg = oracle.config(2, **BFLOAT16, float32_attention_logits=float32_logits)
  flops, touched = count_products(*apply_shapes(cfg, 3, 11, 5))
  step = formulas.training_step(cfg, 3, 11, 5)
  assert step.flops == 3 * flops
  float32 = 3 * 2 * oracle.D * oracle.V  # The bytes that the last kernel has more.
  assert 2 * step.weights + step.activation_bytes + float32 == 3 * touched


# As in Shazeer's estimate: attention alone, D = N H, as long in as out.
SHAZEER = {'vocab_size': 1, 'emb_dim': 1024, 'num_heads': 16, 'head_dim': 64}


@pytest.mark.parametrize(
  ('b', 'n', 'd', 'h', 'g', 'expected'),
  [
    (8, 128, 1024, 8, 8, 0.125 + 0.125),
    (8, 128, 1024, 8, 2, 0.03125 + 0.125),
    (1, 2048, 4096, 64, 8, 0.0625 + 1),
  ],
)
def test_shazeer_decoding_ratio(b, n, d, h, g, expected):
  assert formulas.shazeer_decoding_ratio(b, n, d, h, g) == expected


@pytest.mark.parametrize('g', [1, 4, 16])
@pytest.mark.parametrize(('b', 'n'), [(1, 16), (64, 16), (1024, 16), (1024, 4)])
def test_decoding_follows_shazeer(b, n, g):
  """Each layer has 4 + 2 g/h matrices of d x d, and 4 b n d g/h keys and values.

  So a product's operands come to 1/b, and keys and values to 4 / (4 + 2 g/h) of
  n g/(d h), as long as n is much less than d.
  """
  cfg = network.T5Config(**SHAZEER, mlp_dim=1, num_kv_heads=g, num_decoder_layers=48)
  step = formulas.decode_step(cfg, b, n, n)
  numbers_a_multiply_add = (step.bytes / 4) / (step.flops / 2)
  matrices = 1 / b
  cache = formulas.shazeer_decoding_ratio(b, n, 1024, 16, g) - matrices
  expected = matrices + cache * 4 / (4 + 2 * g / 16)
  assert numbers_a_multiply_add == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
  ('function', 'names'),
  [
    (
      formulas.decode_step,
      'batch_size input_length self_positions num_beams param_itemsize',
    ),
    (formulas.prepare_flops, 'batch_size input_length'),
    (formulas.training_step, 'batch_size input_length target_length'),
    (formulas.shazeer_decoding_ratio, 'b n d'),
  ],
)
@pytest.mark.parametrize('number', [0, -1])
def test_numbers_that_cannot_be(function, names, number):
  others = dict.fromkeys(names.split(), 1)
  others |= {'h': 4, 'g': 2} if 'b' in others else {'cfg': oracle.config(2)}
  for name in names.split():
    with pytest.raises(ValueError, match=f'^{name}={number} must be at least 1\\.$'):
      function(**others | {name: number})


def test_key_value_heads_that_cannot_be():
  with pytest.raises(ValueError, match='num_heads=8 is not divisible by num_kv_heads='):
    formulas.shazeer_decoding_ratio(1, 1, 1, 8, 3)
