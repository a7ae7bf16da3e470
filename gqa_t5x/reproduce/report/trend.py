"""The conversion study across sizes: does what holds for a small model hold on?"""

import itertools
import pathlib
import statistics
from collections.abc import Mapping

from gqa_t5x.analysis import figures
from gqa_t5x.model import network, sizes
from gqa_t5x.reproduce.experiments.models import MEAN, SVD
from gqa_t5x.reproduce.report import conversion_figures
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.results.losses import Losses
from gqa_t5x.reproduce.results.rows import read_rows

SIDES = tuple(itertools.product(conversion_figures.KINDS, conversion_figures.SIDES))
STYLES = (
  (figures.BLUE, 'o'),
  (figures.VERMILION, 's'),
  (figures.GREEN, 'D'),
  (figures.PINK, '^'),
)
Shares = dict[tuple[str, str], float]  # side -> mean over layers and groups


def add(doc: Document, rows_file: pathlib.Path) -> None:
  """Adds the table and the figure `trend.png`, if there is more than one size.

  Args:
    doc: the report of one size.
    rows_file: of that size; folders of other sizes' names are next to its folder.
  """
  folder = rows_file.parent
  files = {size: folder.parent / size / rows_file.name for size in sizes.SIZES}
  files = {size: file for size, file in files.items() if file.exists()}
  if len(files) < 2:
    return
  studies = {size: _read(file) for size, file in files.items()}
  doc.text(
    '## Against scale',
    'Excess loss right after conversion, and the share of the calibrated spectra that'
    ' does\nnot fit, mean over layers and groups.',
  )
  sides = (f'{kind.partition("_")[0]} {side}' for kind, side in SIDES)
  head = ['size', 'D', 'layers', 'heads', 'MHA loss', 'to K', 'mean', 'svd']
  rows = [
    _table_row(size, losses, K, shares[K])
    for size, (losses, shares) in studies.items()
    for K in losses.num_kv_heads
  ]
  doc.table([*head, 'svd / mean', *sides], rows)
  _draw(studies, folder / 'trend.png')
  doc.image('trend.png', 'Dropped share of the spectrum by size')


def _table_row(size: str, losses: Losses, K: int, shares: Shares) -> list[str]:
  config = network.config(size)
  mean, svd = (losses.mean(method, K, 0.0) for method in (MEAN, SVD))
  return [
    size,
    str(config.emb_dim),
    f'{config.num_encoder_layers} + {config.num_decoder_layers}',
    f'{config.num_heads} x {config.head_dim}',
    f'{losses.base:.3f}',
    str(K),
    f'{mean:.3f}',
    f'{svd:.4f}',
    f'{svd / mean:.4f}',
    *(f'{share:.4f}' for share in shares.values()),
  ]


def _read(file: pathlib.Path) -> tuple[Losses, dict[int, Shares]]:
  """A study's losses, and for each K what does not fit of its calibrated spectra."""
  losses, found = Losses(read_rows(file, 'conversion')), {}
  for row in read_rows(file, 'spectrum'):
    if row['statistics'] == 'calibrated':
      key = row['num_kv_heads'], row['module'], row['side']
      found.setdefault(key, []).extend(row['dropped_share'])
  return losses, {
    K: {side: statistics.fmean(found[K, *side]) for side in SIDES}
    for K in losses.num_kv_heads
  }


def _draw(
  studies: Mapping[str, tuple[Losses, Mapping[int, Shares]]], path: pathlib.Path
) -> None:
  """Draws the dropped share against the number of heads that share one."""
  with figures.figure(path, 10, 2.9) as fig:
    axes = fig.subplots(1, len(SIDES), sharey=True)
    for axis, (kind, side) in zip(axes, SIDES, strict=True):
      styles = itertools.cycle(STYLES)
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
