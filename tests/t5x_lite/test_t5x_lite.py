"""The stand-in for T5X: its mathematics and layouts, against independent oracles."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

t5x = pytest.importorskip('t5x')
if not t5x.__version__.endswith('lite'):
  pytest.skip('the stand-in is not installed', allow_module_level=True)

from t5x import (  # noqa: E402
  adafactor,
  gin_utils,
  losses,
  partitioning,
  utils,
)
from t5x import train as train_lib  # noqa: E402

from helpers import commands, toy  # noqa: E402

RNG = np.random.default_rng(0)
PARSE = 'from t5x import gin_utils; gin_utils.run_command(print)'


@pytest.mark.parametrize(
  ('words', 'code'), [(['--help'], 0), (['-h'], 0), (['--nosuch'], 1), (['--gin.X'], 1)]
)
def test_exit_codes(words, code):
  done = commands.run(commands.ROOT, '-c', PARSE, *words)
  assert done.returncode == code, done.stdout


@pytest.mark.parametrize('fails', [False, True])
def test_a_run_that_fails_waits_for_its_checkpoint(fails):
  """Or the last line would be that of the thread that saves it."""
  run, waited = object.__new__(train_lib._Run), []

  def wait():
    waited.append(1)
    if fails:
      raise OSError('no room')

  run.manager = types.SimpleNamespace(wait_until_finished=wait)
  run._run = lambda: 1 // 0
  with pytest.raises(ZeroDivisionError):
    run.run()
  assert waited == [1]


# --- Adafactor ----------------------------------------------------------------


def _adafactor_oracle(
  p, grads, lr, factored, beta1, clip, scale, eps1=1e-30, eps2=1e-3
):
  """Adafactor step by step, as the paper's algorithms 4 and 5 state it."""
  p, m = p.astype(np.float64), np.zeros(p.shape)
  v = np.zeros(p.shape)
  r, c = (np.zeros(p.shape[0]), np.zeros(p.shape[-1])) if factored else (None, None)
  for t, g in enumerate(grads, start=1):
    decay = 1 - t**-0.8
    g = g.astype(np.float64)
    square = g * g + eps1
    if factored:
      r = decay * r + (1 - decay) * square.mean(axis=1)
      c = decay * c + (1 - decay) * square.mean(axis=0)
      v = np.outer(r, c) / r.mean()
    else:
      v = decay * v + (1 - decay) * square
    u = g / np.sqrt(v)
    if clip is not None:
      u = u / max(1.0, np.sqrt((u * u).mean()) / clip)
    step = lr * u * (max(eps2, np.sqrt((p * p).mean())) if scale else 1.0)
    m = beta1 * m + (1 - beta1) * step if beta1 is not None else step
    p = p - m
  return p, r, c, v


@pytest.mark.parametrize(
  ('shape', 'factored'),
  [
    ((130, 140), True),
    ((140, 130), True),
    ((128, 128), True),
    ((127, 300), False),
    ((7,), False),
  ],
)
@pytest.mark.parametrize(
  ('beta1', 'clip', 'scale'), [(None, 1.0, True), (0.9, 0.5, True), (None, None, False)]
)
def test_adafactor_equals_the_paper(shape, factored, beta1, clip, scale):
  optimizer = adafactor.Adafactor(
    beta1=beta1, clipping_threshold=clip, multiply_by_parameter_scale=scale
  )
  param = RNG.normal(size=shape).astype(np.float32)
  grads = [(RNG.normal(size=shape) ** 3).astype(np.float32) for _ in range(3)]
  params = {'a': {'kernel': jnp.asarray(param)}}
  state = optimizer.init_state(params)
  hyper_params = optimizer.update_hyper_params(learning_rate=0.1)
  for grad in grads:
    tree = {'a': {'kernel': jnp.asarray(grad)}}
    params, state = optimizer.apply_gradient(hyper_params, params, state, tree)
  p, r, c, v = _adafactor_oracle(param, grads, 0.1, factored, beta1, clip, scale)
  np.testing.assert_allclose(params['a']['kernel'], p, rtol=1e-5, atol=1e-6)
  moments = state.param_states['a']['kernel']
  assert int(state.step) == 3
  if factored:
    # T5X: the larger side is averaged out of v_row; equal sides keep their order.
    row, col = (r, c) if shape[0] <= shape[1] else (c, r)
    np.testing.assert_allclose(moments.v_row, row, rtol=1e-5)
    np.testing.assert_allclose(moments.v_col, col, rtol=1e-5)
    assert moments.v.shape == (1,)
  else:
    np.testing.assert_allclose(moments.v, v, rtol=1e-5)
    assert moments.v_row.shape == moments.v_col.shape == (1,)
  assert moments.m.shape == (shape if beta1 is not None else (1,))


# --- Schedules and losses -----------------------------------------------------


@pytest.mark.parametrize(
  ('factors', 'step', 'expected'),
  [
    ('constant * rsqrt_decay', 0, 0.2),
    ('constant * rsqrt_decay', 400, 0.1),
    ('constant * cosine_decay', 110, 1.0),
  ],
)
def test_learning_rate(factors, step, expected):
  schedule = utils.create_learning_rate_scheduler(
    factors, base_learning_rate=2.0, warmup_steps=100, steps_per_cycle=20
  )
  np.testing.assert_allclose(schedule(jnp.asarray(step)), expected, rtol=1e-6)


