"""What the parts of the report are written with."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gqa_t5x.reproduce.experiments.experiment import Timing
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.report import figures
from gqa_t5x.reproduce.report.document import FIGURES, Document
from gqa_t5x.reproduce.report.figures import Series
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

  def number(
    self, row: Row, value: float, digits: int, paper: float | None = None
  ) -> str:
    """Returns the cell of a row's value, or of one computed from it."""
    return self.doc.number(Measured.of(row, value), digits, paper)

  def cells(
    self, row: Row | None, columns: Iterable[Callable[[Row], str]]
  ) -> list[str]:
    """Returns the cell that each column makes of a row; not run if there is none."""
    return [self.doc.not_run() if row is None else cell(row) for cell in columns]

  def path(self, name: str) -> pathlib.Path:
    """Returns where a figure goes."""
    return self.folder / FIGURES / name

  def figure(
    self, name: str, caption: str, series: Sequence[Series], *labels: str, **options
  ) -> None:
    """Draws a figure and adds it, unless it were empty; see figures.draw."""
    if series:
      figures.draw(self.path(name), series, *labels, **options)
      self.doc.figure(name, caption)
