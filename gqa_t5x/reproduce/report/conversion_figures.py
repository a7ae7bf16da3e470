"""Figures of a study of conversion: losses, spectra by layer, and sizes compared."""

import itertools
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker

from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments import models
from gqa_t5x.reproduce.results.losses import Losses
from gqa_t5x.reproduce.results.rows import Row

CURVES = {
  **{method: figures.METHODS[method.name] for method in models.PAPER_METHODS[::-1]},
  models.SVD_BY_WEIGHTS: (figures.GREEN, 'v'),
  models.SVD: figures.METHODS['svd'],
}
HEADS = {4: (figures.SKY, 'o'), 2: (figures.BLUE, 's'), 1: (figures.VERMILION, '^')}
SIDES = {'key': (figures.BLUE, 'o'), 'value': (figures.VERMILION, 's')}
KINDS = ('self_attention', 'cross_attention')
MODULE_SIDES = tuple(itertools.product(KINDS, SIDES))
# Styles of sizes, in order.
SIZES = (*SIDES.values(), (figures.GREEN, 'D'), (figures.PINK, '^'))
Shares = dict[tuple[str, str], float]  # side of a module -> mean over layers and groups
# Losses span three decades and may be negative: linear below this (shaded).
LINEAR = 0.01
SMALL = 0.001  # The same right after conversion, where nothing but svd comes close.


def draw_losses(losses: Losses, path: pathlib.Path) -> None:
  """Draws the shapes of the paper's figures 4 and 5."""
  heads = losses.num_kv_heads
  with figures.figure(path, 1.0 + 3.0 * len(heads), 7.2) as fig:
    rows = [['methods'] * len(heads), heads]
    axes = fig.subplot_mosaic(rows, height_ratios=(1.0, 1.2))
    _draw_methods(axes.pop('methods'), losses)
    first = axes[heads[0]]
    ends = {}
    for num_kv_heads, axis in axes.items():
      axis.sharey(first)
      ends[axis] = _draw_curves(axis, losses, num_kv_heads)
    first.set_ylabel('loss over MHA trained as long\n(nats per token)')
    limits = first.get_ylim()
    for axis in ends:
      axis.axhspan(-LINEAR, LINEAR, color='0.95', lw=0)
    first.set_ylim(limits)
    fig.canvas.draw()  # Places of labels need the final scales.
    for axis, series in ends.items():
      _label_ends(axis, series)


def _draw_methods(axis: Any, losses: Losses) -> None:
  """A line a method, a mark for each number of key/value heads, at step 0."""
  axis.set_xscale('symlog', linthresh=SMALL)  # First, for the margins.
  heads = losses.num_kv_heads
  ran = [m for m in models.METHODS if any(losses.of(m, K, 0.0) for K in heads)]
  for num_kv_heads in heads:
    means = [losses.mean(method, num_kv_heads, 0.0) for method in ran]
    places = {y: mean for y, mean in enumerate(means) if mean is not None}
    color, marker = HEADS.get(num_kv_heads, ('black', 'x'))
    label = f'{num_kv_heads} of {losses.num_heads} K/V heads'
    marks = figures.Series(label, list(places.values()), list(places), color, marker)
    figures.plot(axis, [marks], mec='black', mew=0.5)
  axis.set_yticks(range(len(ran)), [method.title for method in ran])
  axis.set_ylim(len(ran) - 0.5, -0.5)
  limits = axis.get_xlim()
  axis.axvspan(-SMALL, SMALL, color='0.95', lw=0)
  axis.set_xlim(limits)
  name = 'Right after conversion, without uptraining'
  figures.tidy(axis, 'both', name, xlabel='excess loss (nats per token)')
  figures.legend(axis, loc='upper left', bbox_to_anchor=(1, 1))


def _draw_curves(axis: Any, losses: Losses, num_kv_heads: int) -> list[figures.Series]:
  """Loss against uptraining, one line a method, over MHA after as many steps."""
  series = []
  for method, style in CURVES.items():
    alphas = losses.alphas(method, num_kv_heads)
    values = [losses.over_mha(method, num_kv_heads, alpha) for alpha in alphas]
    if values and None not in values:
      percent = [100 * alpha for alpha in alphas]
      series.append(figures.Series(method.title, percent, values, *style, line=True))
  longest = max(losses.alphas(models.MHA, losses.num_heads))
  series.append(figures.Series('MHA', [0, 100 * longest], [0, 0], marker='', line=True))
  figures.plot(axis, series, ms=4, mew=1)
  axis.set_yscale('symlog', linthresh=LINEAR)
  axis.xaxis.set_major_locator(ticker.MaxNLocator(nbins=4, steps=[1, 5, 10]))
  axis.margins(x=0.03)
  name = f'{losses.num_heads} to {num_kv_heads} K/V heads'
  figures.tidy(axis, 'y', name, xlabel='uptraining, % of pre-training')
  return series