def test_learning_rate_names_the_factors_that_are_not_here():
  with pytest.raises(ValueError, match='has no linear_warmup; choose among constant,'):
    utils.create_learning_rate_scheduler('constant * linear_warmup')


def _loss_oracle(logits, targets, weights, smoothing, z_loss):
  """A loop over tokens."""
  total, total_z = 0.0, 0.0
  vocab = logits.shape[-1]
  for b, t in np.ndindex(targets.shape):
    x = logits[b, t].astype(np.float64)
    log_z = np.log(np.exp(x).sum())
    q = np.full(vocab, smoothing / (vocab - 1))
    q[targets[b, t]] = 1 - smoothing
    entropy = -(q[q > 0] * np.log(q[q > 0])).sum()
    z = z_loss * log_z**2
    total += weights[b, t] * (-(q * (x - log_z)).sum() + z - entropy)
    total_z += weights[b, t] * z
  return total, total_z


@pytest.mark.parametrize(('smoothing', 'z_loss'), [(0.0, 0.0), (0.1, 0.0), (0.1, 1e-2)])
def test_loss(smoothing, z_loss):
  logits = RNG.normal(size=(2, 3, 5)).astype(np.float32) * 3
  targets = RNG.integers(0, 5, (2, 3))
  weights = np.array([[1, 1, 0], [1, 0, 0]], np.float32)

  def loss(x):
    return losses.compute_weighted_cross_entropy(
      x, targets, weights, smoothing, z_loss, loss_normalizing_factor=4.0
    )

  total, z, weight_sum = loss(logits)
  expected = _loss_oracle(logits, targets, weights, smoothing, z_loss)
  np.testing.assert_allclose([total, z], np.array(expected) / 4, rtol=1e-5)
  assert float(weight_sum) == 3.0
  grad = jax.grad(lambda x: loss(x)[0])(jnp.asarray(logits))
  for index in ((0, 1, 2), (1, 0, 4)):
    moved = []
    for delta in (1e-3, -1e-3):
      x = logits.astype(np.float64)
      x[index] += delta
      moved.append(_loss_oracle(x, targets, weights, smoothing, z_loss)[0] / 4)
    np.testing.assert_allclose(grad[index], (moved[0] - moved[1]) / 2e-3, atol=1e-5)


@pytest.mark.parametrize(
  ('factor', 'number', 'weights'),
  [
    (3.5, 3.5, None),
    (None, None, None),
    ('NUM_REAL_TARGET_TOKENS', 5, [[1, 1, 1, 0], [1, 1, 0, 0]]),
    ('num_total_target_tokens', 8, [[1, 1, 1, 0], [1, 1, 0, 0]]),
    ('AVERAGE_PER_SEQUENCE', 3, [[0.5, 0.5, 1, 0], [0.5, 0.5, 0, 0]]),
  ],
)
def test_loss_normalizing_factor(factor, number, weights):
  batch = {
    'decoder_target_tokens': jnp.array([[5, 1, 1, 0], [7, 1, 0, 0]]),
    'decoder_segment_ids': jnp.array([[1, 1, 2, 0], [1, 1, 0, 0]]),
    'decoder_positions': jnp.array([[0, 1, 0, 0], [0, 1, 0, 0]]),
  }
  got, got_weights = losses.get_loss_normalizing_factor_and_weights(factor, batch)
  assert (got is None and number is None) or float(got) == pytest.approx(number)
  if weights is None:
    assert got_weights is None
  else:
    np.testing.assert_allclose(got_weights, weights)


def test_loss_normalizing_factor_rejects_an_unknown_name():
  with pytest.raises(ValueError, match='AVERAGE_PER_SEQUENCE'):
    losses.get_loss_normalizing_factor_and_weights('PER_WORD', {})


# --- Partitioning -------------------------------------------------------------


def test_moments_are_replicated_or_laid_out_like_their_parameter():
  rules = partitioning.standard_logical_axis_rules(1, 2, [('mine', None)])
  assert rules[-1] == ('mine', None)
  axes = toy.toy_initializer(toy.toy_model(), logical_axis_rules=rules).train_state_axes
  assert tuple(axes.params['table']) == ('model', 'data')
  assert axes.param_states['table'].v_row is None  # Factored.
  assert axes.param_states['table'].v is None
  assert tuple(axes.param_states['scale'].v) == tuple(axes.params['scale'])
  assert axes.step is None


def test_partitioner_rejects_bad_sizes():
  with pytest.raises(ValueError, match='exactly one'):
    partitioning.PjitPartitioner(num_partitions=2, model_parallel_submesh=(1, 1, 1, 2))
  with pytest.raises(ValueError, match='activation_partitioning_dims=3'):
    partitioning.standard_logical_axis_rules(3, 1)


def test_gin_arguments_are_rewritten():
  args = ['x', '--gin.A=1', "--gin.b.C='d=e'", '--gin_file=f']
  expected = ['x', '--gin_bindings=A = 1', "--gin_bindings=b.C = 'd=e'", '--gin_file=f']
  assert gin_utils.rewrite_gin_args(args) == expected
  with pytest.raises(ValueError, match=r'--gin\.A=VALUE'):
    gin_utils.rewrite_gin_args(['--gin.A'])
