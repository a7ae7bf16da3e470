"""Adafactor's moments after the conversion, by hand and by the shapes of XXL."""

import numpy as np
import pytest

from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.conversion import adafactor_moments
from gqa_t5x.conversion.kernels import ALL_KERNELS, AttentionModule
from gqa_t5x.conversion.plan import Recipe, plan_conversion
from gqa_t5x.errors import BadInput
from helpers.trees import UNUSED, D, H, N, flat, tiny_state


def convert(moments, shape, new, rule, head_dim=64):
  moments = {n: np.asarray(moments.get(n, UNUSED)) for n in adafactor_moments.NAMES}
  before, after = shape[1] // head_dim, new[1] // head_dim
  module = AttentionModule('decoder/x', before, after, head_dim)
  return adafactor_moments.convert_moments(moments, module, shape, new, rule)


V = np.array([[1, 2, 3, 4, 5, 6, 7, 8], [2, 4, 6, 8, 1, 3, 5, 7]], np.float32)


ZEROS = [[0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
  ('rule', 'v', 'm'),
  [
    ('sum', [[4, 6, 12, 14], [8, 12, 6, 10]], [[2, 3, 6, 7], [4, 6, 3, 5]]),
    ('first', [[1, 2, 5, 6], [2, 4, 1, 3]], [[1, 2, 5, 6], [2, 4, 1, 3]]),
    ('reset', ZEROS, ZEROS),
  ],
)
def test_unfactored_by_hand(rule, v, m):
  """Four heads of size two become two; momentum is averaged where v is summed."""
  got = convert({'v': V, 'm': V}, (2, 8), (2, 4), rule, head_dim=2)
  for name, expected in {'v': v, 'm': m, 'v_row': UNUSED, 'v_col': UNUSED}.items():
    np.testing.assert_array_equal(got[name], np.float32(expected))
    assert got[name].dtype == np.float32
  without = convert({'v': V}, (2, 8), (2, 4), rule, head_dim=2)
  np.testing.assert_array_equal(without['m'], UNUSED)


def factored(v_DC):
  """The vectors that Adafactor would keep of a matrix: means over rows and columns."""
  smaller, larger = np.argsort(v_DC.shape)  # as T5X; of ties the first is smaller
  return {'v_row': v_DC.mean(axis=larger), 'v_col': v_DC.mean(axis=smaller)}


def rank_one(shape):
  """A matrix of which the two vectors say everything."""
  rng = np.random.default_rng(0)
  return np.outer(rng.random(shape[0]) + 0.5, rng.random(shape[1]) + 0.5)


@pytest.mark.parametrize('rule', ['sum', 'first'])
@pytest.mark.parametrize(
  ('shape', 'new'),
  [
    ((256, 256), (256, 128)),  # v_row and v_col swap, like XXL's
    ((512, 384), (512, 192)),  # they do not
    ((192, 384), (192, 128)),  # they swap
    ((512, 384), (512, 64)),  # T5.1.1-small to MQA: unfactored
  ],
)
def test_factored_equals_the_same_done_to_the_full_matrix(shape, new, rule):
  v_DC = rank_one(shape)
  split_DKGH = v_DC.reshape(shape[0], new[1] // 64, -1, 64)
  new_DC = split_DKGH.sum(axis=2) if rule == 'sum' else split_DKGH[:, :, 0]
  new_DC = new_DC.reshape(new)
  expected = {'v': new_DC} if min(new) < 128 else factored(new_DC)
  got = convert(factored(v_DC), shape, new, rule)
  for name in adafactor_moments.NAMES:
    np.testing.assert_allclose(got[name], expected.get(name, UNUSED), rtol=1e-6)


def test_xxl_64_to_8_heads_swaps_row_and_column():
  along_d = np.arange(1, 4097, dtype=np.float32)
  along_heads = np.repeat(np.arange(1, 65, dtype=np.float32), 64)
  along_heads *= along_d.mean() / along_heads.mean()  # of one matrix: same mean
  got = convert(
    {'v_row': along_d, 'v_col': along_heads}, (4096, 4096), (4096, 512), 'sum'
  )
  np.testing.assert_allclose(got['v_col'], along_d * 8, rtol=1e-6)
  # Heads 1..8 sum to 36, 9..16 to 100, ...
  sums = np.repeat(np.arange(8) * 64 + 36, 64) * (2048.5 / 32.5)
  np.testing.assert_allclose(got['v_row'], sums, rtol=1e-6)
  assert got['v_row'].dtype == got['v_col'].dtype == np.float32
  np.testing.assert_array_equal(got['v'], UNUSED)


@pytest.mark.parametrize('rule', ['sum', 'reset'])
@pytest.mark.parametrize(
  ('new', 'used'),
  [((256, 128), {'v_row': (128,), 'v_col': (256,)}), ((256, 64), {'v': (256, 64)})],
)
def test_moments_that_never_saw_a_step_stay_zero_and_reset_ones_become_so(
  new, used, rule
):
  v_DC = rank_one((256, 256)) if rule == 'reset' else np.zeros((256, 256))
  got = convert(factored(v_DC), (256, 256), new, rule)
  for name, array in got.items():
    np.testing.assert_array_equal(array, np.zeros(used.get(name, (1,))))


def test_unfactored_stays_so_where_adafactor_does_not_factor():
  got = convert({'v': rank_one((256, 256))}, (256, 256), (256, 128), 'sum')
  assert got['v'].shape == (256, 128)
  assert got['v_row'].shape == (1,)


class TestWholeState:
  kernel = 'decoder/layers_1/self_attention/key/kernel'
  key = f'state/param_states/{kernel}'

  def plan(self, tree, method='mean', **options):
    tensors = {path: LazyTensor.of(array) for path, array in flat(tree)}
    return plan_conversion(tensors, Recipe(num_kv_heads=2, method=method, **options))

  def converted(self, method='mean', **options):
    """Arrays before and after; sizes were known before anything was computed."""
    plan, got = self.plan(tiny_state(), method, **options), {}
    for unit in plan.units:
      arrays = unit.compute()
      for path, array in arrays.items():
        assert (array.shape, array.dtype) == (
          unit.outputs[path].shape,
          unit.outputs[path].dtype,
        )
      got |= arrays
    before = dict(flat(tiny_state()))
    assert set(got) == set(before)
    return before, got, plan.log

  def assert_summed(self, before, got):
    v_DNH = before[f'{self.key}/v'].reshape(D, N, H)
    expected = np.stack([v_DNH[:, 0] + v_DNH[:, 1], v_DNH[:, 2] + v_DNH[:, 3]], 1)
    np.testing.assert_allclose(
      got[f'{self.key}/v'], expected.reshape(D, 2 * H), rtol=1e-6
    )

  def assert_reset(self, got, log, module):
    for name in ALL_KERNELS:
      prefix = f'state/param_states/{module}/{name}/kernel'
      kernel = got[f'target/{module}/{name}/kernel']
      np.testing.assert_array_equal(got[f'{prefix}/v'], np.zeros(kernel.shape))
      for unused in ('m', 'v_row', 'v_col'):
        np.testing.assert_array_equal(got[f'{prefix}/{unused}'], UNUSED)
      assert log[f'{module}/{name}/kernel'].endswith('reset to zero')

  def test_moments_follow_their_kernels_and_others_are_copied(self):
    before, got, _ = self.converted()
    changed = {p for p in got if got[p].shape != before[p].shape}
    # Two layers, two attentions, two kernels, each with its v.
    assert len(changed) == 16
    for path in set(got) - changed:
      np.testing.assert_array_equal(got[path], before[path])
    self.assert_summed(before, got)

  def test_svd_resets_all_four_kernels(self):
    before, got, log = self.converted('svd')
    assert len(log) == 2 * 2 * 4
    for layer in (0, 1):
      for attention in ('self_attention', 'encoder_decoder_attention'):
        self.assert_reset(got, log, f'decoder/layers_{layer}/{attention}')
    path = 'state/param_states/decoder/layers_1/mlp/wo/kernel/v'
    np.testing.assert_array_equal(got[path], before[path])

  def test_grouping_by_similarity_resets_what_it_reorders(self):
    before, got, log = self.converted('mean', grouping='similarity')
    assert len(log) == 2 * 4 + 2 * 2
    self.assert_summed(before, got)
    for name in ('query', 'out'):
      path = f'{self.key.replace("key", name)}/v'
      np.testing.assert_array_equal(got[path], before[path])
    self.assert_reset(got, log, 'decoder/layers_1/encoder_decoder_attention')

  @pytest.mark.parametrize(
    ('method', 'phrase', 'count'),
    [
      ('mean', 'summed over each group', 8),
      ('first', "of each group's first head", 8),
      ('random', 'reset to zero', 8),
      ('procrustes', 'reset to zero', 16),
      ('refit', 'reset to zero', 16),
    ],
  )
  def test_log_says_what_was_done(self, method, phrase, count):
    log = self.plan(tiny_state(), method).log
    assert len(log) == count
    assert log[self.kernel] == f'v (6, 8) -> v (6, 4), {phrase}'

  def test_every_fault_is_listed(self):
    tree = tiny_state()
    states = tree['state']['param_states']
    del states['decoder']['decoder_norm']
    states['other'] = {'v': UNUSED}
    kernel = states['decoder']['layers_1']['self_attention']['key']['kernel']
    kernel['v'] = kernel['v'][:, :4]
    states['encoder']['encoder_norm']['scale'] = {'mu': UNUSED}
    with pytest.raises(BadInput) as error:
      self.plan(tree)
    assert str(error.value) == (
      "the optimizer state is not that of T5X's Adafactor:"
      ' decoder/decoder_norm/scale is missing; other is extra;'
      ' decoder/layers_1/self_attention/key/kernel has v (6, 4), expected v (6, 8) for'
      " a kernel of shape (6, 8); encoder/encoder_norm/scale has ['mu'], expected"
      " Adafactor's ['m', 'v', 'v_col', 'v_row']"
    )
