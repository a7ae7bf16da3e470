"""Conversion methods on one attention module, against plain NumPy oracles."""

import itertools

import numpy as np
import pytest
import scipy.linalg

from gqa_t5x.conversion import shared_heads
from gqa_t5x.conversion.input_statistics import InputStatistics
from gqa_t5x.conversion.methods import METHODS, convert_module
from helpers.module_oracle import (
  FEWER,
  HEADS,
  RNG,
  D,
  H,
  N,
  P,
  T,
  attention,
  best_approximation,
  group_problem,
  measured,
  module,
  random_kernels,
  related_kernels,
  relative_error,
  sample,
  scales,
)

DETERMINISTIC = [method for method in METHODS if method != 'random']
ABSORBING = ('procrustes', 'procrustes_rms', 'refit', 'svd')


# What must not change.


@pytest.mark.parametrize('calibrated', [False, True])
@pytest.mark.parametrize(('S', 'K'), HEADS)
def test_svd_is_exact_for_heads_that_share_a_subspace(S, K, calibrated):
  kernels = related_kernels(np.arange(S) * K // S, dtype=np.float32)
  x_TD, y_PD, inputs = sample()
  inputs = inputs if calibrated else scales()
  bias_NTP = RNG(3).normal(size=(N, T, P))
  expected = attention(kernels, x_TD, y_PD, bias_NTP)
  got = convert_module(kernels, module(S, K), 'svd', inputs)
  assert got['key'].shape == got['value'].shape == (D, K * H)
  np.testing.assert_allclose(
    attention(got, x_TD, y_PD, bias_NTP), expected, atol=1e-4, rtol=1e-4
  )
  mean = convert_module(kernels, module(S, K), 'mean')
  error = relative_error(attention(mean, x_TD, y_PD, bias_NTP), expected)
  assert error > 0.5 if K < S else error == 0


@pytest.mark.parametrize('grouping', ['contiguous', 'similarity'])
@pytest.mark.parametrize('method', DETERMINISTIC)
@pytest.mark.parametrize(('S', 'K'), HEADS)
def test_heads_equal_within_a_group_leave_the_output_unchanged(S, K, method, grouping):
  kernels = random_kernels(S, dtype=np.float32)
  for name in ('key', 'value'):
    heads_DKGH = kernels[name].reshape(D, K, -1, H)
    heads_DKGH[:] = heads_DKGH[:, :, :1].copy()
  x_TD, y_PD, inputs = sample()
  got = convert_module(kernels, module(S, K), method, inputs, grouping)
  np.testing.assert_allclose(
    attention(got, x_TD, y_PD), attention(kernels, x_TD, y_PD), atol=1e-4, rtol=1e-4
  )


# The predicted error, and the least one.


@pytest.mark.parametrize(('S', 'K'), HEADS)
def test_refit_loses_no_more_than_mean(S, K):
  kernels, (x_TD, y_PD, inputs) = random_kernels(S), sample()
  refit, mean = (
    measured(
      kernels, convert_module(kernels, module(S, K), method, inputs), K, x_TD, y_PD
    )
    for method in ('refit', 'mean')
  )
  for name in ('key', 'value'):
    assert (refit[name] <= mean[name] * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize(('S', 'K'), HEADS)
def test_svd_is_the_best_low_rank_approximation(S, K):
  """And the spectrum says what it loses."""
  kernels, (x_TD, y_PD, inputs) = random_kernels(S), sample()
  got = convert_module(kernels, module(S, K), 'svd', inputs)
  errors = measured(kernels, got, K, x_TD, y_PD)
  spectra = shared_heads.spectra(kernels, module(S, K), inputs)
  rows = {'key': y_PD - y_PD.mean(axis=0), 'value': y_PD}
  group = S // K
  for name, k in itertools.product(rows, range(K)):
    heads = range(k * group, (k + 1) * group)
    values, best = best_approximation(
      rows[name] / np.sqrt(P), *group_problem(kernels, heads, inputs, name)
    )
    np.testing.assert_allclose(spectra[name][k], values, rtol=1e-8, atol=1e-10)
    lost = spectra[name][k, H:].sum()
    np.testing.assert_allclose(errors[name][k], lost, rtol=1e-9, atol=1e-12)
    shared_DH = got[name][:, k * H : (k + 1) * H]
    for s, expected_PH in zip(heads, best, strict=True):
      for n in range(s * N // S, (s + 1) * N // S):
        columns = slice(n * H, (n + 1) * H)
        if name == 'key':
          new, old = got['query'][:, columns].T, kernels['query'][:, columns].T
        else:
          new, old = got['out'][columns], kernels['out'][columns]
        np.testing.assert_allclose(
          rows[name] / np.sqrt(P) @ shared_DH @ new, expected_PH @ old, atol=1e-9
        )


# By hand.


def two_heads(key, value, query, out):
  """Kernels of two heads, from rows of numbers."""
  named = {'query': query, 'key': key, 'value': value, 'out': out}
  return {name: np.array(rows, np.float64) for name, rows in named.items()}


EYE = [[1, 0], [0, 1]]


def test_svd_by_hand():
  # Two heads of size 1, D = 2, kernels of unit vectors.
  # Keys: S = [[6, 1], [1, 9/4]], M = (1, 4), so R = diag(1, 2) and
  # R S R = [[6, 2], [2, 9]]: eigenvalues 10 and 5, u = (1, 2) / sqrt(5).
  # F = R u / sqrt(10) = (1, 4) / sqrt(50), A = S F = (10, 10) / sqrt(50):
  # both heads see 0.2 k_1 + 0.8 k_2.
  # Values: S = [[6, 2], [2, 9]], M = (1, 1): F = (1, 2) / sqrt(50),
  # A = (10, 20) / sqrt(50): v_1 becomes 0.2 v_1 + 0.4 v_2, v_2 twice that.
  key, value = np.array([[6, 1], [1, 2.25]]), np.array([[6.0, 2], [2, 9]])
  inputs = InputStatistics(np.array([1.0, 4.0]), key, value)
  two = module(2, 1, head_dim=1)
  kernels = two_heads(EYE, EYE, EYE, EYE)
  got = convert_module(kernels, two, 'svd', inputs)
  np.testing.assert_allclose(got['query'][:, :1] @ got['key'].T, [[0.2, 0.8], [0, 0]])
  np.testing.assert_allclose(got['query'][:, 1:] @ got['key'].T, [[0, 0], [0.2, 0.8]])
  np.testing.assert_allclose(got['value'] @ got['out'][:1], [[0.2, 0], [0.4, 0]])
  np.testing.assert_allclose(got['value'] @ got['out'][1:], [[0, 0.4], [0, 0.8]])
  # Of the old kernels' RMS, sqrt(1 / 2); the sign is free.
  np.testing.assert_allclose(np.abs(got['key'][:, 0]), np.array([1, 4]) / 17**0.5)
  np.testing.assert_allclose(np.abs(got['value'][:, 0]), np.array([1, 2]) / 5**0.5)
  spectra = shared_heads.spectra(kernels, two, inputs)
  np.testing.assert_allclose(spectra['key'], [[10, 5]])
  np.testing.assert_allclose(spectra['value'], [[10, 5]])


@pytest.mark.parametrize('rank', [None, 1, 4, 9])
def test_what_svd_drops_is_the_rest_of_the_spectrum(rank):
  rng, G, H = np.random.default_rng(3), 3, 3
  x, *q = (rng.standard_normal((20, n)) for n in (G * H, H, H, H))
  S, M = x.T @ x, np.stack([one.T @ one for one in q])
  found = shared_heads.svd(S.reshape(G, H, G, H), M, rank)
  F = found.merge_GHR.reshape(G * H, -1)
  assert F.shape[1] == (rank or H)
  lost = 0.0
  for i in range(G):
    missed = np.eye(G * H)[:, i * H : (i + 1) * H] - F @ found.absorb_GHR[i].T
    lost += np.trace(M[i] @ missed.T @ S @ missed)
  root = scipy.linalg.sqrtm(scipy.linalg.block_diag(*M)).real
  spectrum = np.linalg.eigvalsh(root @ S @ root)[::-1]
  np.testing.assert_allclose(lost, spectrum[rank or H :].sum(), atol=1e-8)


def test_refit_by_hand():
  # The mean key is m = (k_1 + k_2) / 2. With S = [[6, 1], [1, 2]], E[k_1 m] = 3.5,
  # E[k_2 m] = 1.5, E[m m] = 2.5: k_1 becomes 1.4 m, k_2 becomes 0.6 m.
  S = np.array([[6.0, 1], [1, 2]])
  inputs = InputStatistics(np.ones(2), S, S)
  two = module(2, 1, head_dim=1)
  got = convert_module(two_heads(EYE, EYE, EYE, EYE), two, 'refit', inputs)
  np.testing.assert_allclose(
    got['query'] @ np.ones((2, 1)) @ got['key'].T, [[0.7, 0.7], [0.3, 0.3]]
  )
  np.testing.assert_allclose(
    got['value'] @ np.ones((1, 2)) @ got['out'], [[0.7, 0.3], [0.7, 0.3]]
  )
  np.testing.assert_allclose(got['key'], np.full((2, 1), 0.5**0.5))


def test_procrustes_by_hand():
  # The second head is the first, turned by a right angle: k_2 = k_1 [[0, 1], [-1, 0]].
  key = [[1, 2, -2, 1], [3, 4, -4, 3]]
  query = [[1, 0, 5, 6], [0, 1, 7, 8]]
  inputs = InputStatistics(np.ones(2), np.array([1.0, 2]), np.array([3.0, 1]))
  kernels = two_heads(key, key, query, np.transpose(query))
  two = module(2, 1, head_dim=2)
  got = convert_module(kernels, two, 'procrustes', inputs)
  np.testing.assert_allclose(got['key'], [[1, 2], [3, 4]])
  np.testing.assert_allclose(got['value'], [[1, 2], [3, 4]])
  expected = [[1, 0, 6, -5], [0, 1, 8, -7]]
  np.testing.assert_allclose(got['query'], expected, atol=1e-12)
  np.testing.assert_allclose(got['out'], np.transpose(expected), atol=1e-12)


@pytest.mark.parametrize(('S', 'K'), FEWER)
def test_no_head_gains_from_another_rotation_after_procrustes(S, K):
  kernels = related_kernels(np.arange(S) * K // S, noise=0.5)
  (_, y_PD, inputs), group = sample(), S // K
  got = convert_module(kernels, module(S, K), 'procrustes', inputs)
  turned = []
  for s in range(S):
    columns = slice(s * N // S * H, (s * N // S + 1) * H)  # of its first query head
    old, new = kernels['query'][:, columns], got['query'][:, columns]
    rotation = np.linalg.lstsq(old, new, rcond=None)[0]
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(H), atol=1e-9)
    key = kernels['key'][:, s * H : (s + 1) * H] @ rotation
    turned.append((y_PD - y_PD.mean(axis=0)) @ key)
  for k in range(K):
    heads = turned[k * group : (k + 1) * group]
    for head in heads:
      agreement = head.T @ (sum(heads) - head)
      # The trace is what this rotation reaches, the nuclear norm what any could.
      best = np.linalg.svd(agreement, compute_uv=False).sum()
      np.testing.assert_allclose(np.trace(agreement), best, rtol=1e-6)


def group_rms(kernel, K):
  """RMS of the heads of each group, [K]."""
  return np.sqrt(np.mean(kernel.reshape(D, K, -1) ** 2, axis=(0, 2)))


@pytest.mark.parametrize(('S', 'K'), FEWER)
def test_root_mean_square_of_the_shared_kernels(S, K):
  kernels, (_, _, inputs) = random_kernels(S), sample()
  got = {
    method: convert_module(kernels, module(S, K), method, inputs)
    for method in ABSORBING
  }
  for name in ('key', 'value'):
    old = group_rms(kernels[name], K)
    for method in ('svd', 'refit', 'procrustes_rms'):
      np.testing.assert_allclose(group_rms(got[method][name], K), old, rtol=1e-12)
    shrunk = group_rms(got['procrustes'][name], K)
    assert (shrunk < 0.95 * old).all()
    scaled = got['procrustes'][name].reshape(D, K, H) * (old / shrunk)[:, None]
    np.testing.assert_allclose(
      got['procrustes_rms'][name], scaled.reshape(D, -1), rtol=1e-12
    )
  for name in ('query', 'out'):
    np.testing.assert_array_equal(got['procrustes_rms'][name], got['procrustes'][name])


@pytest.mark.parametrize('G', [1, 2, 4])
def test_svd_gives_both_sides_the_same_strength(G):
  """Along each direction of the shared head, and in none between two of them."""
  rng = RNG(G)
  keys = rng.standard_normal((40, G * H)) @ rng.standard_normal((G * H, G * H))
  queries = rng.standard_normal((G, 30, H)) * rng.uniform(0.1, 3, (G, 1, H))
  S_GHGH = (keys.T @ keys).reshape(G, H, G, H)
  M_GHH = np.stack([q.T @ q for q in queries])
  got = shared_heads.svd(S_GHGH, M_GHH)
  shared = keys @ np.concatenate(list(got.merge_GHR))
  absorbed = np.concatenate([queries[g] @ got.absorb_GHR[g] for g in range(G)])
  strength = shared.T @ shared
  np.testing.assert_allclose(absorbed.T @ absorbed, strength, atol=1e-9)
  np.testing.assert_allclose(strength, np.diag(np.diag(strength)), atol=1e-9)
  # Their product is what a logit's square sums up to.
  top = shared_heads._spectrum(S_GHGH, M_GHH)[0][:H]
  np.testing.assert_allclose(np.diag(strength) ** 2, top, rtol=1e-9)
