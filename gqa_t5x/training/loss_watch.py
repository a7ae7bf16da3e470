"""Finds spikes and divergence of the loss while a model trains.

MQA trained from scratch has both (GQA, appendix A). The rule looks at the mean loss of
each period of T5X's statistics, in nats per target token:

  spike       The loss is above the median of the last WINDOW periods by more than
              RISE, and by more than SIGMAS times the noise. Periods in a row are one
              spike, and it has the step of the first.
  divergence  The loss is not finite; or for PATIENCE periods in a row it is more than
              CLIMB above the lowest median that the run has reached. It has the step
              of the first period that is not finite, or of the last of the climb.

The noise is the standard deviation of a period's mean, taken from the differences of
neighbours, so that a slope of the curve does not count as noise. Spikes hardly move the
medians, of losses and of differences. In the first LEAST periods, only losses that are
not finite count. A run that is started again begins with no history.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping
from typing import Any

WINDOW = 50  # Periods; of 100 steps each, longer than most spikes.
LEAST = 10  # Fewer periods say little about the noise.
# Means of many tokens are nearly normal: one in 1e9 is beyond 6 sigma, and a run of 1M
# steps has 1e4. With an estimate a third too low, one run in three has a false alarm.
SIGMAS = 6.0
# Nats. A converged run has noise of about 0.01 and less: six times that is no event.
RISE = 0.1
# Nats; a perplexity 1.6 times as high. A run that collapses goes back to the frequency
# of single tokens, several nats above.
CLIMB = 0.5
PATIENCE = 20  # Periods; spikes are over sooner.
_SIGMA_OF_MEDIAN = 1.4826  # Standard deviation by median deviation, for normal noise.
# Kind of event -> name in TensorBoard's `train` of their number since the start.
SCALARS = {'spike': 'stability/spikes', 'divergence': 'stability/divergences'}


@dataclasses.dataclass(frozen=True)
class Event:
  """A 'spike' or a 'divergence', in the period that ends at `step`.

  Loss and median, with which it is compared, are in nats per target token. The median
  is None before there is one.
  """

  kind: str
  step: int
  loss: float
  median: float | None


class Watch:
  """What one run has seen so far."""

  def __init__(self):
    self._losses: list[float] = []  # the last finite ones
    self._lowest: float | None = None  # median
    self._in_spike = False
    self._is_finite = True
    self._high = 0  # periods in a row

  def add(self, step: int, loss: float) -> list[Event]:
    """Returns what the next period shows: at most one event of each kind.

    `step` is the period's last, `loss` its mean in nats per target token.
    """
    was_finite, self._is_finite = self._is_finite, math.isfinite(loss)
    if not self._is_finite:
      return [Event('divergence', step, loss, self._lowest)] if was_finite else []
    found = []
    if len(self._losses) >= LEAST:
      median = statistics.median(self._losses)
      was_in_spike = self._in_spike
      self._in_spike = loss > median + max(RISE, SIGMAS * _noise(self._losses))
      if self._in_spike and not was_in_spike:
        found.append(Event('spike', step, loss, median))
      self._lowest = median if self._lowest is None else min(self._lowest, median)
      self._high = self._high + 1 if loss > self._lowest + CLIMB else 0
      if self._high == PATIENCE:
        found.append(Event('divergence', step, loss, self._lowest))
    self._losses = [*self._losses, loss][-WINDOW:]
    return found


def nats_per_token(
  metrics: Mapping[str, Any], loss_normalizing_factor: float | None
) -> float:
  """Returns the cross-entropy of a target token from T5X's training metrics.

  T5X's own `loss` is a sum over tokens, divided by LOSS_NORMALIZING_FACTOR.
  """
  per_position = metrics['cross_ent_loss_per_all_target_tokens']
  tokens = metrics['non_padding_fraction/loss_weights']
  if not tokens:
    return math.nan
  return float(per_position) / float(tokens) * (loss_normalizing_factor or 1)


def _noise(losses: list[float]) -> float:
  """The standard deviation of a loss, from the differences of neighbours."""
  steps = [b - a for a, b in itertools.pairwise(losses)]
  middle = statistics.median(steps)
  deviation = statistics.median(abs(step - middle) for step in steps)
  return _SIGMA_OF_MEDIAN * deviation / math.sqrt(2)  # A difference has two noises.
