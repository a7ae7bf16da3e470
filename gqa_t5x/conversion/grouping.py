"""Which heads share: those that are alike, whatever basis each of them is written in.

The heads of a module may be reordered freely where no position bias tells them apart:
in cross-attention, and where the module has a bias of its own, whose rows go along
(umT5). In T5's self-attention one bias table serves all layers of a stack, so an order
of its own for each layer would change the model; there, groups stay contiguous.

Letters: J heads of the module, K groups, G = J / K heads of a group, H head size.
"""

import itertools

import numpy as np

from gqa_t5x.conversion import shared_heads
from gqa_t5x.conversion.input_statistics import InputStatistics
from gqa_t5x.conversion.kernels import Kernels

# Swaps whose residual is computed in one pass, best affinity first: each takes four
# eigenproblems. With 16 heads of size 8, more of them hardly lowered the residual.
_SWAPS = 16
_PASSES = 4
# Of affinities. The rest is rounding, which would choose among equals: two swaps of
# pairs, for one, that come to the same groups.
_DIGITS = 9


def similar_heads(
  kernels: Kernels, inputs: InputStatistics, num_groups: int, head_dim: int
) -> np.ndarray:
  """Orders the heads so that contiguous groups hold heads that share well.

  Balanced groups by affinity, greedily; then swaps between groups, as long as one
  lowers the residual of `svd`: the dropped share of both spectra.

  Returns:
    Order [J] of the key/value heads, group after group: rising within each, and the
    groups by their first head.
  """
  sides = [
    _Side(*shared_heads.key_moments(kernels, inputs, head_dim)),
    _Side(*shared_heads.value_moments(kernels, inputs, head_dim)),
  ]
  affinity_JJ = sum(side.affinity() for side in sides).round(_DIGITS)
  groups = _greedy_groups(affinity_JJ, num_groups)
  if num_groups not in (1, len(affinity_JJ)):
    _swap(groups, affinity_JJ, sides)
  return np.concatenate(sorted(sorted(group) for group in groups))


class _Side:
  """Keys or values of all heads, weighted as the residual weights them."""

  def __init__(self, S_JHJH: np.ndarray, M_JHH: np.ndarray):
    self._weighted_JHJH = shared_heads.weigh(S_JHJH, M_JHH)
    self._total = np.einsum('jhjh->', self._weighted_JHJH)

  def affinity(self) -> np.ndarray:
    """Squared cross moments of each pair, 1 for a head with itself, [J, J]."""
    squared_JJ = np.einsum('ihjk,ihjk->ij', self._weighted_JHJH, self._weighted_JHJH)
    scale_J = np.sqrt(np.maximum(np.diag(squared_JJ), np.finfo(float).tiny))
    return squared_JJ / np.outer(scale_J, scale_J)

  def dropped(self, heads: list[int]) -> float:
    """The part of the total that is lost if these heads share one."""
    H = self._weighted_JHJH.shape[1]
    block = self._weighted_JHJH[heads][:, :, heads].reshape(len(heads) * H, -1)
    lost = np.linalg.eigvalsh(block)[:-H].sum()
    return float(lost / self._total) if self._total > 0 else 0.0


def _greedy_groups(affinity_JJ: np.ndarray, num_groups: int) -> list[list[int]]:
  """Groups of equal size; each starts from the head that fits the others best."""
  left = list(range(len(affinity_JJ)))
  size, groups = len(left) // num_groups, []
  for _ in range(num_groups):
    # The sum over the best partners that the head could have.
    group = [max(left, key=lambda j: np.sort(affinity_JJ[j, left])[-size:].sum())]
    left.remove(group[0])
    while len(group) < size:
      group.append(max(left, key=lambda j: affinity_JJ[j, group].sum()))
      left.remove(group[-1])
    groups.append(group)
  return groups


def _swap(groups: list[list[int]], affinity_JJ: np.ndarray, sides: list[_Side]) -> None:
  """Swaps heads between groups, in place, while that lowers the residual."""

  def lost(group):
    return sum(side.dropped(group) for side in sides)

  losses = [lost(group) for group in groups]
  for _ in range(_PASSES):
    improved = False
    for a, b, i, j in _promising_swaps(groups, affinity_JJ):
      if i not in groups[a] or j not in groups[b]:
        continue  # An earlier swap of this pass has moved it.
      first = [j if head == i else head for head in groups[a]]
      second = [i if head == j else head for head in groups[b]]
      after = lost(first), lost(second)
      if sum(after) < losses[a] + losses[b] - 1e-12:
        groups[a], groups[b] = first, second
        losses[a], losses[b] = after
        improved = True
    if not improved:
      return


def _promising_swaps(
  groups: list[list[int]], affinity_JJ: np.ndarray
) -> list[tuple[int, int, int, int]]:
  """(group, group, head, head) by falling gain of affinity, the best few."""
  fit = {
    (head, a): affinity_JJ[head, [h for h in group if h != head]].sum()
    for a, group in enumerate(groups)
    for head in range(len(affinity_JJ))
  }

  def gain(swap):
    a, b, i, j = swap
    gained = fit[i, b] + fit[j, a] - fit[i, a] - fit[j, b]
    return round(gained - 2 * affinity_JJ[i, j], _DIGITS), swap

  swaps = [
    (a, b, i, j)
    for a, b in itertools.combinations(range(len(groups)), 2)
    for i in groups[a]
    for j in groups[b]
  ]
  return sorted(swaps, key=gain, reverse=True)[:_SWAPS]
