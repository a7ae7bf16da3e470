"""The losses of a study of conversion, by model and time."""

import statistics
from collections.abc import Iterable

from gqa_t5x.reproduce.experiments.models import MHA, Method
from gqa_t5x.reproduce.results.rows import Row


class Losses:
  """Excess losses by model, key/value heads, alpha and seed, nats per token."""

  def __init__(self, rows: Iterable[Row]):
    """Sorts rows of kind 'conversion'; other kinds are passed over."""
    self._values: dict[tuple[Method, int, int], dict[int, float]] = {}
    self.rows = [row for row in rows if row['kind'] == 'conversion']
    for row in self.rows:
      self._values.setdefault(self._key(row), {})[row['seed']] = row['excess_loss']
    self.command, self.size = self.rows[0]['command'], self.rows[0]['size']
    self.pretrain_steps = self.rows[0]['pretrain_steps']
    mha = [row for row in self.rows if method_of(row) == MHA]
    self.num_heads = mha[0]['num_kv_heads']
    self.base = min(mha, key=lambda row: row['uptrain_steps'])['validation_loss']
    heads = {row['num_kv_heads'] for row in self.rows} - {self.num_heads}
    self.num_kv_heads = sorted(heads, reverse=True)

  @staticmethod
  def _key(row: Row) -> tuple[Method, int, int]:
    return method_of(row), row['num_kv_heads'], row['uptrain_steps']

  def of(self, method: Method, num_kv_heads: int, alpha: float) -> dict[int, float]:
    """Seed -> excess loss; nothing if it was not run."""
    steps = round(alpha * self.pretrain_steps)
    return self._values.get((method, num_kv_heads, steps), {})

  def mean(self, method: Method, num_kv_heads: int, alpha: float) -> float | None:
    """Their mean, or None."""
    values = self.of(method, num_kv_heads, alpha).values()
    return statistics.fmean(values) if values else None

  def over_mha(self, method: Method, num_kv_heads: int, alpha: float) -> float | None:
    """Mean loss over that of MHA trained as long on the same data, seed by seed."""
    values, mha = self.of(method, num_kv_heads, alpha), self.of_mha(alpha)
    pairs = [value - mha[seed] for seed, value in values.items() if seed in mha]
    return statistics.fmean(pairs) if pairs else None

  def of_mha(self, alpha: float) -> dict[int, float]:
    """Seed -> excess loss of MHA trained on: below 0 if it gains."""
    return self.of(MHA, self.num_heads, alpha)

  def alphas(self, method: Method, num_kv_heads: int) -> list[float]:
    """When it was evaluated, in order."""
    wanted = (method, num_kv_heads)
    steps = sorted(key[2] for key in self._values if key[:2] == wanted)
    return [step / self.pretrain_steps for step in steps]


def method_of(row: Row) -> Method:
  """Returns what tells the methods apart: method, statistics, grouping."""
  return row['method'], row['statistics'], row['grouping']
