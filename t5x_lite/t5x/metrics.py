"""Metrics over steps and over time, which CLU lacks: their denominators are set late.

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
  """A plain sum."""

  total: Any

  @classmethod
  def from_model_output(cls, values, **_):
    return cls(total=jnp.sum(jnp.asarray(values)))

  def merge(self, other):
    return type(self)(total=self.total + other.total)

  def compute(self):
    return jnp.asarray(self.total)


@flax.struct.dataclass
class Step(clu_metrics.Metric):
  """Base of what is counted in steps."""

  steps: Any = 1

  def replace_steps(self, steps: int) -> 'Step':
    return self.replace(steps=steps)


@flax.struct.dataclass
class AveragePerStep(Step):
  """A sum divided by the number of steps."""

  total: Any = None

  @classmethod
  def from_model_output(cls, values, steps=1, **_):
    return cls(total=jnp.sum(jnp.asarray(values)), steps=steps)

  def merge(self, other):
    return type(self)(total=self.total + other.total, steps=self.steps + other.steps)

  def compute(self):
    return self.total / self.steps


@flax.struct.dataclass
class Time(clu_metrics.Metric):
  """A duration in seconds."""

  duration: Any = None

  def replace_duration(self, duration: float) -> 'Time':
    return self.replace(duration=duration)

  def merge(self, other):
    return self

  def compute(self):
    if self.duration is None:
      raise ValueError('set the duration with replace_duration() before compute()')
    return jnp.asarray(self.duration)


@flax.struct.dataclass
class TimeRate(Time):
  """A sum per second."""

  numerator: Any = None

  @classmethod
  def from_model_output(cls, numerator, **_):
    return cls(numerator=numerator)

  def merge(self, other):
    return type(self)(numerator=self.numerator + other.numerator)

  def compute(self):
    return self.numerator / super().compute()


@flax.struct.dataclass
class StepsPerTime(Step, Time):
  """Steps per second."""

  @classmethod
  def from_model_output(cls, steps=1, **_):
    return cls(steps=steps)

  def merge(self, other):
    return type(self)(steps=self.steps + other.steps)

  def compute(self):
    return self.steps / Time.compute(self)


def is_metric_obj(obj) -> bool:
  return isinstance(obj, clu_metrics.Metric)


def _map(fn, kind, metrics):
  return jax.tree.map(
    lambda m: fn(m) if isinstance(m, kind) else m, metrics, is_leaf=is_metric_obj
  )


def set_time_metrics_duration(metrics, duration: float):
  """Fills in the duration (seconds) of every metric over time."""
  return _map(lambda m: m.replace_duration(duration), Time, metrics)


def set_step_metrics_num_steps(metrics, num_steps: int):
  """Fills in the number of steps of every metric per step."""
  return _map(lambda m: m.replace_steps(num_steps), Step, metrics)
