"""Sums over steps and over time: CLU lacks metrics whose denominators come late.

A step cannot read the clock inside a compiled function, and microbatches must not
count as steps; so durations and step counts are filled in on the host afterwards.
"""

from collections.abc import MutableMapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

MetricsMap = MutableMapping[str, clu_metrics.Metric]


@flax.struct.dataclass
class Sum(clu_metrics.Metric):
  """A plain sum; subclasses divide by what `fill_in` sets."""

  total: Any = 0.0
  steps: Any = None
  seconds: Any = None

  def merge(self, other):
    return self.replace(total=self.total + other.total)

  def compute(self):
    return jnp.asarray(self.total)


@flax.struct.dataclass
class AveragePerStep(Sum):
  """A sum divided by the number of steps."""

  def compute(self):
    return self.total / self.steps


@flax.struct.dataclass
class Time(Sum):
  """A duration in seconds."""

  def compute(self):
    return jnp.asarray(self.seconds)


@flax.struct.dataclass
class TimeRate(Sum):
  """A sum per second."""

  def compute(self):
    return self.total / self.seconds


@flax.struct.dataclass
class StepsPerTime(Sum):
  """Steps per second."""

  def compute(self):
    return self.steps / jnp.asarray(self.seconds)


def is_metric_obj(obj) -> bool:
  return isinstance(obj, clu_metrics.Metric)


def fill_in(metrics: MetricsMap, steps: int, seconds: float) -> MetricsMap:
  """Returns the metrics with the number of steps and the duration filled in."""
  return jax.tree.map(
    lambda m: m.replace(steps=steps, seconds=seconds) if isinstance(m, Sum) else m,
    metrics,
    is_leaf=is_metric_obj,
  )
