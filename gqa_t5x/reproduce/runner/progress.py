"""What a run shows: a line for each stage that has ended, and one bar over all work."""

import re
import sys
from collections.abc import Collection, Sequence
from typing import Any

import tqdm

# What a narrow terminal has no room for comes last.
_FORMAT = '{percentage:3.0f}%|{bar:20}| {elapsed}, {remaining} to go; {desc}'
_SECONDS_BETWEEN_REDRAWS = 1 if sys.stderr.isatty() else 30


class Progress:
  """Counts the work of all stages, those that run by their own bars' share."""

  def __init__(self, stages: Sequence[Any], done: Collection[Any]):
    """Names the stages that are done already.

    Args:
      stages: all of them, in the order of their numbers.
      done: those with a result. They say nothing of this run's speed.
    """
    self._stages, self._done, self._work = list(stages), len(done), 0.0
    self._shares: dict[Any, float] = {}  # of the stages that run
    for stage in stages:
      if stage in done:
        self._say(stage, 'done')
    self._bar = tqdm.tqdm(
      total=sum(stage.work for stage in stages if stage not in done),
      bar_format=_FORMAT,
      smoothing=0,  # The time to go by the mean speed: stages differ.
      mininterval=_SECONDS_BETWEEN_REDRAWS,
      disable=len(done) == len(stages),
    )

  def begin(self, stage: Any) -> None:
    """A stage starts."""
    self._shares[stage] = 0.0
    self._name_running()

  def update(self, stage: Any, bar: str) -> None:
    """A stage has redrawn its bar."""
    if share := re.search(r'(\d+)%\|', bar):
      self._shares[stage] = int(share[1]) / 100
      running = sum(stage.work * share for stage, share in self._shares.items())
      self._bar.update(self._work + running - self._bar.n)

  def end(self, stage: Any, seconds: float) -> None:
    """A stage has made its result."""
    self.update(stage, '100%|')
    del self._shares[stage]
    self._done, self._work = self._done + 1, self._work + stage.work
    self._say(stage, f'{seconds:.0f} s')
    self._name_running()

  def close(self) -> None:
    """Ends the bar's line."""
    self._bar.close()

  def _say(self, stage: Any, what: str) -> None:
    """Prints a line above the bar."""
    number = f'[{self._stages.index(stage) + 1}/{len(self._stages)}]'
    tqdm.tqdm.write(f'{number} {stage.title}: {what}', file=sys.stdout)
    sys.stdout.flush()

  def _name_running(self) -> None:
    titles = [f'{self._done} of {len(self._stages)} done']
    titles += [stage.title for stage in self._shares]
    self._bar.set_description_str(', '.join(titles))
