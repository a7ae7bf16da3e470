"""Which heads are grouped, and kernels with little in them: zeros, few digits."""

import ml_dtypes
import numpy as np
import pytest

from gqa_t5x.conversion.grouping import similar_heads
from gqa_t5x.conversion.input_statistics import InputStatistics
from gqa_t5x.conversion.methods import METHODS, convert_module
from helpers.module_oracle import (
  FEWER,
  RNG,
  D,
  H,
  N,
  attention,
  best_approximation,
  group_problem,
  module,
  random_kernels,
  related_kernels,
  relative_error,
  sample,
  scales,
)

# The cluster of each head, scattered over the positions.
CLUSTERS = [
  [0, 1, 0, 1, 0, 1, 0, 1],
  [0, 1, 1, 0, 1, 0, 0, 1],
  [3, 1, 0, 2, 0, 3, 2, 1],
  [0, 1, 2, 3, 0, 1, 2, 3],
  [1, 0, 0, 1],
]


def as_sets(order, K):
  return {frozenset(group) for group in np.reshape(order, (K, -1)).tolist()}


def planted_sets(clusters):
  return as_sets(np.argsort(clusters, kind='stable'), len(set(clusters)))


@pytest.mark.parametrize('calibrated', [False, True])
@pytest.mark.parametrize('noise', [0.0, 0.2])
@pytest.mark.parametrize('clusters', CLUSTERS)
def test_planted_clusters_are_found(clusters, noise, calibrated):
  S, K = len(clusters), len(set(clusters))
  x_TD, y_PD, inputs = sample()
  for seed in range(3):
    kernels = related_kernels(clusters, seed, noise)
    moments = inputs if calibrated else scales(seed)
    order = similar_heads(kernels, moments, K, H)
    assert sorted(order) == list(range(S))
    assert as_sets(order, K) == planted_sets(clusters)

    got = convert_module(kernels, module(S, K), 'svd', moments, 'similarity')
    apart = convert_module(kernels, module(S, K), 'svd', moments)
    expected = attention(kernels, x_TD, y_PD)
    error = relative_error(attention(got, x_TD, y_PD), expected)
    assert error < relative_error(attention(apart, x_TD, y_PD), expected) / 2
    if not noise:
      assert error < 1e-6


@pytest.mark.parametrize('K', [2, 4])
def test_the_basis_of_a_head_plays_no_role(K):
  rng, (_, _, inputs) = RNG(7), sample()
  for seed in range(4):
    kernels = random_kernels(seed=seed)
    turned = {name: kernel.copy() for name, kernel in kernels.items()}
    for n in range(N):
      columns = slice(n * H, (n + 1) * H)
      key, value = rng.normal(size=(2, H, H))
      turned['key'][:, columns] @= key
      turned['query'][:, columns] @= np.linalg.inv(key).T
      turned['value'][:, columns] @= value
      turned['out'][columns] = np.linalg.inv(value) @ turned['out'][columns]
    order = similar_heads(kernels, inputs, K, H)
    np.testing.assert_array_equal(similar_heads(turned, inputs, K, H), order)


def test_four_heads_in_two_groups_are_split_in_the_best_of_the_three_ways():
  for seed in range(12):
    kernels, (_, y_PD, inputs) = random_kernels(4, seed), sample(seed)
    rows = {'key': y_PD - y_PD.mean(axis=0), 'value': y_PD}
    losses = {}
    for partner in (1, 2, 3):
      others = [head for head in (1, 2, 3) if head != partner]
      loss = 0
      for name, x_PD in rows.items():
        both = [[0, partner], others]
        spectra = [
          best_approximation(x_PD, *group_problem(kernels, heads, inputs, name))[0]
          for heads in both
        ]
        loss += sum(s[H:].sum() for s in spectra) / sum(s.sum() for s in spectra)
      losses[frozenset(as_sets([0, partner, *others], 2))] = loss
    order = similar_heads(kernels, inputs, 2, H)
    assert as_sets(order, 2) == min(losses, key=losses.get)


