"""With as many K/V heads as heads the model is T5X's; runs where T5X is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x.model import network
from helpers import make_golden
from helpers import model_oracle as oracle

pytest.importorskip('t5x.examples.t5.network')

ONE_LAYER = {'num_encoder_layers': 1, 'num_decoder_layers': 1}


def test_the_golden_file_is_what_t5x_computes_now():
  now, stored = make_golden.make(), make_golden.stored()
  assert now.keys() == stored.keys()
  for name, value in now.items():
    if value.dtype.kind == 'f':
      np.testing.assert_allclose(value, stored[name], atol=1e-4, err_msg=name)
    else:
      np.testing.assert_array_equal(value, stored[name], err_msg=name)


def test_names_shapes_dtypes_and_axes():
  """With tied embeddings, which the golden file has not."""
  tied = {'logits_via_embedding': True}
  expected = jax.eval_shape(lambda: oracle.init(make_golden.t5x_module(**tied)))
  got = oracle.initial_shapes(oracle.config(**tied))
  assert make_golden.describe(got) == make_golden.describe(expected)
  assert jax.tree.structure(got) == jax.tree.structure(expected)


def test_initial_values():
  """The same key gives the same parameters, bit by bit."""
  t5x = make_golden.t5x_module(**ONE_LAYER)
  ours = network.Transformer(oracle.config(**ONE_LAYER))
  expected, got = (
    oracle.flat(oracle.jit(lambda module=module: oracle.init(module, 3)['params'])())
    for module in (t5x, ours)
  )
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert name.endswith('scale') or np.std(value) > 0


def apply(module, **options):
  return oracle.jit(
    lambda params, batch: module.apply(
      {'params': params}, **batch, enable_dropout=False, **options
    )
  )


@pytest.mark.parametrize(
  'options', [{'logits_via_embedding': True}, {'mlp_activations': ('relu',)}]
)
def test_logits(options):
  """What the golden file has not."""
  cfg = oracle.config(**options)
  params = oracle.params(cfg)
  t5x, ours = apply(make_golden.t5x_module(**options)), oracle.forward(cfg)
  got, expected = ours(params, oracle.batch()), t5x(params, oracle.batch())
  # Padding too: both give their masked rows the mean of all values.
  np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('float32_attention_logits', [False, True])
def test_bfloat16_logits(float32_attention_logits):
  """The roundings are T5X's, so far less apart than bfloat16 from float32."""
  options = {
    'dtype': jnp.bfloat16,
    'float32_attention_logits': float32_attention_logits,
  }
  params, batch = oracle.params(oracle.config()), oracle.batch()
  got = np.asarray(oracle.forward(oracle.config(**options))(params, batch))
  expected = np.asarray(apply(make_golden.t5x_module(**options))(params, batch))
  real = batch['decoder_target_tokens'] > 0
  error = np.sqrt(np.mean((got - expected)[real] ** 2) / np.mean(expected[real] ** 2))
  assert error < float(jnp.finfo(jnp.bfloat16).eps)


@functools.cache
def dropped_logits_and_gradients(module):
  """Returns logits and gradients of a packed batch under dropout."""
  batch = oracle.packed_batch()
  real = (batch['decoder_target_tokens'] > 0)[..., None]
  weights = np.random.default_rng(0).standard_normal((*real.shape[:2], oracle.V)) * real

  @oracle.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params):
    rngs = {'dropout': jax.random.PRNGKey(7)}
    logits = module.apply({'params': params}, **batch, enable_dropout=True, rngs=rngs)
    return jnp.sum(logits * weights), logits

  params = oracle.params(oracle.config(**ONE_LAYER))
  (_, logits), gradients = loss(params)
  return np.where(real, logits, 0), oracle.flat(gradients)


@pytest.mark.parametrize('remat_policy', ['none', 'minimal'])
def test_dropout_and_gradients(remat_policy):
  """The same rng drops the same units, in training and packed."""
  expected_logits, expected = dropped_logits_and_gradients(
    make_golden.t5x_module(dropout_rate=0.2, **ONE_LAYER)
  )
  cfg = oracle.config(dropout_rate=0.2, remat_policy=remat_policy, **ONE_LAYER)
  logits, got = dropped_logits_and_gradients(network.Transformer(cfg))
  np.testing.assert_allclose(logits, expected_logits, atol=1e-5, rtol=1e-5)
  assert got.keys() == expected.keys()
  for name, gradient in expected.items():
    scale = np.abs(gradient).max()
    assert scale > 0, name
    np.testing.assert_allclose(
      got[name] / scale, gradient / scale, atol=1e-5, err_msg=name
    )
