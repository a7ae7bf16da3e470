"""Grouped attention against a NumPy loop over heads, and JAX's own attention."""

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


def loop(q_BTNH, k_BKSH, v_BKSH, bias=None, mask=None):
  """The oracle: float64, one example and one head at a time."""
  out = []
  for b in range(len(q_BTNH)):
    bias_NTS = np.zeros((N, q_BTNH.shape[1], k_BKSH.shape[2]))
    if bias is not None:
      bias_NTS += bias[b if len(bias) > 1 else 0]
    if mask is not None:
      bias_NTS = np.where(mask[b if len(mask) > 1 else 0], bias_NTS, -np.inf)
    k_SKH, v_SKH = (np.moveaxis(x[b], 0, 1) for x in (k_BKSH, v_BKSH))
    out.append(oracle.attend(q_BTNH[b], k_SKH, v_SKH, bias_NTS))
  return np.stack(out)


@oracle.jit
def jax_attention(q_BTNH, k_BKSH, v_BKSH, bias=None, mask=None):
  k_BSKH, v_BSKH = (jnp.swapaxes(x, 1, 2) for x in (k_BKSH, v_BKSH))
  return jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, bias=bias, mask=mask, scale=1.0
  )


def traced_attention(q_BTNH, k_BKSH, v_BKSH, **options):
  """What is tested, with keys as the oracles have them."""
  k_BKHS = jnp.swapaxes(k_BKSH, 2, 3)
  return attention.grouped_attention(q_BTNH, k_BKHS, v_BKSH, **options)


grouped_attention = oracle.jit(
  traced_attention, static_argnames=('float32_logits', 'dropout')
)


@pytest.mark.parametrize('K', KV_HEADS)
@pytest.mark.parametrize('shared', ['nothing', 'everything'])
def test_equals_oracles(K, shared):
  """Bias and mask of every row and query, or of all alike; and neither."""
  q, k, v, bias, mask = inputs(K)
  if shared == 'everything':
    bias, mask = bias[:1, :, 1:2], mask[:1, :, 1:2]
  for options in ({'bias': bias, 'mask': mask}, {})[: 1 if shared == 'nothing' else 2]:
    got = grouped_attention(q, k, v, **options)
    assert got.shape == (B, T, N, H)
    for expected in (loop, jax_attention):
      np.testing.assert_allclose(
        got, expected(q, k, v, **options), atol=1e-5, rtol=1e-5
      )


def test_query_heads_of_a_group_are_contiguous():
  """Value head k holds the number k, so the output says which head was read."""
  q, k, _, _, _ = inputs(2)
  v = np.broadcast_to(np.arange(2.0, dtype=np.float32)[:, None, None], k.shape)
  heads = np.asarray(grouped_attention(q, k, v))[0, 0, :, 0]
  np.testing.assert_allclose(heads, [0, 0, 1, 1], atol=1e-6)


