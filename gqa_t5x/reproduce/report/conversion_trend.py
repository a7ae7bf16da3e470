"""The conversion study across sizes: does what holds for a small model hold on?"""

import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from gqa_t5x.model import network, sizes

matplotlib.use('Agg')
from matplotlib import pyplot as plt

Row = dict[str, Any]

SIDES = (
  ('self_attention', 'key'),
  ('self_attention', 'value'),
  ('cross_attention', 'key'),
  ('cross_attention', 'value'),
)
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7')
MARKERS = 'osD^'


def read(folder: pathlib.Path) -> dict[str, list[Row]]:
  """Reads the rows of every size whose study is done, by rising size.

  Args:
    folder: the study's output_dir.
  """
  files = {size: folder / size / 'rows.json' for size in sizes.SIZES}
  return {
    size: json.loads(file.read_text()) for size, file in files.items() if file.exists()
  }


def markdown(by_size: Mapping[str, Sequence[Row]]) -> str:
  """Returns a table with a line for each size and number of key/value heads.

  Args:
    by_size: size -> rows of its study.
  """
  sides = ' | '.join(f'{kind.partition("_")[0]} {side}' for kind, side in SIDES)
  lines = [
    '| size | D | layers | heads | MHA loss | to K | mean | svd | svd / mean'
    f' | {sides} |',
    '|---|---:|---:|---:|---:|---:|---:|---:|---:|' + '---:|' * len(SIDES),
  ]
  for size, rows in by_size.items():
    config = network.config(size)
    for num_kv_heads in _heads(rows):
      mean, svd = (_loss(rows, method, num_kv_heads) for method in ('mean', 'svd'))
      dropped = ' | '.join(
        f'{share:.4f}' for share in dropped_shares(rows, num_kv_heads).values()
      )
      lines.append(
        f'| {size} | {config.emb_dim} | {config.num_encoder_layers} +'
        f' {config.num_decoder_layers} | {config.num_heads} x {config.head_dim}'
        f' | {_mha_loss(rows):.3f} | {num_kv_heads} | {mean:.3f} | {svd:.4f}'
        f' | {svd / mean:.4f} | {dropped} |'
      )
  return '\n'.join(lines)


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


def draw(by_size: Mapping[str, Sequence[Row]], path: pathlib.Path) -> None:
  """Draws the dropped share against the number of heads that share one.

  Args:
    by_size: size -> rows of its study.
    path: the PNG file.
  """
  fig, axes = plt.subplots(
    1, len(SIDES), figsize=(10, 2.9), sharey=True, layout='constrained'
  )
  for i, (size, rows) in enumerate(by_size.items()):
    num_heads = sizes.SIZES[size]['num_heads']
    groups = {num_heads // K: dropped_shares(rows, K) for K in _heads(rows)}
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
    axis.grid(axis='y', lw=0.4, color='0.85')
    axis.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylabel('dropped share, %')
  axes[0].legend(fontsize=8, frameon=False)
  temporary = path.with_suffix('.tmp.png')
  fig.savefig(temporary, dpi=150)
  plt.close(fig)
  os.replace(temporary, path)


def _heads(rows: Sequence[Row]) -> list[int]:
  return sorted({r['num_kv_heads'] for r in rows if r['kind'] == 'spectrum'})[::-1]


def _loss(rows: Sequence[Row], method: str, num_kv_heads: int) -> float:
  """Excess loss right after conversion; all seeds have the same."""
  return next(
    row['excess_loss']
    for row in rows
    if row['kind'] == 'conversion'
    and (row['method'], row['num_kv_heads']) == (method, num_kv_heads)
    and row['statistics'] in ('none', 'calibrated')
    and row['grouping'] == 'contiguous'
    and row['uptrain_steps'] == 0
  )


def _mha_loss(rows: Sequence[Row]) -> float:
  return next(
    row['validation_loss']
    for row in rows
    if row['kind'] == 'conversion'
    and row['method'] == 'none'
    and row['uptrain_steps'] == 0
  )
