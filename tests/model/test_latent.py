"""Key/value heads of a size of their own: the latent form.

Steps equal the full forward pass in test_generate.py; costs are in test_costs.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gqa_t5x.decoding import generate
from gqa_t5x.model import attention, network, sharding
from helpers import model_oracle as oracle

N, H, D = oracle.N, oracle.H, oracle.D


def logits(cfg, params=None, batch=None):
  params = oracle.params(cfg) if params is None else params
  return np.asarray(oracle.forward(cfg)(params, batch or oracle.batch()))


@pytest.mark.parametrize(('K', 'R'), oracle.LATENT)
def test_logits_equal_the_oracles(K, R):
  """It maps keys and values of each head up, and multiplies queries with those."""
  cfg = oracle.config(K, kv_head_dim=R)
  oracle.assert_logits(logits(cfg), cfg)


def test_packed_examples_equal_the_same_examples_unpacked():
  cfg = oracle.config(1, kv_head_dim=15)
  packed = logits(cfg, batch=oracle.packed_batch())
  ids = oracle.packed_batch()['decoder_segment_ids']
  for b, expected in enumerate(oracle.expected_logits(cfg)):
    row, segment = divmod(b, 2)
    got = packed[row][ids[row] == segment + 1]
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_heads_of_the_usual_size_are_gqa():
  """Bit for bit, without a parameter more."""
  cfg = oracle.config(2, kv_head_dim=H)
  assert oracle.initial_shapes(cfg) == oracle.initial_shapes(oracle.config(2))
  np.testing.assert_array_equal(logits(cfg), logits(oracle.config(2)))


def test_shapes_and_axes():
  """Of the decoder's two kinds of attention; the encoder has no such head."""
  variables = oracle.initial_shapes(oracle.config(2, kv_head_dim=9))
  shapes = {name: x.shape for name, x in oracle.flat(variables['params']).items()}
  assert not any('_up' in name for name in shapes if name.startswith('encoder'))
  for kind in ('self_attention', 'encoder_decoder_attention'):
    for name in ('key', 'value'):
      path = f'decoder/layers_1/{kind}/{name}'
      assert shapes[f'{path}/kernel'] == (D, 2 * 9)
      assert shapes[f'{path}_up/kernel'] == (9, N * H)
      names = oracle.axis_names(variables)[f'{path}_up/kernel']
      assert names == ('kv', 'joined_kv')


def as_latent(params):
  """Returns MHA's parameters with one key/value head, which is all heads in a row.

  Each up-projection then selects its head's block of them: side by side, the identity.
  """
  flat = oracle.flat(params)
  up = {
    path.replace('/query/', f'/{name}/'): np.eye(N * H, dtype=np.float32)
    for path in flat
    if path.startswith('decoder') and '/query/' in path
    for name in ('key_up', 'value_up')
  }
  return traverse_util.unflatten_dict(flat | up, sep='/')


MHA, WHOLE = oracle.config(N), oracle.config(1, kv_head_dim=N * H)


def test_one_head_of_all_numbers_is_mha():
  got = logits(WHOLE, as_latent(oracle.params(MHA)))
  np.testing.assert_allclose(got, logits(MHA), atol=1e-5, rtol=1e-5)


def test_gradients():
  """Where the latent form is MHA, so are its gradients.

  And as keys are x W U, the gradient of a map U is W^T times that of MHA's kernel, W U.
  """

  def gradients(cfg, params):
    def loss(params):
      return jnp.sum(jnp.sin(oracle.forward(cfg).__wrapped__(params, oracle.batch())))

    return oracle.flat(oracle.jit(jax.grad(loss))(params))

  params = oracle.params(MHA)
  expected, got = gradients(MHA, params), gradients(WHOLE, as_latent(params))
  maps = [path for path in got if '_up/' in path]
  assert len(maps) == 2 * 2 * oracle.DECODER_LAYERS
  for path in maps:
    kernel = path.replace('_up', '')
    expected[path] = oracle.flat(params)[kernel].T @ np.asarray(expected[kernel])
  for path, gradient in expected.items():
    largest = np.abs(gradient).max()
    np.testing.assert_allclose(
      got[path], gradient, rtol=1e-4, atol=1e-4 * largest, err_msg=path
    )


def test_initial_values():
  """Logits have variance 1 at first, as with keys of H numbers: fan-in, R."""
  cfg = dict(num_heads=16, num_kv_heads=2, head_dim=32, kv_head_dim=128)
  layer = attention.GroupedQueryAttention(**cfg)
  x = jax.random.normal(jax.random.PRNGKey(1), (1, 256, 512))
  kernels = oracle.jit(layer.init)(jax.random.PRNGKey(0), x, x)['params']
  deviations = {name: float(jnp.std(leaf['kernel'])) for name, leaf in kernels.items()}
  expected = {'key': 512, 'value': 512, 'out': 512, 'key_up': 128, 'value_up': 128}
  expected = {name: fan_in**-0.5 for name, fan_in in expected.items()}
  assert deviations == pytest.approx(expected | {'query': (512 * 32) ** -0.5}, rel=0.03)
  query, key, up = (
    np.asarray(kernels[k]['kernel']) for k in ('query', 'key', 'key_up')
  )
  q_TNH, k_SNH = (x[0] @ query).reshape(256, 16, 32), []
  for n in range(16):
    shared = (x[0] @ key)[:, n // 8 * 128 :][:, :128]
    k_SNH.append(shared @ up[:, 32 * n :][:, :32])
  logits = np.einsum('TNH,NSH->NTS', q_TNH, np.stack(k_SNH))
  assert logits.std() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
  ('K', 'R', 'name', 'num_decodes', 'platform'),
  [
    (1, 15, 'greedy', 1, 'cpu'),
    (1, 15, 'beam_search', 3, 'tpu'),
    (2, 4, 'beam_search', 3, 'cpu'),
    (2, 4, 'temperature_sample', 3, 'tpu'),
    (N, 5, 'greedy', 1, 'tpu'),
  ],
)
def test_the_score_of_a_decode_is_its_log_probability(
  K, R, name, num_decodes, platform, monkeypatch
):
  """By the full forward pass. On a TPU new keys and values are pending."""
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  cfg, prompts = oracle.config(K, kv_head_dim=R), oracle.prompt_batch()
  options = {'alpha': 0.0} if name == 'beam_search' else {}
  decode_fn = functools.partial(
    oracle.DECODE_FNS[name], num_decodes=num_decodes, **options
  )
  run = functools.partial(generate.generate, network.Transformer(cfg), eos_id=oracle.V)
  run = oracle.jit(functools.partial(run, decode_fn=decode_fn))
  params, inputs = oracle.params(cfg), oracle.batch()['encoder_input_tokens']
  tokens, scores = (np.asarray(x) for x in run(params, inputs, prompts))
  for i in range(num_decodes):
    batch = {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': np.pad(tokens[:, i, :-1], ((0, 0), (1, 0))),
      'decoder_target_tokens': np.ones_like(tokens[:, i]),
    }
    log_probs = np.asarray(jax.nn.log_softmax(logits(cfg, batch=batch)))
    chosen = np.take_along_axis(log_probs, tokens[:, i, :, None], 2)
    np.testing.assert_allclose(scores[:, i], chosen.sum((1, 2)), atol=1e-3, rtol=1e-4)
