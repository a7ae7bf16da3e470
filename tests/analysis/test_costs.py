"""The cost model against parameter trees, XLA's cost analysis, and counts by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

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
CONFIGS = [*({'num_kv_heads': K} for K in KV_HEADS), MIXED_HEADS]

# Wide enough for matrix products to be nearly all of the arithmetic.
B, S, P, H = 3, 17, 7, 64
WIDE = dict(vocab_size=600, emb_dim=120, mlp_dim=280)


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


@pytest.mark.parametrize(
  ('size', 'K', 'expected'),
  [
    ('small', None, 76_961_152),
    ('base', None, 247_577_856),
    ('base', 1, 221_625_600),
    ('large', None, 783_150_080),
    ('xl', None, 2_849_757_184),
    ('xxl', None, 11_135_332_352),
    ('xxl', 8, 9_726_046_208),
  ],
)
def test_parameters_of_published_sizes(size, K, expected):
  assert formulas.num_parameters(network.config(size, num_kv_heads=K)) == expected


def read_by_a_step(path):
  """Not the encoder, not what makes cross-attention K and V, not the whole table."""
  made_once = 'encoder/.*|.*/encoder_decoder_attention/(key|value)/kernel'
  return not re.fullmatch(f'{made_once}|token_embedder/.*', path)


@pytest.mark.parametrize('fields', CONFIGS)
@pytest.mark.parametrize('param_itemsize', [2, 4])
def test_param_bytes_are_those_of_the_tree(fields, param_itemsize):
  cfg = oracle.config(**fields)
  shapes = parameter_shapes(cfg)
  read = elements(leaf for path, leaf in shapes.items() if read_by_a_step(path))
  read += 6 * oracle.D  # An embedding for each row of 3 inputs and 2 beams.
  step = formulas.decode_step(cfg, 3, S, P, num_beams=2, param_itemsize=param_itemsize)
  assert step.param_bytes == param_itemsize * read


def test_a_tied_table_is_read_whole():
  shapes = parameter_shapes(oracle.config(**TIED))
  read = elements(leaf for path, leaf in shapes.items() if read_by_a_step(path))
  expected = read + oracle.V * oracle.D
  step = formulas.decode_step(oracle.config(**TIED), 4, S, P, param_itemsize=1)
  assert step.param_bytes == expected


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


@pytest.mark.parametrize('fields', [*CONFIGS, {'num_kv_heads': 2} | BFLOAT16])
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


def wide_config(K, head_dim=H):
  return oracle.config(K, **WIDE, head_dim=head_dim)


@functools.cache
def lowered_step(K, batch_size=B, input_length=S, cache_length=P, head_dim=H):
  cfg = wide_config(K, head_dim)
  shapes = step_shapes(cfg, batch_size, input_length, cache_length)
  newest = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
  return oracle.jit(
    lambda *arrays: generate.step(network.Transformer(cfg), *arrays, cache_length)
  ).lower(*shapes, newest)


def xla_step(*args, **lengths):
  """Returns XLA's count of FLOPs and bytes before it fuses anything."""
  cost = lowered_step(*args, **lengths).cost_analysis()
  return np.array([cost['flops'], cost['bytes accessed']])


@functools.cache
def compiled_flops(*args, **lengths):
  """Returns XLA's count of FLOPs of what it runs in the end."""
  return lowered_step(*args, **lengths).compile().cost_analysis()['flops']


def formula_step(K, batch_size=B, input_length=S, cache_length=P, head_dim=H):
  cfg = wide_config(K, head_dim)
  step = formulas.decode_step(cfg, batch_size, input_length, cache_length)
  return np.array([step.flops, step.bytes])


@pytest.mark.parametrize('K', KV_HEADS)
@pytest.mark.parametrize('length', ['input_length', 'cache_length'])
def test_attention_of_a_step_is_exactly_xlas(K, length):
  """How much 12 more positions cost more with heads larger by 16.

  That leaves the two products of attention, and the keys and values they read: the
  softmax does not grow with the head size, nor the projections with the length.
  """
  longer = {length: {'input_length': S, 'cache_length': P}[length] + 12}

  def mixed_difference(cost):
    large = {'head_dim': H + 16}
    more_of_large_heads = cost(K, **longer, **large) - cost(K, **large)
    return more_of_large_heads - (cost(K, **longer) - cost(K))

  two_products_and_multiply_adds, key_and_value_of_float32 = 2 * 2, 2 * 4
  once = oracle.DECODER_LAYERS * B * 12 * 16
  by_hand = [
    once * oracle.N * two_products_and_multiply_adds,
    once * K * key_and_value_of_float32,
  ]
  np.testing.assert_array_equal(mixed_difference(formula_step), by_hand)
  np.testing.assert_array_equal(mixed_difference(xla_step), by_hand)


def test_flops_of_a_step_are_xlas():
  xla = [compiled_flops(K) for K in KV_HEADS]
  assert_rest_is_elementwise(xla, [formula_step(K)[0] for K in KV_HEADS])


