"""The conversion study's figures: losses by method and alpha, spectra by layer."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gqa_t5x.analysis.palette import BLUE, GREEN, ORANGE, PINK, SKY, VERMILION
from gqa_t5x.reproduce.experiments.models import (
  FIRST,
  MEAN,
  METHODS,
  MHA,
  RANDOM,
  SVD,
  title,
)
from gqa_t5x.reproduce.report.figures import plt, save, tidy
from gqa_t5x.reproduce.results.losses import Losses

CURVES = {
  RANDOM: (PINK, '^'),
  FIRST: (ORANGE, 's'),
  MEAN: (BLUE, 'o'),
  ('svd', 'weights', 'contiguous'): (GREEN, 'v'),
  SVD: (VERMILION, 'D'),
}
HEADS = {4: (SKY, 'o'), 2: (BLUE, 's'), 1: (VERMILION, '^')}
SIDES = {'key': (BLUE, 'o'), 'value': (VERMILION, 's')}
KINDS = {'self_attention': 'self-attention', 'cross_attention': 'cross-attention'}
# Losses span three decades and may be negative: linear below this (shaded).
LINEAR = 0.01
SMALL = 0.001  # The same right after conversion, where nothing but svd comes close.


def draw_losses(losses: Losses, path: pathlib.Path) -> None:
  """Draws the shapes of the paper's figures 4 and 5.

  Args:
    losses: of a study.
    path: the PNG file.
  """
  heads = losses.num_kv_heads
  fig, axes = plt.subplot_mosaic(
    [['methods'] * len(heads), heads],
    figsize=(1.0 + 3.0 * len(heads), 7.2),
    height_ratios=(1.0, 1.2),
    layout='constrained',
  )
  _draw_methods(axes['methods'], losses)
  for num_kv_heads in heads:
    axes[num_kv_heads].sharey(axes[heads[0]])
    _draw_curves(axes[num_kv_heads], losses, num_kv_heads)
  axes[heads[0]].set_ylabel('loss over MHA trained as long\n(nats per token)')
  limits = axes[heads[0]].get_ylim()
  for num_kv_heads in heads:
    axes[num_kv_heads].axhspan(-LINEAR, LINEAR, color='0.95', lw=0)
  axes[heads[0]].set_ylim(limits)
  fig.canvas.draw()  # Places of labels need the final scales.
  for num_kv_heads in heads:
    _label_ends(axes[num_kv_heads])
  save(fig, path)


def _draw_methods(axis: Any, losses: Losses) -> None:
  """A line a method, a mark for each number of key/value heads, at step 0."""
  axis.set_xscale('symlog', linthresh=SMALL)  # First, for the margins.
  ran = [
    method
    for method in METHODS
    if any(losses.of(method, num_kv_heads, 0.0) for num_kv_heads in losses.num_kv_heads)
  ]
  for y, method in enumerate(ran):
    for num_kv_heads in losses.num_kv_heads:
      value = losses.mean(method, num_kv_heads, 0.0)
      if value is None:
        continue
      color, marker = HEADS.get(num_kv_heads, ('black', 'x'))
      name = f'{num_kv_heads} of {losses.num_heads} K/V heads' if y == 0 else None
      axis.plot(value, y, marker, ms=7, color=color, mec='black', mew=0.5, label=name)
  axis.set_yticks(range(len(ran)), [title(method) for method in ran])
  axis.set_ylim(len(ran) - 0.5, -0.5)
  limits = axis.get_xlim()
  axis.axvspan(-SMALL, SMALL, color='0.95', lw=0)
  axis.set_xlim(limits)
  tidy(axis, grid='both')
  axis.set_xlabel('excess loss (nats per token)')
  axis.set_title('Right after conversion, without uptraining', fontsize=10)
  axis.legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(1, 1))


def _draw_curves(axis: Any, losses: Losses, num_kv_heads: int) -> None:
  """Loss against uptraining, one line a method, over MHA after as many steps."""
  for method, (color, marker) in CURVES.items():
    alphas = losses.alphas(method, num_kv_heads)
    values = [losses.over_mha(method, num_kv_heads, alpha) for alpha in alphas]
    if values and None not in values:
      percent = [100 * alpha for alpha in alphas]
      axis.plot(
        percent, values, color=color, marker=marker, ms=4, lw=1.4, label=title(method)
      )
  longest = max(losses.alphas(MHA, losses.num_heads))
  axis.plot([0, 100 * longest], [0, 0], color='black', lw=1.2, label='MHA')
  axis.set_yscale('symlog', linthresh=LINEAR)
  tidy(axis, grid='y')
  axis.xaxis.set_major_locator(plt.MaxNLocator(nbins=4, steps=[1, 5, 10]))
  axis.set_xlabel('uptraining, % of pre-training')
  axis.set_title(f'{losses.num_heads} to {num_kv_heads} K/V heads', fontsize=10)
  axis.margins(x=0.03)


def _label_ends(axis: Any) -> None:
  """Names lines at their right ends, moved apart where they would overlap."""
  ends = {
    line.get_label(): (line.get_xdata()[-1], line.get_ydata()[-1], line.get_color())
    for line in axis.get_lines()
  }
  to_axes = axis.transData + axis.transAxes.inverted()
  places = {n: to_axes.transform(point[:2])[1] for n, point in ends.items()}
  names = sorted(places, key=places.get)
  for name, y in zip(names, spread([places[n] for n in names], 0.055), strict=True):
    x, value, color = ends[name]
    axis.annotate(
      name,
      (x, value),
      xytext=(1.06, y),
      textcoords='axes fraction',
      va='center',
      fontsize=7.5,
      color=color,
      annotation_clip=False,
      arrowprops=dict(arrowstyle='-', color=color, lw=0.5, shrinkA=0, shrinkB=3),
    )


def spread(places: Sequence[float], gap: float) -> list[float]:
  """Moves rising numbers apart, as little as a simple rule can.

  Args:
    places: rising.
    gap: least distance between neighbours afterwards.

  Returns:
    Rising, with the same mean.
  """
  result = list(places)
  for i in range(1, len(result)):
    result[i] = max(result[i], result[i - 1] + gap)
  shift = (sum(result) - sum(places)) / max(len(places), 1)
  return [place - shift for place in result]


def draw_spectra(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Draws the dropped share of the spectra against the layer.

  Args:
    rows: of kind 'spectrum'.
    path: the PNG file.
  """
  heads = sorted({row['num_kv_heads'] for row in rows}, reverse=True)
  fig, axes = plt.subplots(
    len(KINDS),
    len(heads),
    figsize=(1.2 + 2.7 * len(heads), 5),
    sharex=True,
    sharey=True,
    squeeze=False,
    layout='constrained',
  )
  for line, (kind, name) in zip(axes, KINDS.items(), strict=True):
    for axis, num_kv_heads in zip(line, heads, strict=True):
      chosen = [
        r for r in rows if (r['module'], r['num_kv_heads']) == (kind, num_kv_heads)
      ]
      _draw_layers(axis, chosen)
      axis.set_title(f'{name}, {num_kv_heads} K/V heads', fontsize=10)
    line[0].set_ylabel('share dropped')
  for axis in axes[-1]:
    axis.set_xlabel('decoder layer')
  axes[0, 0].set_ylim(bottom=0)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  fig.legend(handles, labels, loc='outside lower center', ncols=4, fontsize=8)
  save(fig, path)


def _draw_layers(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
  for side, (color, marker) in SIDES.items():
    for kind, style in (('calibrated', '-'), ('weights', ':')):
      shares = {
        row['layer']: row['dropped_share']
        for row in rows
        if (row['side'], row['statistics']) == (side, kind)
      }
      layers = sorted(shares)
      means = np.array([statistics.fmean(shares[layer]) for layer in layers])
      low, high = (np.array([f(shares[n]) for n in layers]) for f in (min, max))
      axis.errorbar(
        layers,
        means,
        yerr=(means - low, high - means),
        color=color,
        marker=marker,
        mfc=color if kind == 'calibrated' else 'white',
        ls=style,
        ms=5,
        lw=1.4,
        elinewidth=0.6,
        label=f'{side}, {"calibrated" if kind == "calibrated" else "weights only"}',
      )
  axis.xaxis.get_major_locator().set_params(integer=True)
  tidy(axis, grid='y')
