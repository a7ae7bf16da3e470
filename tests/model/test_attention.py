"""Grouped attention against JAX's own, the module against a NumPy loop over heads.

What decoding caches is compared as a whole, in test_golden.py and test_generate.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x.model import attention, axes
from helpers import model_oracle as oracle

B, T, S, N, H = 3, 5, 7, 4, 6
D = 10
KV_HEADS = (1, 2, N)
BFLOAT16_EPS = float(jnp.finfo(jnp.bfloat16).eps)


@functools.cache
def inputs(K, seed=0):
  """Returns q, k, v, a bias of `[B, N, T, S]` and a mask without empty rows."""
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, K, S, H), (B, K, S, H), (B, N, T, S)
  q, k, v, bias = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
  mask = rng.random((B, 1, T, S)) < 0.6
  mask[..., 0] = True
  return q * 0.7, k, v, bias, mask


@oracle.jit
def jax_attention(q_BTNH, k_BKSH, v_BKSH, bias=None, mask=None):
  k_BSKH, v_BSKH = (jnp.swapaxes(x, 1, 2) for x in (k_BKSH, v_BKSH))
  return jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, bias=bias, mask=mask, scale=1.0
  )


@functools.partial(oracle.jit, static_argnames='float32_logits')
def grouped_attention(q_BTNH, k_BKSH, v_BKSH, **options):
  """What is tested, with keys as the oracles have them."""
  k_BKHS = jnp.swapaxes(k_BKSH, 2, 3)
  return attention.grouped_attention(q_BTNH, k_BKHS, v_BKSH, **options)


@pytest.mark.parametrize('K', KV_HEADS)
@pytest.mark.parametrize('given', ['for each query', 'for all alike', 'not at all'])
def test_equals_jax(K, given):
  """Bias and mask."""
  q, k, v, bias, mask = inputs(K)
  options = {
    'for each query': {'bias': bias, 'mask': mask},
    'for all alike': {'bias': bias[:1, :, 1:2], 'mask': mask[:1, :, 1:2]},
    'not at all': {},
  }
  got = grouped_attention(q, k, v, **options[given])
  assert got.shape == (B, T, N, H)
  expected = jax_attention(q, k, v, **options[given])
  np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_fully_masked_rows_are_the_mean_of_the_values():
  K = 2
  q, k, v, bias, mask = inputs(K)
  mask = mask.copy()
  mask[1, :, 2:4] = False
  got = np.asarray(grouped_attention(q, k, v, bias=bias, mask=mask))
  mean_NH = np.repeat(v[1].mean(1), N // K, axis=0)
  np.testing.assert_allclose(got[1, 2:4], [mean_NH, mean_NH], atol=1e-5)


def test_bfloat16():
  """Against float32 on the same rounded inputs.

  One rounding is at most eps / 2 of a number's size; values have size 1. With float32
  logits probabilities and outputs are rounded, without them the logits (of size 2),
  too.
  """
  q, k, v, bias, mask = (
    x if x.dtype == bool else x.astype(jnp.bfloat16) for x in inputs(2)
  )
  expected = jax_attention(*(x.astype(np.float32) for x in (q, k, v, bias)), mask)
  errors = {}
  for float32_logits in (False, True):
    got = grouped_attention(
      q, k, v, bias=bias, mask=mask, float32_logits=float32_logits
    )
    assert got.dtype == jnp.bfloat16
    difference = np.asarray(got, np.float64) - expected
    errors[float32_logits] = np.sqrt(np.mean(difference**2))
  assert 0 < errors[True] < BFLOAT16_EPS / 2
  assert errors[True] < errors[False] < BFLOAT16_EPS


@pytest.mark.parametrize('K', KV_HEADS)
def test_gradients_equal_jaxs(K):
  *args, mask = inputs(K)
  weights_BTNH = np.random.default_rng(1).standard_normal((B, T, N, H))

  def gradients(attend):
    def loss(q, k, v, bias):
      out_BTNH = attend.__wrapped__(q, k, v, bias=bias, mask=mask)
      return jnp.sum(out_BTNH * weights_BTNH)

    return oracle.jit(jax.grad(loss, (0, 1, 2, 3)))(*args)

  for got, expected in zip(
    gradients(grouped_attention), gradients(jax_attention), strict=True
  ):
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


# The module.


@functools.cache
def module_inputs(K):
  """Returns parameters, two inputs `[B, T, D]` and `[B, S, D]`, mask and bias."""
  rng = np.random.default_rng(3)
  shapes = {'query': (D, N * H), 'key': (D, K * H), 'value': (D, K * H), 'out': (24, D)}
  params = {
    name: {'kernel': (rng.standard_normal(shape) / 3).astype(np.float32)}
    for name, shape in shapes.items()
  }
  x, y = (rng.standard_normal((B, n, D)).astype(np.float32) for n in (T, S))
  _, _, _, bias, mask = inputs(K)
  return params, x, y, mask, bias


@pytest.mark.parametrize('K', KV_HEADS)
def test_module_equals_oracle(K):
  params, x, y, mask, bias = module_inputs(K)
  module = attention.GroupedQueryAttention(N, K, H)
  got = oracle.jit(module.apply)({'params': params}, x, y, mask, bias)
  for b in range(B):
    bias_NTS = np.where(mask[b], bias[b], -np.inf)
    expected = oracle.attention_layer(x[b], y[b], params, bias_NTS)
    np.testing.assert_allclose(got[b], expected, atol=1e-5, rtol=1e-5)


def test_initial_values():
  """1/sqrt(H) is in the query's initialiser, nowhere else."""
  big = attention.GroupedQueryAttention(num_heads=N, num_kv_heads=2, head_dim=64)
  x = jnp.zeros((1, 1, 256))
  kernels = oracle.jit(big.init)(jax.random.PRNGKey(0), x, x)['params']
  deviations = {name: float(jnp.std(leaf['kernel'])) for name, leaf in kernels.items()}
  expected = {'query': 1 / 128, 'key': 1 / 16, 'value': 1 / 16, 'out': 1 / 16}
  assert deviations == pytest.approx(expected, rel=0.03)