def _label_ends(axis: Any, series: Sequence[figures.Series]) -> None:
  """Names lines at their right ends, moved apart where they would overlap."""
  to_axes = axis.transData + axis.transAxes.inverted()
  ends = [(to_axes.transform((one.x[-1], one.y[-1]))[1], one) for one in series]
  ends.sort(key=lambda end: end[0])
  heights = spread([height for height, _ in ends], 0.055)
  for (_, one), y in zip(ends, heights, strict=True):
    axis.annotate(
      one.label,
      (one.x[-1], one.y[-1]),
      xytext=(1.06, y),
      textcoords='axes fraction',
      va='center',
      fontsize=7.5,
      color=one.color,
      annotation_clip=False,
      arrowprops=dict(arrowstyle='-', color=one.color, lw=0.5, shrinkA=0, shrinkB=3),
    )


def spread(places: Sequence[float], gap: float) -> list[float]:
  """Moves rising numbers apart by at least `gap`; their mean stays."""
  result = list(places)
  for i in range(1, len(result)):
    result[i] = max(result[i], result[i - 1] + gap)
  shift = (sum(result) - sum(places)) / max(len(places), 1)
  return [place - shift for place in result]


def draw_spectra(rows: Sequence[Row], path: pathlib.Path) -> None:
  """Draws the dropped share of rows of kind 'spectrum' against the layer."""
  heads = sorted({row['num_kv_heads'] for row in rows}, reverse=True)
  with figures.figure(path, 1.2 + 2.7 * len(heads), 5) as fig:
    axes = fig.subplots(len(KINDS), len(heads), sharex=True, sharey=True, squeeze=False)
    for line, kind in zip(axes, KINDS, strict=True):
      for axis, num_kv_heads in zip(line, heads, strict=True):
        wanted = kind, num_kv_heads
        chosen = [r for r in rows if (r['module'], r['num_kv_heads']) == wanted]
        _draw_layers(axis, chosen)
        name = f'{kind.replace("_", "-")}, {num_kv_heads} K/V heads'
        figures.tidy(axis, 'y', name)
      line[0].set_ylabel('share dropped')
    for axis in axes[-1]:
      axis.set_xlabel('decoder layer')
    axes[0, 0].set_ylim(bottom=0)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc='outside lower center', ncols=4, fontsize=8)


def _draw_layers(axis: Any, rows: Sequence[Row]) -> None:
  """The mean over the groups, and their range."""
  for side, (color, marker) in SIDES.items():
    for kind, name in (('calibrated', 'calibrated'), ('weights', 'weights only')):
      shares = {
        row['layer']: row['dropped_share']
        for row in rows
        if (row['side'], row['statistics']) == (side, kind)
      }
      layers = sorted(shares)
      low, means, high = (
        np.array([f(shares[layer]) for layer in layers])
        for f in (min, statistics.fmean, max)
      )
      hollow, errors = kind == 'weights', (means - low, high - means)
      one = figures.Series(
        f'{side}, {name}', layers, means, color, marker, hollow, True, errors
      )
      style = {'ls': ':' if hollow else '-', 'ms': 5, 'mew': 1}
      figures.plot(axis, [one], **style, elinewidth=0.6, capsize=0)
  axis.xaxis.get_major_locator().set_params(integer=True)


def draw_trend(
  studies: Mapping[str, tuple[Losses, Mapping[int, Shares]]], path: pathlib.Path
) -> None:
  """Draws the dropped share against the number of heads that share one."""
  with figures.figure(path, 10, 2.9) as fig:
    axes = fig.subplots(1, len(MODULE_SIDES), sharey=True)
    for axis, (kind, side) in zip(axes, MODULE_SIDES, strict=True):
      styles = itertools.cycle(SIZES)
      for size, (losses, shares) in studies.items():
        x = [losses.num_heads // K for K in shares]
        y = [100 * by_side[kind, side] for by_side in shares.values()]
        one = figures.Series(size, x, y, *next(styles), line=True)
        figures.plot(axis, [one], log_x=True, ms=6, mew=1, lw=1.5)
      axis.xaxis.set_major_formatter('{x:.0f}')
      name = f'{kind.replace("_", "-")}, {side}s'
      figures.tidy(axis, 'y', name, xlabel='heads that share one')
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel('dropped share, %')
    figures.legend(axes[0])
