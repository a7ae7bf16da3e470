"""What all figures share: colours, marks, axes, files."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from gqa_t5x import files

# Okabe and Ito's colours, told apart by the colour-blind.
BLUE, ORANGE, PINK, GREEN = '#0072B2', '#E69F00', '#CC79A7', '#009E73'
VERMILION, SKY, BLACK = '#D55E00', '#56B4E9', '#000000'
# In the order in which lines that stand for nothing in particular take them.
LINES = (BLACK, BLUE, VERMILION, GREEN, ORANGE, PINK)
# Heads, and methods of conversion -> colour, marker.
HEADS = {'MHA': (BLACK, 'o'), 'GQA': (BLUE, 's'), 'MQA': (VERMILION, '^')}
HEADS['Latent'] = GREEN, 'D'
METHODS = {
  'mean': (BLUE, 'o'),
  'first': (ORANGE, 's'),
  'random': (PINK, '^'),
  'svd': (VERMILION, 'D'),
}


@dataclasses.dataclass(frozen=True)
class Series:
  """Points that belong together.

  Attributes:
    hollow: white marks and a broken line: of two kinds of numbers, the second.
    line: whether the points are joined.
    errors: of y, as matplotlib takes them.
  """

  label: str
  x: Sequence[float]
  y: Sequence[float]
  color: str = BLACK
  marker: str = 'o'
  hollow: bool = False
  line: bool = False
  errors: Any = None


def heads_style(label: str) -> tuple[str, str]:
  """Returns the colour and marker of a model by its name, e.g. GQA-8-XXL."""
  return HEADS[label.split('-')[0]]


@contextlib.contextmanager
def figure(path: pathlib.Path, width: float, height: float) -> Iterator[Any]:
  """Yields an empty figure (inches), and writes it as PNG in the end."""
  fig = plt.figure(figsize=(width, height), layout='constrained')
  yield fig
  with files.whole(path) as temporary:
    fig.savefig(temporary, dpi=150)
  plt.close(fig)


def plot(
  axis: Any, series: Sequence[Series], *, log_x: bool = False, **style: Any
) -> None:
  """Plots series; `style` is matplotlib's, where it is to differ from the usual."""
  if log_x:
    axis.set_xscale('log', base=2)
  for one in series:
    usual = {
      'ms': 7,
      'mfc': 'white' if one.hollow else one.color,
      'mew': 1.5,
      'lw': 1.4,
      'ls': ('--' if one.hollow else '-') if one.line else 'none',
      'elinewidth': 1,
      'capsize': 3,
    }
    axis.errorbar(
      one.x,
      one.y,
      yerr=one.errors,
      color=one.color,
      marker=one.marker,
      label=one.label,
      **usual | style,
    )


def bars(axis: Any, values: dict[str, float], digits: int) -> None:
  """Draws a bar with its number for each name."""
  drawn = axis.bar(
    list(values), list(values.values()), color=SKY, edgecolor='black', linewidth=0.6
  )
  axis.bar_label(drawn, fmt=f'%.{digits}f', fontsize=9)


def tidy(axis: Any, grid: str | None = None, title: str = '', **labels: Any) -> None:
  """Names an axis and leaves out what says nothing: two of four borders.

  Args:
    axis: of matplotlib.
    grid: lines behind the marks, across 'x', 'y' or 'both'; None: none.
    title: above it.
    **labels: xlabel and ylabel.
  """
  axis.set(**labels)
  axis.set_title(title, fontsize=10)
  axis.spines[['top', 'right']].set_visible(False)
  if grid:
    axis.grid(axis=grid, lw=0.4, color='0.85')
    axis.set_axisbelow(True)


def legend(axis: Any, **options: Any) -> None:
  """Adds a legend without a frame, of small print."""
  axis.legend(**{'fontsize': 8, 'frameon': False, **options})
