"""The layers around attention against NumPy, and T5X's where it is installed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x.model import layers
from gqa_t5x.model.dense import Dense
from helpers import model_oracle as oracle

B, T, D, F, V = 2, 3, 5, 7, 11


def random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def kernels(**shapes):
  return {
    name: {'kernel': random(*shape, seed=i + 1)}
    for i, (name, shape) in enumerate(shapes.items())
  }


@pytest.mark.parametrize('scale', [1.0, 100.0, 1e-3])
def test_layer_norm(scale):
  """Root mean square: a mean of 3 is not removed; the epsilon shows at 1e-3."""
  x = scale * (random(B, T, D) + 3)
  weights = random(D, seed=1)
  got = layers.LayerNorm().apply({'params': {'scale': weights}}, x)
  x = x.astype(np.float64)
  expected = weights * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_layer_norm_is_float32_inside():
  """The squares of 300, 400 do not fit float16; bfloat16 would round them."""
  x = np.array([[300.0, 400.0]], np.float16)
  params = {'scale': np.array([1.0, 2.0], np.float32)}
  got = layers.LayerNorm(jnp.float16).apply({'params': params}, x)
  assert got.dtype == jnp.float16
  expected = np.array([[300.0, 800.0]]) / math.sqrt((300**2 + 400**2) / 2)
  np.testing.assert_allclose(got, expected, rtol=2 * np.finfo(np.float16).eps)


@pytest.mark.parametrize(
  ('activations', 'names', 'expected'),
  [
    (('relu',), ('wi',), lambda a: np.maximum(a, 0)),
    (('gelu', 'linear'), ('wi_0', 'wi_1'), lambda a, b: oracle.gelu(a) * b),
    (('silu', 'linear'), ('wi_0', 'wi_1'), lambda a, b: a / (1 + np.exp(-a)) * b),
  ],
)
def test_mlp(activations, names, expected):
  x = random(B, T, D)
  params = kernels(**{name: (D, F) for name in names}, wo=(F, D))
  got = layers.MlpBlock(F, activations).apply({'params': params}, x)
  branches = [x.astype(np.float64) @ params[name]['kernel'] for name in names]
  np.testing.assert_allclose(
    got, expected(*branches) @ params['wo']['kernel'], atol=1e-5, rtol=1e-5
  )


def test_mlp_dropout_is_broadcast_over_length():
  """`wo` is the identity, so the output shows the hidden units."""
  rate, size = 0.5, 64
  block = layers.MlpBlock(size, ('linear',), dropout_rate=rate)
  params = {name: {'kernel': np.eye(size, dtype=np.float32)} for name in ('wi', 'wo')}
  x = np.ones((B, T, size), np.float32)
  got = np.asarray(
    block.apply({'params': params}, x, rngs={'dropout': jax.random.PRNGKey(0)})
  )
  assert set(np.unique(got)) == {0.0, 2.0}
  np.testing.assert_array_equal(got, got[:, :1].repeat(T, axis=1))
  assert (got[0] != got[1]).any()
  assert abs((got[:, 0] == 0).mean() - rate) < 4 * math.sqrt(0.25 / (B * size))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_embed(dtype):
  """In bfloat16, too, it attends in float32."""
  table, tokens = random(V, D), np.array([[0, 3, 10], [7, 7, 1]])
  module = layers.Embed(V, D, dtype)
  variables = {'params': {'embedding': table}}
  got = module.apply(variables, tokens)
  np.testing.assert_array_equal(got, table[tokens].astype(dtype))
  logits = module.apply(variables, got, method=module.attend)
  assert logits.dtype == jnp.float32
  expected = np.asarray(got, np.float64) @ table.T
  np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)


# Relative positions.


@pytest.mark.parametrize(
  ('bidirectional', 'by_hand'),
  [
    # One bucket a distance up to 7, then powers: 8 * 16 ** (i / 8); the future from 16.
    (True, {0: 0, -7: 7, -11: 8, -12: 9, -90: 14, -91: 15, 1: 17, 7: 23, 64: 30}),
    # Up to 15, then 16 * 8 ** (i / 16); of the future there is none.
    (False, {128: 0, 0: 0, -15: 15, -18: 16, -19: 17, -32: 21, -112: 30, -113: 31}),
  ],
)
def test_buckets(bidirectional, by_hand):
  distances = range(-128, 129)
  expected = {d: oracle.bucket(d, bidirectional) for d in distances}
  assert expected == expected | by_hand
  got = layers.relative_position_buckets(bidirectional)
  assert got.dtype == np.int32
  assert dict(zip(distances, got.tolist(), strict=True)) == expected


@pytest.mark.parametrize('bidirectional', [True, False])
def test_buckets_equal_t5x(bidirectional):
  t5 = pytest.importorskip('t5x.examples.t5.layers')
  distances = np.arange(-1280, 1281)
  expected = t5.RelativePositionBiases._relative_position_bucket(
    distances, bidirectional, 32, 128
  )
  got = layers.relative_position_buckets(bidirectional)
  np.testing.assert_array_equal(got[np.clip(distances, -128, 128) + 128], expected)


N = 3
TABLE = {'rel_embedding': random(N, 32)}


def biases(bidirectional, positions, keys, dtype=jnp.float32):
  module = layers.RelativePositionBiases(N, bidirectional, dtype)
  return np.asarray(
    module.apply({'params': TABLE}, jnp.asarray(positions), jnp.asarray(keys))
  )


@pytest.mark.parametrize('bidirectional', [True, False])
def test_bias_by_position(bidirectional):
  """Of a whole sequence; and of rows that decode, with keys in any order."""
  expected = oracle.position_bias(TABLE['rel_embedding'], 150, 140, bidirectional)
  got = biases(bidirectional, np.arange(150)[None], np.arange(140))
  np.testing.assert_allclose(got, expected[None], atol=1e-6)
  rows, keys = [[3, 4], [0, 1], [137, 138]], [5, 0, 139, 1, 1]
  got = biases(bidirectional, rows, keys)
  assert got.shape == (3, N, 2, 5)
  np.testing.assert_allclose(got, expected[:, rows][..., keys].swapaxes(0, 1))


def test_bias_in_bfloat16_is_the_rounded_table():
  got = biases(True, np.arange(5)[None], np.arange(4), jnp.bfloat16)
  expected = oracle.position_bias(TABLE['rel_embedding'], 5, 4, True)
  np.testing.assert_array_equal(got[0], expected.astype(jnp.bfloat16))


def test_low_precision_parameters_are_not_widened():
  """float32 out of bfloat16 factors: products are exact, sums are in float32."""
  rng = np.random.default_rng(0)
  x, kernel = (
    jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    for shape in ((3, 40), (40, 5))
  )
  dense = Dense(5, ('embed', 'vocab'), jnp.float32)

  def apply(x):
    return dense.apply({'params': {'kernel': kernel}}, x)

  exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
  got = apply(x)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)
  eqns = jax.make_jaxpr(apply)(x).eqns
  assert [e.primitive.name for e in eqns] == ['dot_general']
  # A float32 input is not rounded to the parameters' precision.
  fine = np.asarray(rng.standard_normal((3, 40)), np.float32)
  exact = fine.astype(np.float64) @ np.asarray(kernel, np.float64)
  np.testing.assert_allclose(apply(fine), exact, rtol=1e-5, atol=1e-5)
