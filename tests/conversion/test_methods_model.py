"""Conversion methods on whole models: logits, and statistics of the inputs."""

import numpy as np
import pytest

from gqa_t5x.checkpoints.tree import unflatten
from gqa_t5x.conversion.input_statistics import InputStatistics, write_statistics
from gqa_t5x.conversion.kernels import ALL_KERNELS, AttentionModule, permute_heads
from gqa_t5x.conversion.methods import METHODS, convert_module
from gqa_t5x.conversion.plan import convert_params
from gqa_t5x.errors import BadInput
from helpers import model_oracle as oracle
from helpers.trees import D, H, N, flat, tiny_params

ABSORBING = [method for method, m in METHODS.items() if m.uses_inputs]
CROSS = 'encoder_decoder_attention'
# Source and new key/value heads of the model that runs, of N heads as the tiny tree.
FEWER = [(N, 2), (2, 1)]


def logits(params, K=N, **config):
  return np.asarray(oracle.forward(oracle.config(K, **config))(params, oracle.batch()))


def model_params(K=N, **config):
  return oracle.params(oracle.config(K, **config))


def kernels_of(params, path):
  """The kernels of one attention module, query, key, value, out."""
  leaves = dict(flat(params))
  return {name: leaves[f'{path}/{name}/kernel'] for name in ALL_KERNELS}


def with_kernels(params, path, kernels):
  new = {f'{path}/{name}/kernel': kernel for name, kernel in kernels.items()}
  return unflatten({**dict(flat(params)), **new})


def attention_modules(params, *names):
  """Paths of the decoder's attention modules of these names."""
  found = {p.rsplit('/', 2)[0] for p, _ in flat(params) if p.endswith('query/kernel')}
  return sorted(path for path in found if path.rpartition('/')[2] in names)


# Logits.