# Little to go by: few digits, zeros, inputs of few dimensions.


def zero_head(kernels, name, heads):
  kernel = kernels[name] if name != 'out' else kernels[name].T
  kernel[:, [h * H + i for h in heads for i in range(H)]] = 0


@pytest.mark.parametrize('grouping', ['contiguous', 'similarity'])
@pytest.mark.parametrize('method', [m for m in METHODS if m != 'random'])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
  'zeros',
  [
    {},
    {'key': [2], 'value': [5]},
    {'query': [0], 'out': [7]},
    {'key': range(N)},
    {'value': range(N), 'query': range(N)},
    dict.fromkeys(('query', 'key', 'value', 'out'), range(N)),
  ],
)
@pytest.mark.filterwarnings('error')
def test_zeros_and_bfloat16_stay_finite(zeros, dtype, method, grouping):
  kernels = random_kernels(dtype=dtype)
  for name, heads in zeros.items():
    zero_head(kernels, name, heads)
  _, _, inputs = sample()
  with np.errstate(divide='raise', invalid='raise', over='raise'):
    got = convert_module(kernels, module(N, 2), method, inputs, grouping)
  for name, kernel in got.items():
    assert kernel.dtype == dtype
    assert np.isfinite(kernel.astype(np.float32)).all()
    if zeros.get(name) == range(N):
      assert not kernel.any()
  assert got['query'].shape == got['out'].T.shape == (D, N * H)
  assert got['key'].shape == got['value'].shape == (D, 2 * H)


@pytest.mark.parametrize('method', ['svd', 'refit'])
@pytest.mark.parametrize('K', [1, 2, 4])
def test_a_head_without_keys_or_values_stays_so(K, method):
  kernels, (x_TD, _, inputs) = random_kernels(), sample()
  zero_head(kernels, 'key', [0])
  zero_head(kernels, 'value', [0])
  got = convert_module(kernels, module(N, K), method, inputs)
  np.testing.assert_allclose(x_TD @ got['query'][:, :H], 0, atol=1e-12)
  np.testing.assert_allclose(got['out'][:H], 0, atol=1e-12)


@pytest.mark.parametrize('grouping', ['contiguous', 'similarity'])
@pytest.mark.parametrize('rank', [0, 1, 3, H])
@pytest.mark.parametrize(('S', 'K'), FEWER)
@pytest.mark.filterwarnings('error')
def test_inputs_of_no_more_dimensions_than_a_head_lose_nothing(S, K, rank, grouping):
  kernels, (x_TD, y_PD, _) = random_kernels(S), sample()
  basis = RNG(8).normal(size=(D, rank))
  x_TD, y_PD = x_TD @ basis @ basis.T, y_PD @ basis @ basis.T
  second = x_TD.T @ x_TD / len(x_TD), y_PD.T @ y_PD / len(y_PD)
  with np.errstate(divide='raise', invalid='raise', over='raise'):
    got = convert_module(
      kernels,
      module(S, K),
      'svd',
      InputStatistics(second[0], second[1], second[1]),
      grouping,
    )
  np.testing.assert_allclose(
    attention(got, x_TD, y_PD), attention(kernels, x_TD, y_PD), atol=1e-6
  )


@pytest.mark.parametrize('K', [1, 2, 4])
def test_bfloat16_costs_no_more_than_its_rounding(K):
  kernels, (_, _, inputs) = random_kernels(dtype=ml_dtypes.bfloat16), sample()
  exact = {name: kernel.astype(np.float64) for name, kernel in kernels.items()}
  exact = convert_module(exact, module(N, K), 'svd', inputs)
  for name, kernel in convert_module(kernels, module(N, K), 'svd', inputs).items():
    np.testing.assert_array_equal(kernel, exact[name].astype(ml_dtypes.bfloat16))
