"""Conversion methods on whole models: logits, inputs' moments, optimizer, bad input."""

import numpy as np
import pytest

from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.checkpoints.tree import flatten, unflatten
from gqa_t5x.conversion.input_statistics import InputStatistics, write_statistics
from gqa_t5x.conversion.kernels import ALL_KERNELS, AttentionModule, permute_heads
from gqa_t5x.conversion.methods import METHODS, convert_module
from gqa_t5x.conversion.plan import convert_params, plan_conversion
from gqa_t5x.errors import BadInput
from helpers import model_oracle as oracle
from helpers.trees import UNUSED, D, H, N, flat, tiny_params, tiny_state

ABSORBING = [method for method, m in METHODS.items() if m.uses_inputs]
CROSS = 'encoder_decoder_attention'
LAYERS = range(oracle.DECODER_LAYERS)
# Source and new key/value heads of the model that runs, of N heads as the tiny tree.
FEWER = [(N, 1), (N, 2), (2, 1)]


def logits(params, K=N):
  return np.asarray(oracle.forward(oracle.config(K))(params, oracle.batch()))


def model_params(K=N):
  return oracle.params(oracle.config(K))


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


def with_shared_subspaces(source, K):
  """A model whose decoder has K/V heads B R_i, with B common to each of K groups."""
  params, rng = model_params(source), np.random.default_rng(0)
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


@pytest.mark.parametrize('grouping', ['contiguous', 'similarity'])
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(('source', 'K'), FEWER)
def test_the_new_model_runs(source, K, method, grouping):
  before = model_params(source)
  after = convert_params(before, num_kv_heads=K, method=method, grouping=grouping)
  shapes = {path: leaf.shape for path, leaf in flat(model_params(K))}
  assert {path: leaf.shape for path, leaf in flat(after)} == shapes
  assert {leaf.dtype for _, leaf in flat(after)} == {np.dtype(np.float32)}
  got, expected = logits(after, K), logits(before, source)
  assert got.shape == expected.shape
  assert np.isfinite(got).all()
  assert np.abs(got - expected).max() > 1e-2


@pytest.mark.parametrize('grouping', ['contiguous', 'similarity'])
@pytest.mark.parametrize('method', METHODS)
def test_as_many_heads_as_before_change_nothing(method, grouping):
  before = model_params()
  after = convert_params(before, num_kv_heads=N, method=method, grouping=grouping)
  for (path, new), (_, old) in zip(flat(after), flat(before), strict=True):
    np.testing.assert_array_equal(new, old, err_msg=path)


@pytest.mark.parametrize('method', [m for m in METHODS if m != 'random'])
def test_as_many_heads_as_before_leave_the_logits_unchanged(method):
  # `convert_params` leaves such modules out, so they are converted one by one.
  before = after = model_params()
  rng = np.random.default_rng(1)
  scales = rng.uniform(0.5, 2, (2, oracle.D))
  inputs = InputStatistics(scales[0], scales[1], scales[1])
  for path in attention_modules(before, 'self_attention', CROSS):
    kernels = kernels_of(before, path)
    if path.endswith(CROSS):
      kernels = permute_heads(kernels, rng.permutation(N))
    grouping = 'similarity' if path.endswith(CROSS) else 'contiguous'
    module = AttentionModule(path, N, N, N, oracle.H)
    new = convert_module(kernels, module, method, inputs, grouping)
    after = with_kernels(after, path, new)
  np.testing.assert_allclose(logits(after), logits(before), atol=1e-4, rtol=1e-4)


ORDER = np.array([3, 0, 1, 2])


@pytest.mark.parametrize(
  ('layers', 'move_bias', 'unchanged'),
  [
    ([0], False, False),
    ([0], True, False),  # the other layer reads the same table
    (LAYERS, False, False),
    (LAYERS, True, True),
  ],
)
def test_heads_of_self_attention_are_tied_to_the_bias(layers, move_bias, unchanged):
  params = model_params()
  moved = params
  for layer in layers:
    path = f'decoder/layers_{layer}/self_attention'
    moved = with_kernels(moved, path, permute_heads(kernels_of(moved, path), ORDER))
  if move_bias:
    leaves = dict(flat(moved))
    leaves['decoder/relpos_bias/rel_embedding'] = leaves[
      'decoder/relpos_bias/rel_embedding'
    ][ORDER]
    moved = unflatten(leaves)
  error = np.abs(logits(moved) - logits(params)).max()
  assert error < 1e-4 if unchanged else error > 1e-1


