"""The losses of a study of conversion, by model and time."""

import statistics
from collections.abc import Sequence

from gqa_t5x.reproduce.experiments.models import MHA, Method
from gqa_t5x.reproduce.results.rows import Row


class Losses:
  """Excess losses by model, key/value heads, alpha and seed, nats per token."""

  def __init__(self, rows: Sequence[Row]):
    """Sorts rows of kind 'conversion', all of one study."""
    self._values: dict[tuple[Method, int, int], dict[int, float]] = {}
    self.rows = rows
    for row in rows:
      method = Method(row['method'], row['statistics'], row['grouping'])
      key = method, row['num_kv_heads'], row['uptrain_steps']
      self._values.setdefault(key, {})[row['seed']] = row['excess_loss']
    self.size, self.pretrain_steps = rows[0]['size'], rows[0]['pretrain_steps']
    mha = [row for row in rows if row['method'] == MHA.name]
    self.num_heads = mha[0]['num_kv_heads']
    self.base = min(mha, key=lambda row: row['uptrain_steps'])['validation_loss']
    heads = {row['num_kv_heads'] for row in rows} - {self.num_heads}
    self.num_kv_heads = sorted(heads, reverse=True)

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
    values = self.of(method, num_kv_heads, alpha)
    mha = self.of(MHA, self.num_heads, alpha)
    pairs = [value - mha[seed] for seed, value in values.items() if seed in mha]
    return statistics.fmean(pairs) if pairs else None

  def alphas(self, method: Method, num_kv_heads: int) -> list[float]:
    """When it was evaluated, in order."""
    wanted = (method, num_kv_heads)
    steps = sorted(key[2] for key in self._values if key[:2] == wanted)
    return [step / self.pretrain_steps for step in steps]