def test_dropout():
  """What is kept is scaled; a key is dropped for all queries of a row alike.

  All probabilities are 1/S, values and kernels the identity: outputs of a head are its
  probabilities.
  """
  N, S, rate = 2, 64, 0.25
  identity = {'kernel': np.eye(N * S, dtype=np.float32)}
  first = {'kernel': identity['kernel'][:, :S]}
  none = {'kernel': np.zeros((N * S, N * S), np.float32)}
  params = {'query': none, 'key': first, 'value': first, 'out': identity}
  layer = attention.GroupedQueryAttention(N, 1, S, dropout_rate=rate)
  x = np.ones((B, T, N * S), np.float32)
  y = np.broadcast_to(identity['kernel'][:S], (B, S, N * S))

  @functools.partial(oracle.jit, static_argnums=0)
  def kept(deterministic):
    rngs = {'dropout': jax.random.PRNGKey(4)}
    out_BTD = layer.apply(
      {'params': params}, x, y, rngs=rngs, deterministic=deterministic
    )
    return out_BTD.reshape(B, T, N, S) * S

  np.testing.assert_allclose(kept(True), 1, rtol=1e-6)
  got = np.asarray(kept(False))
  np.testing.assert_allclose(np.unique(got.round(5)), [0, 1 / (1 - rate)], rtol=1e-4)
  np.testing.assert_array_equal(got, got[:, :1].repeat(T, axis=1))
  dropped = got[:, 0] == 0
  assert len(np.unique(dropped.reshape(B * N, S), axis=0)) == B * N
  deviation = np.sqrt(rate * (1 - rate) / dropped.size)
  assert abs(dropped.mean() - rate) < 4 * deviation


@pytest.mark.parametrize(
  ('num_heads', 'num_kv_heads', 'message'),
  [
    (12, 5, '=12 is not divisible by num_kv_heads=5; choose one of 1, 2, 3, 4, 6, 12.'),
    (6, 0, '=6 is not divisible by num_kv_heads=0; choose one of 1, 2, 3, 6.'),
    (0, 1, '=0 must be at least 1.'),
  ],
)
def test_heads_that_do_not_divide(num_heads, num_kv_heads, message):
  with pytest.raises(ValueError, match=f'^num_heads{re.escape(message)}$'):
    axes.check_heads(num_heads, num_kv_heads)


def test_bad_heads_are_found_by_the_module():
  x, init = np.zeros((1, 1, D)), attention.GroupedQueryAttention(N, 3, H).init
  with pytest.raises(ValueError, match='=4 is not divisible by num_kv_heads=3;'):
    jax.eval_shape(init, jax.random.PRNGKey(0), x, x)
