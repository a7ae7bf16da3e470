"""What the parts of the report are written with."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

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

  def number(
    self, row: Row | None, key: str, digits: int, paper: float | None = None
  ) -> str:
    """Returns the cell of a row's value, as `Document.number`."""
    return self.computed(row, row and row[key], digits, paper)

  def computed(
    self, row: Row | None, value: float, digits: int, paper: float | None = None
  ) -> str:
    """Returns the cell of what was computed from a row."""
    number = row and Measured((value,), row['source'], (row['command'],))
    return self.doc.number(number, digits, paper)

  def path(self, name: str) -> pathlib.Path:
    """Returns where a figure goes."""
    return self.folder / FIGURES / name

  def figure(
    self,
    name: str,
    caption: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    **options: Any,
  ) -> None:
    """Draws a figure and adds it, unless it were empty; arguments as figures.draw's."""
    if series:
      figures.draw(self.path(name), series, x_label, y_label, **options)
      self.doc.figure(name, caption)

  def time_against_heads(
    self, name: str, caption: str, seconds: dict[int, tuple[float, float]], unit: str
  ) -> None:
    """Draws times per sample against key/value heads.

    Args:
      name: of the file.
      caption: what it shows.
      seconds: K -> seconds with the encoder, and of the decoder alone.
      unit: of the times.
    """
    heads = sorted(seconds)
    labels = (
      ('with the encoder', figures.BLUE, 'o'),
      ('decoder alone', figures.VERMILION, 's'),
    )
    series = [
      Series(label, heads, [seconds[k][i] for k in heads], color, marker, line=True)
      for i, (label, color, marker) in enumerate(labels)
    ]
    options = {'x_ticks': heads, 'log': 'x', 'from_zero': True}
    if heads:
      self.figure(name, caption, series, 'key/value heads', unit, **options)
