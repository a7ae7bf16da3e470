"""The maths of the conversion, against tensors written out by hand."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from gqa_t5x.checkpoints.tree import Architecture
from gqa_t5x.conversion.kernels import AttentionModule
from gqa_t5x.conversion.methods import convert_module
from gqa_t5x.conversion.plan import (
  Recipe,
  _choose_num_kv_heads,
  convert_params,
)
from gqa_t5x.errors import BadInput
from helpers.trees import D, H, N, flat, tiny_params

# Two rows (D = 2), four heads of size two: row 0 counts, row 1 does not.
KEY = np.float32([[1, 2, 3, 4, 5, 6, 7, 8], [10, -10, 0, 4, 8, 1, -2, 3]])
VALUE = np.float32([[2, 0, 0, 2, 4, 4, 8, 8], [1, 1, 3, 5, -1, -1, -1, -3]])


def module(num_kv_heads):
  return AttentionModule('decoder/layers_0/self_attention', 4, num_kv_heads, 2)


def kernels(key=KEY, value=VALUE):
  query = np.arange(16, dtype=np.float32).reshape(2, 8)
  return {'query': query, 'key': key, 'value': value, 'out': query.T + 1}


@pytest.mark.parametrize(
  ('method', 'num_kv_heads', 'key', 'value'),
  [
    ('mean', 2, [[2, 3, 6, 7], [5, -3, 3, 2]], [[1, 1, 6, 6], [2, 3, -1, -2]]),
    ('mean', 1, [[4, 5], [4, -0.5]], [[3.5, 3.5], [0.5, 0.5]]),
    ('mean', 4, KEY, VALUE),
    ('first', 2, [[1, 2, 5, 6], [10, -10, 8, 1]], [[2, 0, 4, 4], [1, 1, -1, -1]]),
    ('first', 1, [[1, 2], [10, -10]], [[2, 0], [1, 1]]),
    ('first', 4, KEY, VALUE),
  ],
)
def test_by_hand(method, num_kv_heads, key, value):
  before = kernels()
  got = convert_module(before, module(num_kv_heads), method)
  np.testing.assert_array_equal(got['key'], np.array(key, np.float32))
  np.testing.assert_array_equal(got['value'], np.array(value, np.float32))
  assert got['key'].dtype == got['value'].dtype == np.float32
  assert got['query'] is before['query']
  assert got['out'] is before['out']


def mean_of(kernels, source_heads, num_kv_heads):
  heads = AttentionModule('decoder/x', source_heads, num_kv_heads, head_dim=4)
  return convert_module(kernels, heads, 'mean')


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('steps', [(64, 16, 8), (64, 32, 16, 8, 4, 2, 1), (64, 8, 1)])
def test_mean_in_steps_is_the_mean_at_once(steps, dtype):
  """Bit for bit, although the means between are rounded to be saved."""
  rng = np.random.default_rng(0)
  values = rng.standard_normal((2, 6, 64 * 4)).astype(dtype)
  kernels = dict(zip(('key', 'value'), values, strict=True))
  stepped = kernels
  for before, after in itertools.pairwise(steps):
    stepped = mean_of(stepped, before, after)
  at_once = mean_of(kernels, 64, steps[-1])
  for name, kernel in kernels.items():
    assert stepped[name].dtype == at_once[name].dtype == dtype
    np.testing.assert_array_equal(stepped[name], at_once[name])
    # It is the mean: six roundings to at most half a unit in the last place each.
    exact = kernel.astype(np.float64).reshape(6, steps[-1], -1, 4).mean(axis=2)
    error = np.abs(at_once[name].astype(np.float64) - exact.reshape(6, -1)).max()
    assert error <= 6 * float(ml_dtypes.finfo(dtype).eps)


def test_random_has_the_standard_deviation_of_t5():
  wide = np.zeros((400, 8), np.float32)
  got = convert_module(kernels(wide, wide), module(2), 'random')
  assert got['key'].shape == (400, 4)
  assert got['key'].dtype == np.float32
  # 1 / sqrt(400) = 0.05; 1,600 draws: three standard errors are 0.0027.
  assert abs(got['key'].std() - 0.05) < 0.0027
  assert abs(got['key'].mean()) < 0.004
  assert abs(np.corrcoef(got['key'].ravel(), got['value'].ravel())[0, 1]) < 0.1


class TestWholeModel:
  @pytest.mark.parametrize(
    ('flags', 'expected'),
    [
      ({'num_kv_heads': 2}, (4, 2, 2)),
      ({'num_kv_heads': 2, 'self_attention_num_kv_heads': 1}, (4, 1, 2)),
      ({'num_kv_heads': 2, 'cross_attention_num_kv_heads': 4}, (4, 2, 4)),
      ({'num_kv_heads': None, 'cross_attention_num_kv_heads': 1}, (4, 4, 1)),
      ({'num_kv_heads': 1, 'encoder_num_kv_heads': 1}, (1, 1, 1)),
      ({'num_kv_heads': None}, (4, 4, 4)),
    ],
  )
  def test_each_kind_of_attention_is_set_alone(self, flags, expected):
    got = dict(flat(convert_params(tiny_params(), method='first', **flags)))
    modules = (
      'encoder/layers_0/attention',
      'decoder/layers_1/self_attention',
      'decoder/layers_1/encoder_decoder_attention',
    )
    for path, heads in zip(modules, expected, strict=True):
      assert got[f'{path}/key/kernel'].shape == (D, heads * H)
      assert got[f'{path}/value/kernel'].shape == (D, heads * H)
      assert got[f'{path}/query/kernel'].shape == (D, N * H)

  def test_random_differs_by_layer_and_seed_but_not_with_what_else_changes(self):
    alone = {'num_kv_heads': None, 'self_attention_num_kv_heads': 2}
    one = dict(flat(convert_params(tiny_params(), method='random', **alone)))
    other = convert_params(tiny_params(), method='random', seed=1, **alone)
    all_ = convert_params(tiny_params(), method='random', num_kv_heads=2)
    path = 'decoder/layers_0/self_attention/key/kernel'
    np.testing.assert_array_equal(one[path], dict(flat(all_))[path])
    assert not np.allclose(one[path], one[path.replace('layers_0', 'layers_1')])
    assert not np.allclose(one[path], dict(flat(other))[path])

  def test_jax_arrays_and_frozen_dicts(self):
    import flax
    import jax

    params = tiny_params()
    frozen = flax.core.freeze(jax.tree.map(jax.numpy.asarray, params))
    got = dict(flat(convert_params(frozen, num_kv_heads=1, method='mean')))
    expected = dict(flat(convert_params(params, num_kv_heads=1, method='mean')))
    for path, value in expected.items():
      np.testing.assert_array_equal(got[path], value)


@pytest.mark.parametrize(
  ('source', 'flags', 'message'),
  [
    (
      4,
      {'num_kv_heads': 0, 'encoder_num_kv_heads': 8},
      'num_heads=4 is not divisible by encoder_num_kv_heads=8; choose one of 1, 2, 4',
    ),
    (
      2,
      {'num_kv_heads': 4},
      "num_kv_heads=4 is more than the checkpoint's 2 key/value heads; choose one of"
      ' 1, 2',
    ),
  ],
)
def test_heads_that_do_not_divide(source, flags, message):
  with pytest.raises(BadInput) as error:
    convert_params(tiny_params(source), method='mean', **flags)
  assert str(error.value) == message


def test_key_value_heads_that_do_not_divide_although_the_query_heads_do():
  heads = {'encoder': 12, 'self_attention': 4, 'cross_attention': 4}
  source = Architecture(9, 9, 9, 12, 9, 32, {'encoder': 1, 'decoder': 1}, heads)
  with pytest.raises(BadInput) as error:
    _choose_num_kv_heads(source, Recipe(num_kv_heads=3))
  assert str(error.value) == (
    "the checkpoint's 4 key/value heads are not divisible by num_kv_heads=3;"
    ' choose one of 1, 2, 4'
  )


def test_bfloat16_kept_as_integers_is_refused():
  params = tiny_params()
  norm = params['encoder']['encoder_norm']
  norm['scale'] = norm['scale'].astype(np.uint16)
  with pytest.raises(BadInput) as error:
    convert_params(params, num_kv_heads=2, method='mean')
  assert str(error.value) == (
    'parameters must be floating point: target/encoder/encoder_norm/scale is uint16'
  )