def test_fully_masked_rows_are_the_mean_of_the_values():
  K = 2
  q, k, v, bias, mask = inputs(K)
  mask = mask.copy()
  mask[1, :, 2:4] = False
  got = np.asarray(grouped_attention(q, k, v, bias=bias, mask=mask))
  mean_NH = np.repeat(v[1].mean(1), N // K, axis=0)
  np.testing.assert_allclose(got[1, 2:4], [mean_NH, mean_NH], atol=1e-5)


def test_bfloat16():
  """Against the float64 loop on the same rounded inputs.

  One rounding is at most eps / 2 of a number's size; values have size 1. With float32
  logits probabilities and outputs are rounded, without them the logits (of size 2),
  too.
  """
  q, k, v, bias, mask = (
    x if x.dtype == bool else x.astype(jnp.bfloat16) for x in inputs(2)
  )
  expected = loop(*(x.astype(np.float64) for x in (q, k, v, bias)), mask)
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


def test_float32_logits_keep_what_bfloat16_cannot():
  """256 and 257 are the same number in bfloat16, and a factor of e in softmax."""
  q = jnp.full((1, 1, 1, 2), 16, jnp.bfloat16)
  k = jnp.asarray([[16, 0], [16, 1 / 16]], jnp.bfloat16)[None, None]
  v = jnp.asarray([[0.0, 0.0], [1.0, 1.0]], jnp.bfloat16)[None, None]
  rounded = float(grouped_attention(q, k, v)[0, 0, 0, 0])
  exact = float(grouped_attention(q, k, v, float32_logits=True)[0, 0, 0, 0])
  assert rounded == 0.5
  assert exact == pytest.approx(np.e / (1 + np.e), abs=BFLOAT16_EPS)


@pytest.mark.parametrize('K', KV_HEADS)
def test_gradients_equal_those_of_a_loop_over_heads(K):
  q, k, v, bias, mask = inputs(K)
  weights_BTNH = np.random.default_rng(1).standard_normal((B, T, N, H))

  def loss_of_loop(q, k, v, bias):
    out = 0.0
    for n in range(N):
      head = n // (N // K)
      logits = q[:, :, n] @ k[:, head].swapaxes(1, 2) + bias[:, n]
      probs = jax.nn.softmax(jnp.where(mask[:, 0], logits, -1e10))
      out += jnp.sum(probs @ v[:, head] * weights_BTNH[:, :, n])
    return out

  def loss(q, k, v, bias):
    return jnp.sum(traced_attention(q, k, v, bias=bias, mask=mask) * weights_BTNH)

  @oracle.jit
  def gradients(*args):
    return [jax.grad(f, (0, 1, 2, 3))(*args) for f in (loss, loss_of_loop)]

  got, expected = gradients(q, k, v, bias)
  for g, e in zip(got, expected, strict=True):
    np.testing.assert_allclose(g, e, atol=1e-5, rtol=1e-5)


# The module.


def module(K, **options):
  return attention.GroupedQueryAttention(N, K, H, **options)


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
  got = oracle.jit(module(K).apply)({'params': params}, x, y, mask, bias)
  for b in range(B):
    bias_NTS = np.where(mask[b], bias[b], -np.inf)
    expected = oracle.attention_layer(x[b], y[b], params, bias_NTS)
    np.testing.assert_allclose(got[b], expected, atol=1e-5, rtol=1e-5)


def kept(y_BSD, params, K):
  """Returns keys `[B, K, H, S]` and values `[B, K, S, H]` of the inputs, in NumPy."""
  k_BSKH, v_BSKH = (
    (y_BSD @ params[name]['kernel']).reshape(*y_BSD.shape[:2], K, H)
    for name in ('key', 'value')
  )
  return {
    'cached_key': k_BSKH.transpose(0, 2, 3, 1),
    'cached_value': v_BSKH.transpose(0, 2, 1, 3),
  }


@pytest.mark.parametrize('K', KV_HEADS)
def test_rows_share_the_keys_and_values_of_their_input(K):
  """Two rows an input, one query each, as in a step of two beams."""
  params, x, y, mask, bias = module_inputs(K)
  x_R1D = x[:, :2].reshape(2 * B, 1, D)
  mask, bias = mask[:, :, :1], bias[:, :, :1]
  got = oracle.jit(module(K).apply)(
    {'params': params, 'encoded_kv': kept(y, params, K)}, x_R1D, None, mask, bias
  )
  assert got.shape == (2 * B, 1, D)
  for row in range(2 * B):
    b = row // 2
    bias_N1S = np.where(mask[b], bias[b], -np.inf)
    expected = oracle.attention_layer(x_R1D[row], y[b], params, bias_N1S)
    np.testing.assert_allclose(got[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('K', KV_HEADS)
def test_rows_share_a_cache(K):
  """Two beams an input; of 3 positions the first is filled, the second gets its two
  slots, and each beam looks at slots of its own choice."""
  params, x, y, _, bias = module_inputs(K)
  x_R1D = x[:, :2].reshape(2 * B, 1, D)
  old, new = kept(y, params, K), kept(x[:, :2], params, K)
  before = {name: np.full_like(value, 99) for name, value in old.items()}
  before['cached_key'] = before['cached_key'][..., :6]
  before['cached_value'] = before['cached_value'][:, :, :6]
  before['cached_key'][..., :2] = old['cached_key'][..., :2]
  before['cached_value'][:, :, :2] = old['cached_value'][:, :, :2]
  seen = np.array([[[0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0]]], bool)[:, None]
  got, variables = oracle.jit(
    lambda x: module(K).apply(
      {'params': params, 'cache': before},
      x,
      x,
      seen,
      bias[:1, :, :1, :6],
      cache_index=jnp.asarray(1),
      mutable=['cache'],
    )
  )(x_R1D)
  expected = {name: value.copy() for name, value in before.items()}
  expected['cached_key'][..., 2:4] = new['cached_key']
  expected['cached_value'][:, :, 2:4] = new['cached_value']
  for name, after in variables['cache'].items():
    np.testing.assert_allclose(after, expected[name], atol=1e-5, rtol=1e-5)
  for row in range(2 * B):
    b, beam = divmod(row, 2)
    past_2D = np.stack([y[b, 1], x[b, beam]])  # The second slot, then its own.
    bias_N12 = bias[0, :, :1, :6][..., seen[0, 0, beam]]
    expected = oracle.attention_layer(x_R1D[row], past_2D, params, bias_N12)
    np.testing.assert_allclose(got[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('K', KV_HEADS)
def test_module_parameters(K):
  """1/sqrt(H) is in the query's initialiser, nowhere else."""
  big = attention.GroupedQueryAttention(num_heads=N, num_kv_heads=K, head_dim=64)
  x = jnp.zeros((1, 1, 256))
  kernels = oracle.jit(big.init)(jax.random.PRNGKey(0), x, x)['params']
  shapes = {name: leaf['kernel'].shape for name, leaf in kernels.items()}
  assert shapes == {
    'query': (256, N * 64),
    'key': (256, K * 64),
    'value': (256, K * 64),
    'out': (N * 64, 256),
  }
  deviations = {name: float(jnp.std(leaf['kernel'])) for name, leaf in kernels.items()}
  expected = {name: 1 / 16 for name in ('query', 'key', 'value', 'out')}
  expected['query'] /= 8
  assert deviations == pytest.approx(expected, rel=0.03)


def test_dropout_of_probabilities():
  """What is kept is scaled; a key is dropped for all queries of a row alike."""
  K, rate, draws = 2, 0.25, 400
  layer = module(K, dropout_rate=rate)

  @oracle.jit
  @jax.vmap
  def draw(rng):
    bound = layer.bind({'params': {}}, rngs={'dropout': rng})
    return bound._dropout(deterministic=False)(jnp.ones((B, K, N // K, T, S)))

  drawn = np.asarray(draw(jax.random.split(jax.random.PRNGKey(4), draws)))
  np.testing.assert_allclose(np.unique(drawn), [0, 1 / (1 - rate)], rtol=1e-6)
  np.testing.assert_array_equal(drawn, drawn[..., :1, :].repeat(T, axis=-2))
  dropped = drawn[..., 0, :] == 0
  deviation = np.sqrt(rate * (1 - rate))
  assert abs(dropped.mean() - rate) < 4 * deviation / np.sqrt(dropped.size)
  # Rows, heads and keys are drawn apart from each other, and anew each time.
  assert abs(dropped.mean(0) - rate).max() < 5 * deviation / np.sqrt(draws)
  correlations = np.corrcoef(dropped.reshape(draws, -1).T)
  assert abs(correlations - np.eye(B * N * S)).max() < 6 / np.sqrt(draws)


def test_dropout_keeps_the_expectation():
  params, x, y, mask, bias = module_inputs(2)
  layer = module(2, dropout_rate=0.25)

  @oracle.jit
  @jax.vmap
  def apply(rng):
    return layer.apply({'params': params}, x, y, mask, bias, rngs={'dropout': rng})

  outs = np.asarray(apply(jax.random.split(jax.random.PRNGKey(5), 400)), np.float64)
  deterministic = functools.partial(layer.apply, deterministic=True)
  expected = oracle.jit(deterministic)({'params': params}, x, y, mask, bias)
  standard_error = outs.std(0) / np.sqrt(len(outs))
  assert (standard_error > 1e-3).mean() > 0.9
  assert (np.abs(outs.mean(0) - expected) < 5 * standard_error + 1e-6).all()


@pytest.mark.parametrize(
  ('num_heads', 'num_kv_heads', 'divisors'),
  [(12, 5, '1, 2, 3, 4, 6, 12'), (4, 8, '1, 2, 4'), (6, 0, '1, 2, 3, 6')],
)
def test_heads_that_do_not_divide(num_heads, num_kv_heads, divisors):
  message = (
    f'num_heads={num_heads} is not divisible by num_kv_heads={num_kv_heads};'
    f' choose one of {divisors}.'
  )
  with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
    axes.check_heads(num_heads, num_kv_heads)


def test_bad_heads_are_found_by_the_module():
  x, init = np.zeros((1, 1, D)), module(3).init
  with pytest.raises(ValueError, match='=4 is not divisible by num_kv_heads=3;'):
    jax.eval_shape(init, jax.random.PRNGKey(0), x, x)
  with pytest.raises(ValueError, match=r'^num_heads=0 must be at least 1\.$'):
    axes.check_heads(0, 1)
