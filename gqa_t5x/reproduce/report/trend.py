"""The conversion study across sizes: does what holds for a small model hold on?"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gqa_t5x.analysis.palette import BLUE, GREEN, PINK, VERMILION
from gqa_t5x.model import network, sizes
from gqa_t5x.reproduce.experiments.models import MEAN, SVD
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.report.figures import plt, save, tidy
from gqa_t5x.reproduce.results.losses import Losses
from gqa_t5x.reproduce.results.rows import Row

SIDES = (
  ('self_attention', 'key'),
  ('self_attention', 'value'),
  ('cross_attention', 'key'),
  ('cross_attention', 'value'),
)
COLORS = (BLUE, VERMILION, GREEN, PINK)
MARKERS = 'osD^'


def add(doc: Document, folder: Any, rows_name: str) -> None:
  """Adds the table and the figure `trend.png`, if there is more than one size.

  Args:
    doc: the report of one size.
    folder: of that size; those of other sizes are next to it, under their names.
    rows_name: of the file of rows in each.
  """
  files = {size: folder.parent / size / rows_name for size in sizes.SIZES}
  by_size = {
    size: json.loads(file.read_text()) for size, file in files.items() if file.exists()
  }
  if len(by_size) < 2:
    return
  doc.text(
    '## Against scale',
    'Excess loss right after conversion, and the share of the calibrated spectra that'
    ' does\nnot fit, mean over layers and groups.',
  )
  sides = (f'{kind.partition("_")[0]} {side}' for kind, side in SIDES)
  head = ['size', 'D', 'layers', 'heads', 'MHA loss', 'to K', 'mean', 'svd']
  doc.table([*head, 'svd / mean', *sides], _table_rows(by_size))
  draw(by_size, folder / 'trend.png')
  doc.image('trend.png', 'Dropped share of the spectrum by size')


def _table_rows(by_size: Mapping[str, Sequence[Row]]) -> list[list[str]]:
  """A line for each size and number of key/value heads."""
  lines = []
  for size, rows in by_size.items():
    config, losses = network.config(size), Losses(rows)
    for num_kv_heads in losses.num_kv_heads:
      mean, svd = (losses.mean(m, num_kv_heads, 0.0) for m in (MEAN, SVD))
      shares = dropped_shares(rows, num_kv_heads).values()
      lines.append(
        [
          size,
          str(config.emb_dim),
          f'{config.num_encoder_layers} + {config.num_decoder_layers}',
          f'{config.num_heads} x {config.head_dim}',
          f'{losses.base:.3f}',
          str(num_kv_heads),
          f'{mean:.3f}',
          f'{svd:.4f}',
          f'{svd / mean:.4f}',
          *(f'{share:.4f}' for share in shares),
        ]
      )
  return lines


def dropped_shares(
  rows: Sequence[Row], num_kv_heads: int
) -> dict[tuple[str, str], float]:
  """Returns the share of the calibrated spectra that does not fit, by module and side.

  Args:
    rows: of one size.
    num_kv_heads: K.

  Returns:
    (module, side) -> mean over layers and groups.
  """
  shares: dict[tuple[str, str], list[float]] = {key: [] for key in SIDES}
  for row in rows:
    if (
      row['kind'] == 'spectrum'
      and row['statistics'] == 'calibrated'
      and row['num_kv_heads'] == num_kv_heads
    ):
      shares[row['module'], row['side']] += row['dropped_share']
  return {key: statistics.fmean(values) for key, values in shares.items()}


def draw(by_size: Mapping[str, Sequence[Row]], path: Any) -> None:
  """Draws the dropped share against the number of heads that share one.

  Args:
    by_size: size -> rows of its study.
    path: the PNG file.
  """
  fig, axes = plt.subplots(
    1, len(SIDES), figsize=(10, 2.9), sharey=True, layout='constrained'
  )
  for i, (size, rows) in enumerate(by_size.items()):
    losses = Losses(rows)
    groups = {
      losses.num_heads // K: dropped_shares(rows, K) for K in losses.num_kv_heads
    }
    for axis, key in zip(axes, SIDES, strict=True):
      axis.plot(
        list(groups),
        [100 * shares[key] for shares in groups.values()],
        color=COLORS[i % len(COLORS)],
        marker=MARKERS[i % len(MARKERS)],
        label=size,
      )
  for axis, (kind, side) in zip(axes, SIDES, strict=True):
    axis.set_title(f'{kind.replace("_", "-")}, {side}s', fontsize=10)
    axis.set_xscale('log', base=2)
    axis.xaxis.set_major_formatter('{x:.0f}')
    axis.set_xlabel('heads that share one')
    axis.set_ylim(bottom=0)
    tidy(axis, grid='y')
  axes[0].set_ylabel('dropped share, %')
  axes[0].legend(fontsize=8, frameon=False)
  save(fig, path)
