"""What the parts of the report are written with."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments.experiment import Timing
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.report.document import FIGURES, Document
from gqa_t5x.reproduce.results.reader import Measured, Reader
from gqa_t5x.reproduce.results.rows import Row


@dataclasses.dataclass(frozen=True)
class Part:
  """One scale's part of the report.

  Attributes:
    doc: the report, which the part adds to.
    found: reads results.
    plan: of the scale: knows where its results are.
    folder: of the report.
  """

  doc: Document
  found: Reader
  plan: Planner
  folder: pathlib.Path

  @property
  def scale(self) -> Any:
    """The scale, of scales.SCALES."""
    return self.plan.experiment

  def decode_rows(self, name: str, timing: Timing) -> list[Row]:
    """Returns the rows of a timing, by the name of its stage."""
    path = self.plan.timing(name, timing).result
    return self.found.rows(path, 'decode_benchmark', size=timing.size)

  def number(self, row: Row, value: float, digits: int) -> str:
    """Returns the cell of a row's value, or of one computed from it."""
    return self.doc.number(Measured.of(row, value), digits)

  def cells(
    self, row: Row | None, columns: Iterable[Callable[[Row], str]]
  ) -> list[str]:
    """Returns the cell that each column makes of a row; not run if there is none."""
    return [self.doc.not_run() if row is None else cell(row) for cell in columns]

  def path(self, name: str) -> pathlib.Path:
    """Returns where a figure goes."""
    return self.folder / FIGURES / name

  def figure(
    self,
    name: str,
    caption: str,
    series: Sequence[figures.Series],
    x_label: str,
    y_label: str,
    *,
    x_ticks: Sequence[float] | None = None,
    x_names: Sequence[str] | None = None,
    log: str = '',
    from_zero: bool = False,
  ) -> None:
    """Draws a figure and adds it, unless it were empty.

    Args:
      name: of the file.
      caption: what it shows.
      series: what to draw.
      x_label, y_label: with units.
      x_ticks: where the axis has marks; None: by itself.
      x_names: what they are called; None: their numbers.
      log: axes with a logarithmic scale: '', 'x' or 'xy'.
      from_zero: whether y begins at 0.
    """
    if not series:
      return
    with figures.figure(self.path(name), 6.0, 3.8) as fig:
      axis = fig.add_subplot()
      if 'y' in log:
        axis.set_yscale('log')
      figures.plot(axis, series, log_x='x' in log)
      if x_ticks is not None:
        axis.set_xticks(x_ticks, x_names or [f'{x:g}' for x in x_ticks])
        axis.minorticks_off()
      if from_zero:
        axis.set_ylim(0, 1.1 * max(max(one.y) for one in series))
      axis.margins(x=0.08)
      figures.tidy(axis, 'both', xlabel=x_label, ylabel=y_label)
      place = {'loc': 'center left', 'bbox_to_anchor': (1, 0.5)}
      figures.legend(axis, fontsize=8.5, **place)
    self.doc.figure(name, caption)
