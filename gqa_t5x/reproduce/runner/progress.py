"""What a run shows: a line a stage, and one progress bar."""

import re
import sys
from collections.abc import Collection, Sequence
from typing import Any

import tqdm

_FORMAT = '      {desc} {percentage:3.0f}%|{bar:30}| {elapsed}, {remaining} to go'
_SECONDS_BETWEEN_REDRAWS = 1 if sys.stderr.isatty() else 30


class Progress:
  """Shows the bar of a stage that runs alone, or one bar over all stages."""

  def __init__(self, stages: Sequence[Any], done: Collection[Any]):
    """Names the stages that are done already.

    Args:
      stages: all of them, in the order of their numbers.
      done: those with a result.
    """
    self._stages, self._done, self._before = list(stages), set(done), set(done)
    self._shares: dict[Any, float] = {}
    self._alone = False
    self._bar: tqdm.tqdm | None = None
    self._drawn = False
    for stage in stages:
      if stage in self._done:
        self._say(f'{self._number(stage)} {stage.title}: done')

  def begin(self, stage: Any, alone: bool) -> None:
    """A stage starts; alone: its own bar is shown."""
    self._alone = alone
    self._shares[stage] = 0.0
    if alone:
      self.close()
      self._say(f'{self._number(stage)} {stage.title}')
    elif self._bar is None:
      self._bar = tqdm.tqdm(
        total=sum(s.work for s in self._stages if s not in self._before),
        initial=self._work_done(),
        bar_format=_FORMAT,
        smoothing=0,  # The time to go by the mean speed: stages differ.
        mininterval=_SECONDS_BETWEEN_REDRAWS,
      )
    self._redraw()

  def update(self, stage: Any, bar: str) -> None:
    """A stage has redrawn its bar."""
    if self._alone:
      print(f'\r      {bar}', end='', file=sys.stderr, flush=True)
      self._drawn = True
    elif share := re.search(r'(\d+)%\|', bar):
      self._shares[stage] = int(share[1]) / 100
      self._redraw()

  def end(self, stage: Any, seconds: float) -> None:
    """A stage has made its result."""
    self._done.add(stage)
    self._shares.pop(stage)
    if self._alone:
      self.close()
      self._say(f'      {seconds:.0f} s')
    else:
      self._say(f'{self._number(stage)} {stage.title}: {seconds:.0f} s')
      self._redraw()

  def close(self) -> None:
    """Ends the line of whichever bar is shown."""
    if self._bar is not None:
      self._bar.close()
      self._bar = None
    if self._drawn:
      print(file=sys.stderr)
      self._drawn = False

  def _number(self, stage: Any) -> str:
    return f'[{self._stages.index(stage) + 1}/{len(self._stages)}]'

  def _say(self, text: str) -> None:
    """Prints a line above the bar."""
    tqdm.tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()

  def _work_done(self) -> float:
    """Of this run: earlier ones say nothing of its speed."""
    running = sum(stage.work * share for stage, share in self._shares.items())
    return sum(stage.work for stage in self._done - self._before) + running

  def _redraw(self) -> None:
    if self._bar is not None:
      done, running = len(self._done), len(self._shares)
      text = f'{done} of {len(self._stages)} stages done, {running} running'
      self._bar.set_description_str(text, refresh=False)
      self._bar.update(self._work_done() - self._bar.n)