def with_scattered_subspaces():
  """Two subspaces; in cross-attention, heads 0 and 2 share one, and 1 and 3."""
  params = with_shared_subspaces(N, 2)
  for path in attention_modules(params, CROSS):
    kernels = permute_heads(kernels_of(params, path), np.array([0, 2, 1, 3]))
    params = with_kernels(params, path, kernels)
  return params


def test_grouping_by_similarity_keeps_the_logits_where_related_heads_are_apart():
  params = with_scattered_subspaces()
  error = {}
  for grouping in ('contiguous', 'similarity'):
    got = convert_params(params, num_kv_heads=2, method='svd', grouping=grouping)
    error[grouping] = np.abs(logits(got, 2) - logits(params)).max()
  assert error['similarity'] < 1e-4
  assert error['contiguous'] > 1e-2


@pytest.mark.parametrize('method', METHODS)
def test_grouping_by_similarity_leaves_self_attention_contiguous(method):
  params = with_scattered_subspaces()
  contiguous, similar = (
    dict(flat(convert_params(params, num_kv_heads=2, method=method, grouping=grouping)))
    for grouping in ('contiguous', 'similarity')
  )
  for path, expected in contiguous.items():
    if f'{CROSS}/query' in path or f'{CROSS}/out' in path:
      assert np.abs(similar[path] - expected).max() > 0.01
    elif CROSS not in path:
      np.testing.assert_array_equal(similar[path], expected)


# Second moments of the inputs.

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


def assert_converted(got, before, path, inputs, method, grouping):
  """Compares one module of the tiny tree with `convert_module`, from 4 heads to 2."""
  module = AttentionModule(path, N, N, 2, H)
  grouping = grouping if path.endswith(CROSS) else 'contiguous'
  expected = convert_module(kernels_of(before, path), module, method, inputs, grouping)
  for name, kernel in kernels_of(got, path).items():
    np.testing.assert_array_equal(kernel, expected[name])


@pytest.mark.parametrize('grouping', ['contiguous', 'similarity'])
@pytest.mark.parametrize('method', ['mean', *ABSORBING])
def test_the_weights_alone_give_the_scales_of_the_norms_in_front(method, grouping):
  before = tiny_params()
  heads = {'num_kv_heads': 2, 'encoder_num_kv_heads': 2}
  got = convert_params(before, method=method, grouping=grouping, **heads)
  leaves = dict(flat(before))
  for path, (query, key) in MODULES.items():
    query, key = (leaves[norm].astype(np.float64) ** 2 for norm in (query, key))
    inputs = InputStatistics(query, key, key)
    assert_converted(got, before, path, inputs, method, grouping)


def write_random_statistics(path, width=D, without=()):
  """A file of moments of every module, and what is in it."""
  rng = np.random.default_rng(2)

  def moment():
    x = rng.normal(size=(3 * width, width))
    return (x.T @ x / len(x)).astype(np.float32)

  modules = attention_modules(tiny_params(), 'attention', 'self_attention', CROSS)
  moments = {
    m: InputStatistics(moment(), moment(), moment())
    for m in modules
    if m not in without
  }
  write_statistics(path, moments, {'checkpoint': 'here', 'step': 7})
  return moments


@pytest.mark.parametrize('grouping', ['contiguous', 'similarity'])
@pytest.mark.parametrize('method', ABSORBING)
def test_statistics_give_the_moments_of_each_module(method, grouping, tmp_path):
  before, file = tiny_params(), tmp_path / 'statistics.npz'
  moments = write_random_statistics(file)
  options = {'num_kv_heads': 2, 'encoder_num_kv_heads': 2, 'grouping': grouping}
  got = convert_params(before, method=method, statistics=file, **options)
  for path in MODULES:
    assert_converted(got, before, path, moments[path], method, grouping)
  weights_only = convert_params(before, method=method, **options)
  path = 'decoder/layers_1/self_attention/query/kernel'
  assert not np.allclose(dict(flat(got))[path], dict(flat(weights_only))[path])


def test_statistics_may_guide_the_grouping_alone(tmp_path):
  before, file = tiny_params(), tmp_path / 'statistics.npz'
  moments = write_random_statistics(file)
  options = {'num_kv_heads': 2, 'method': 'mean', 'grouping': 'similarity'}
  got = convert_params(before, statistics=file, **options)
  paths = [f'decoder/layers_{layer}/{CROSS}' for layer in (0, 1)]
  for path in paths:
    assert_converted(got, before, path, moments[path], 'mean', 'similarity')
  weights_only = convert_params(before, **options)
  assert not all(
    np.array_equal(kernels_of(got, p)['query'], kernels_of(weights_only, p)['query'])
    for p in paths
  )


