"""Times of steps: the arithmetic of the benchmarks."""

import functools

from gqa_t5x.analysis.benchmarks import timing


def test_slopes(monkeypatch):
  """Set-up costs drop out, functions take turns, and the median counts."""
  calls, rounds = [], 4  # The first warms up.

  def run(name, set_up, step):
    def call(count):
      calls.append((name, count))
      # The last measurement is disturbed.
      return set_up + step * count + (50 if len(calls) > 4 * (rounds - 1) else 0)

    return functools.partial(timing.slope, call)

  monkeypatch.setattr(timing, 'seconds', lambda call: call())
  found = timing.slopes([run('a', 5, 2), run('b', 7, 3)], (2, 10), rounds - 1)
  assert found == [2, 3]
  assert len(calls) == 4 * rounds
  assert calls[:4] == [('a', 2), ('a', 10), ('b', 2), ('b', 10)]
