"""Figures of the report: what is drawn the same way in all of them."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from gqa_t5x import files
from gqa_t5x.analysis.palette import BLACK, BLUE, VERMILION

# Heads -> colour, marker.
HEADS = {'MHA': (BLACK, 'o'), 'GQA': (BLUE, 's'), 'MQA': (VERMILION, '^')}


@dataclasses.dataclass(frozen=True)
class Series:
  """Points that belong together.

  Attributes:
    label: in the legend.
    x: their places.
    y: their values.
    color: of marks and line.
    marker: of matplotlib.
    hollow: for the papers' numbers; ours are filled.
    line: whether the points are joined.
    errors: of y, if there are any.
  """

  label: str
  x: Sequence[float]
  y: Sequence[float]
  color: str = BLACK
  marker: str = 'o'
  hollow: bool = False
  line: bool = False
  errors: Sequence[float] | None = None


def style(label: str) -> tuple[str, str]:
  """Returns the colour and marker of a model by its name, e.g. GQA-8-XXL."""
  return HEADS[label.split('-')[0]]


def draw(
  path: pathlib.Path,
  series: Sequence[Series],
  x_label: str,
  y_label: str,
  *,
  x_ticks: Sequence[float] | None = None,
  x_names: Sequence[str] | None = None,
  log: str = '',
  from_zero: bool = False,
  size: tuple[float, float] = (6.0, 3.8),
) -> None:
  """Draws points and lines to a PNG file.

  Args:
    path: the file.
    series: what to draw.
    x_label: of the axis, with its unit.
    y_label: of the axis, with its unit.
    x_ticks: where the axis has marks; None: by itself.
    x_names: what they are called; None: their numbers.
    log: axes with a logarithmic scale: '', 'x', 'y' or 'xy'.
    from_zero: whether y begins at 0.
    size: inches.
  """
  fig, axis = plt.subplots(figsize=size, layout='constrained')
  if 'x' in log:
    axis.set_xscale('log', base=2)
  if 'y' in log:
    axis.set_yscale('log')
  for one in series:
    _plot(axis, one)
  if x_ticks is not None:
    axis.set_xticks(x_ticks, x_names or [f'{x:g}' for x in x_ticks])
    axis.minorticks_off()
  if from_zero:
    axis.set_ylim(0, 1.1 * max(max(one.y) for one in series))
  axis.margins(x=0.08)
  axis.set_xlabel(x_label)
  axis.set_ylabel(y_label)
  tidy(axis, grid='both')
  axis.legend(fontsize=8.5, frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
  save(fig, path)


def _plot(axis: Any, one: Series) -> None:
  axis.errorbar(
    one.x,
    one.y,
    yerr=one.errors,
    color=one.color,
    marker=one.marker,
    ms=7,
    mfc='white' if one.hollow else one.color,
    mew=1.5,
    lw=1.4 if one.line else 0,
    elinewidth=1,
    capsize=3,
    ls='--' if one.hollow else '-',
    label=one.label,
  )


def tidy(axis: Any, grid: str | None = None) -> None:
  """Leaves out what says nothing: two of four borders.

  Args:
    axis: of matplotlib.
    grid: lines behind the marks, across 'x', 'y' or 'both'; None: none.
  """
  axis.spines[['top', 'right']].set_visible(False)
  if grid:
    axis.grid(axis=grid, lw=0.4, color='0.85')
    axis.set_axisbelow(True)


def save(fig: Any, path: pathlib.Path) -> None:
  """Writes a figure as PNG and closes it."""
  with files.whole(path) as temporary:
    fig.savefig(temporary, dpi=150)
  plt.close(fig)