def with_shared_subspaces(source, K, **config):
  """A model whose decoder has K/V heads B R_i, with B common to each of K groups."""
  params, rng = model_params(source, **config), np.random.default_rng(0)
  for path in attention_modules(params, 'self_attention', CROSS):
    kernels = kernels_of(params, path)
    for name in ('key', 'value'):
      shape = oracle.D, K, source // K, oracle.H
      base_DKGH = np.repeat(kernels[name].reshape(shape)[:, :, :1], source // K, axis=2)
      turn_KGHH = rng.normal(size=(*shape[1:], oracle.H)) / np.sqrt(oracle.H)
      heads_DKGH = np.einsum('dkgh,kghi->dkgi', base_DKGH, turn_KGHH)
      kernels[name] = heads_DKGH.reshape(oracle.D, -1).astype(np.float32)
    params = with_kernels(params, path, kernels)
  return params


@pytest.mark.parametrize(('source', 'K'), FEWER)
def test_svd_keeps_the_logits_where_heads_share_a_subspace(source, K):
  params = with_shared_subspaces(source, K)
  expected = logits(params, source)
  got = convert_params(params, num_kv_heads=K, method='svd')
  np.testing.assert_allclose(logits(got, K), expected, atol=1e-4, rtol=1e-4)
  mean = convert_params(params, num_kv_heads=K, method='mean')
  assert np.abs(logits(mean, K) - expected).max() > 0.5


def test_grouping_by_similarity_keeps_the_logits_where_related_heads_are_apart():
  """In cross-attention heads 0 and 2 share a subspace, and 1 and 3."""
  params = with_shared_subspaces(N, 2)
  for path in attention_modules(params, CROSS):
    kernels = permute_heads(kernels_of(params, path), np.array([0, 2, 1, 3]))
    params = with_kernels(params, path, kernels)
  error = {}
  for grouping in ('contiguous', 'similarity'):
    got = convert_params(params, num_kv_heads=2, method='svd', grouping=grouping)
    error[grouping] = np.abs(logits(got, 2) - logits(params)).max()
  assert error['similarity'] < 1e-4
  assert error['contiguous'] > 1e-2


def test_grouping_by_similarity_takes_the_bias_of_a_layer_along():
  """As in umT5: heads of self-attention, too, are reordered where each has its own."""
  per_layer = {'relpos_per_layer': True}
  params = with_shared_subspaces(N, 2, **per_layer)
  for path in attention_modules(params, 'self_attention'):
    bias = f'{path.rpartition("/")[0]}/relpos_bias/rel_embedding'
    kernels = kernels_of(params, path) | {'bias': dict(flat(params))[bias]}
    kernels = permute_heads(kernels, np.array([0, 2, 1, 3]))
    params = unflatten({**dict(flat(params)), bias: kernels.pop('bias')})
    params = with_kernels(params, path, kernels)
  error, expected = {}, logits(params, **per_layer)
  for grouping in ('contiguous', 'similarity'):
    got = convert_params(params, num_kv_heads=2, method='svd', grouping=grouping)
    error[grouping] = np.abs(logits(got, 2, **per_layer) - expected).max()
  assert error['similarity'] < 1e-4
  assert error['contiguous'] > 1e-2


# Statistics of the inputs.

MODULES = {
  'encoder/layers_0/attention': (
    'encoder/layers_0/pre_attention_layer_norm/scale',
    'encoder/layers_0/pre_attention_layer_norm/scale',
  ),
  'decoder/layers_1/self_attention': (
    'decoder/layers_1/pre_self_attention_layer_norm/scale',
    'decoder/layers_1/pre_self_attention_layer_norm/scale',
  ),
  'decoder/layers_1/encoder_decoder_attention': (
    'decoder/layers_1/pre_cross_attention_layer_norm/scale',
    'encoder/encoder_norm/scale',
  ),
}


def statistics_of_norms(params):
  """What the weights alone say: the squared scales of the norms in front."""
  leaves = dict(flat(params))
  scales = {
    path: [leaves[norm].astype(np.float64) ** 2 for norm in norms]
    for path, norms in MODULES.items()
  }
  return {
    path: InputStatistics(query, key, key) for path, (query, key) in scales.items()
  }


def write_random_statistics(path, width=D):
  """A file of statistics of every module, and what is in it."""
  rng = np.random.default_rng(2)

  def second_moments():
    x = rng.normal(size=(3 * width, width))
    return (x.T @ x / len(x)).astype(np.float32)

  modules = attention_modules(tiny_params(), 'attention', 'self_attention', CROSS)
  statistics = {
    module: InputStatistics(second_moments(), second_moments(), second_moments())
    for module in modules
  }
  write_statistics(path, statistics, {'checkpoint': 'here', 'step': 7})
  return statistics


@pytest.mark.parametrize('calibrated', [False, True])
@pytest.mark.parametrize(
  ('method', 'grouping'),
  [
    *((method, 'contiguous') for method in ABSORBING),
    ('svd', 'similarity'),
    ('mean', 'similarity'),  # statistics guide the grouping alone
  ],
)
def test_each_module_is_converted_with_its_statistics(
  method, grouping, calibrated, tmp_path
):
  before, file = tiny_params(), tmp_path / 'statistics.npz'
  written = write_random_statistics(file)
  statistics = written if calibrated else statistics_of_norms(before)
  got = convert_params(
    before,
    method=method,
    grouping=grouping,
    statistics=file if calibrated else None,
    num_kv_heads=2,
    encoder_num_kv_heads=2,
  )
  for path in MODULES:
    reorder = grouping if path.endswith(CROSS) else 'contiguous'
    module = AttentionModule(path, N, 2, H)
    expected = convert_module(
      kernels_of(before, path), module, method, statistics[path], reorder
    )
    for name, kernel in kernels_of(got, path).items():
      np.testing.assert_array_equal(kernel, expected[name])


# Bad input.


def test_statistics_of_a_model_of_another_width(tmp_path):
  path = tmp_path / 'moments.npz'
  write_random_statistics(path, width=9)
  with pytest.raises(BadInput) as error:
    convert_params(tiny_params(), num_kv_heads=2, method='svd', statistics=path)
  assert str(error.value) == (
    f'{path}: the statistics of decoder/layers_0/self_attention are of shape (9, 9),'
    f' expected [D, D] or [D] with D={D}, the width of the model: they are of another'
    ' checkpoint'
  )