@pytest.mark.parametrize('more', [{'batch_size': B + 2}, {'input_length': S + 12}])
def test_flops_of_a_larger_or_longer_step_are_xlas(more):
  """Of 12 more positions, softmax is 2.5%: 6.5 FLOPs beside the 4 H of a logit."""
  xla = compiled_flops(2, **more) - compiled_flops(2)
  flops = formula_step(2, **more)[0] - formula_step(2)[0]
  assert 0.97 * xla < flops < xla


def assert_rest_is_elementwise(xla, formula):
  """Checks that XLA counts up to 2% more, and equally much for every K.

  That is norms, softmax and GELU. Past 2**24, XLA's float32 counts by twos.
  """
  rest = np.array(xla) - formula
  assert (rest > 0).all()
  assert (rest < 0.02 * np.array(formula)).all()
  assert np.ptp(rest) <= 4
  assert (np.diff(formula) > 0).all()  # More K/V heads, more FLOPs.


@pytest.mark.parametrize('lengths', [(B, S), (B + 2, S + 12)])
def test_flops_before_the_first_step_are_xlas(lengths):
  xla, formula = [], []
  for K in (1, oracle.N):
    cfg = wide_config(K)
    params, _, _, tokens = step_shapes(cfg, *lengths, P)
    prepare = oracle.jit(
      lambda params, tokens, cfg=cfg: generate.prepare(
        network.Transformer(cfg), params, tokens, P
      )
    )
    xla.append(prepare.lower(params, tokens).compile().cost_analysis()['flops'])
    formula.append(formulas.prepare_flops(cfg, *lengths))
  assert_rest_is_elementwise(xla, formula)


def apply_shapes(cfg, batch_size, input_length, target_length):
  """Returns a forward pass, and the shapes of what it is given."""

  def forward(params, inputs, targets):
    return network.Transformer(cfg).apply(
      {'params': params}, inputs, targets, targets, enable_dropout=False
    )

  inputs = jax.ShapeDtypeStruct((batch_size, input_length), jnp.int32)
  targets = jax.ShapeDtypeStruct((batch_size, target_length), jnp.int32)
  return forward, (oracle.initial_shapes(cfg)['params'], inputs, targets)


def test_flops_of_a_forward_pass_are_xlas():
  xla, formula = [], []
  for K in (1, oracle.N):
    forward, shapes = apply_shapes(wide_config(K), B, S, P)
    compiled = oracle.jit(forward).lower(*shapes).compile()
    xla.append(compiled.cost_analysis()['flops'])
    formula.append(formulas.training_step(wide_config(K), B, S, P).flops / 3)
  assert_rest_is_elementwise(xla, formula)


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
  flops = touched = 0
  for arrays, summed in products(jax.make_jaxpr(function)(*shapes).jaxpr):
    flops += 2 * arrays[2].size * summed
    touched += sum(array.size * array.dtype.itemsize for array in arrays)
  return flops, touched


@pytest.mark.parametrize('fields', [*CONFIGS, {'mlp_activations': ('relu',)}])
def test_training_is_exactly_its_matrix_products(fields):
  cfg = oracle.config(**fields)
  forward, shapes = apply_shapes(cfg, 3, 11, 5)
  gradient = jax.grad(lambda *arrays: jnp.sum(jax.nn.log_softmax(forward(*arrays))))
  flops, touched = count_products(gradient, shapes)
  step = formulas.training_step(cfg, 3, 11, 5)
  assert (step.flops, step.bytes) == (flops, touched)


@pytest.mark.parametrize('float32_logits', [False, True])
def test_bytes_of_a_bfloat16_forward_pass(float32_logits):
  """JAX multiplies bfloat16 copies of the kernels, but for the last: float32."""
  cfg = oracle.config(2, **BFLOAT16, float32_attention_logits=float32_logits)
  flops, touched = count_products(*apply_shapes(cfg, 3, 11, 5))
  step = formulas.training_step(cfg, 3, 11, 5, param_itemsize=2)
  assert step.flops == 3 * flops
  assert step.bytes + 3 * 2 * oracle.D * oracle.V == 3 * touched


CFG = oracle.config(2)
POSITIVE = [
  (
    functools.partial(formulas.decode_step, CFG),
    ('batch_size', 'input_length', 'self_positions', 'num_beams', 'param_itemsize'),
  ),
  (functools.partial(formulas.prepare_flops, CFG), ('batch_size', 'input_length')),
  (
    functools.partial(formulas.training_step, CFG),
    ('batch_size', 'input_length', 'target_length', 'param_itemsize'),
  ),
  (functools.partial(formulas.shazeer_decoding_ratio, h=4, g=2), ('b', 'n', 'd')),
]


@pytest.mark.parametrize(
  ('function', 'names', 'name'),
  [(function, names, name) for function, names in POSITIVE for name in names],
)
@pytest.mark.parametrize('number', [0, -1])
def test_numbers_that_cannot_be(function, names, name, number):
  with pytest.raises(ValueError, match=f'^{name}={number} must be at least 1\\.$'):
    function(**(dict.fromkeys(names, 1) | {name: number}))