# Optimizer state.


def convert_state(method, grouping):
  state = tiny_state()
  tensors = {path: LazyTensor.of(array) for path, array in flatten(state)}
  plan = plan_conversion(tensors, num_kv_heads=2, method=method, grouping=grouping)
  got = {path: a for unit in plan.units for path, a in unit.compute().items()}
  return dict(flat(state)), got, plan.log


def assert_reset(got, log, module):
  for name in ALL_KERNELS:
    prefix = f'state/param_states/{module}/{name}/kernel'
    kernel = got[f'target/{module}/{name}/kernel']
    np.testing.assert_array_equal(got[f'{prefix}/v'], np.zeros(kernel.shape))
    for unused in ('m', 'v_row', 'v_col'):
      np.testing.assert_array_equal(got[f'{prefix}/{unused}'], UNUSED)
    assert log[f'{module}/{name}/kernel'].endswith('reset to zero')


@pytest.mark.parametrize('method', ABSORBING)
def test_moments_of_all_four_kernels_start_anew(method):
  before, got, log = convert_state(method, 'contiguous')
  assert len(log) == 2 * 2 * 4
  for layer in (0, 1):
    for attention in ('self_attention', CROSS):
      assert_reset(got, log, f'decoder/layers_{layer}/{attention}')
  path = 'state/param_states/decoder/layers_1/mlp/wo/kernel/v'
  np.testing.assert_array_equal(got[path], before[path])


def test_grouping_by_similarity_resets_what_it_reorders():
  before, got, log = convert_state('mean', 'similarity')
  assert len(log) == 2 * 4 + 2 * 2
  prefix = 'state/param_states/decoder/layers_1/self_attention'
  for name in ('key', 'value'):
    v_DNH = before[f'{prefix}/{name}/kernel/v'].reshape(D, N, H)
    summed = np.stack([v_DNH[:, 0] + v_DNH[:, 1], v_DNH[:, 2] + v_DNH[:, 3]], axis=1)
    np.testing.assert_allclose(
      got[f'{prefix}/{name}/kernel/v'], summed.reshape(D, 2 * H), rtol=1e-6
    )
  for name in ('query', 'out'):
    path = f'{prefix}/{name}/kernel/v'
    np.testing.assert_array_equal(got[path], before[path])
  assert_reset(got, log, f'decoder/layers_1/{CROSS}')


# Bad input.


def refused(**options):
  """The message of the error, one line."""
  with pytest.raises(BadInput) as error:
    convert_params(tiny_params(), num_kv_heads=2, **options)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_unknown_grouping_lists_the_known():
  assert refused(method='svd', grouping='random') == (
    "unknown grouping 'random'; choose one of contiguous, similarity"
  )


@pytest.mark.parametrize('method', ['mean', 'first', 'random'])
def test_statistics_for_a_method_that_uses_none(method):
  assert refused(method=method, statistics='moments.npz') == (
    f'statistics=moments.npz was given, but method={method} uses none; leave it out,'
    ' or choose one of procrustes, procrustes_rms, refit, svd'
  )


def test_statistics_that_are_not_there(tmp_path):
  path = tmp_path / 'moments.npz'
  assert refused(method='svd', statistics=path) == (
    f'there is no file of statistics at {path}; make one: python -m gqa_t5x.calibrate'
    ' --help'
  )


def test_statistics_that_lack_a_module(tmp_path):
  path = tmp_path / 'moments.npz'
  module = 'decoder/layers_1/self_attention'
  write_random_statistics(path, without=[module])
  assert refused(method='svd', statistics=path) == (
    f'{path} has no statistics of {module}; it has 4 modules of step 7 of here. Make'
    ' them anew from your checkpoint: python -m gqa_t5x.calibrate --help'
  )


def test_statistics_of_a_model_of_another_width(tmp_path):
  path = tmp_path / 'moments.npz'
  write_random_statistics(path, width=9)
  message = refused(method='svd', statistics=path)
  assert message.startswith(
    f'{path}: the statistics of decoder/layers_0/self_attention are of shape (9, 9)'
  )
  assert message.endswith('they are of another checkpoint')
  assert str(D) in message
