"""The project's point at a glance: what fewer heads save, and what they cost."""

import pathlib
from typing import Any

from gqa_t5x.reproduce.experiments import conversion
from gqa_t5x.reproduce.experiments.lab import STUDY, Lab
from gqa_t5x.reproduce.report import figures
from gqa_t5x.reproduce.report.conversion_report import MEAN, SVD, Losses
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.report.figures import plt
from gqa_t5x.reproduce.results.results import Results, Row

BARS = (
  ('converted by mean', MEAN, 0.0, figures.BLUE, ''),
  ('by mean, uptrained 5%', MEAN, 0.05, figures.BLUE, '///'),
  ('converted by svd', SVD, 0.0, figures.VERMILION, ''),
  ('by svd, uptrained 5%', SVD, 0.05, figures.VERMILION, '///'),
)


def write(doc: Document, found: Results, lab: Lab, folder: pathlib.Path) -> None:
  """Adds the figure, once both halves are there.

  Args:
    doc: the report.
    found: reads results.
    lab: of the local scale.
    folder: where figures go.
  """
  times = found.rows(lab.rows('figure6'), 'decode_benchmark', size=lab.scale.heads.size)
  paths = conversion.Paths(lab.output_dir, STUDY)
  rows = found.rows(paths.rows, 'conversion', source='measured')
  if not times or not rows:
    return
  losses = Losses(rows)
  fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
  _draw_times(left, times)
  _draw_losses(right, losses)
  figures.save(fig, folder / 'overview.png')
  first = times[0]
  doc.figure(
    'overview.png',
    f'Fewer key/value heads decode faster (T5.1.1-{first["size"]}, input'
    f' {first["input_length"]}, batch {first["batch_size"]}, {first["device"]}),'
    ' and cost next to nothing if a checkpoint is converted by svd (a tiny T5.1.1 with'
    f' {losses.num_heads} heads). All measured.',
  )


def _draw_times(axis: Any, rows: list[Row]) -> None:
  rows = sorted(rows, key=lambda row: -row['num_kv_heads'])
  names = [str(row['num_kv_heads']) for row in rows]
  values = [row['ms_per_step'] for row in rows]
  bars = axis.bar(
    range(len(names)), values, color='#56B4E9', edgecolor='black', linewidth=0.6
  )
  axis.bar_label(bars, fmt='%.0f', fontsize=9)
  axis.set_xticks(range(len(names)), names)
  axis.set_xlabel(f'key/value heads of {names[0]} query heads')
  axis.set_ylabel('decode step (ms)')
  axis.set_title('Time', fontsize=10)
  axis.spines[['top', 'right']].set_visible(False)


def _draw_losses(axis: Any, losses: Losses) -> None:
  """Loss over MHA trained as long, for each number of heads."""
  width = 0.2
  for i, (label, method, alpha, color, hatch) in enumerate(BARS):
    values = [losses.over_mha(method, k, alpha) for k in losses.num_kv_heads]
    places = [x + (i - 1.5) * width for x in range(len(values))]
    bars = axis.bar(
      places,
      [value or 0 for value in values],
      width,
      color='white' if hatch else color,
      edgecolor=color,
      hatch=hatch,
      label=label,
    )
    names = ['not run' if value is None else f'{value:.3f}' for value in values]
    axis.bar_label(bars, labels=names, fontsize=8)
  names = ['MQA' if k == 1 else f'GQA-{k}' for k in losses.num_kv_heads]
  axis.set_xticks(range(len(names)), names)
  axis.set_ylabel('loss over MHA (nats per token)')
  axis.set_title('Loss over MHA trained as long', fontsize=10)
  axis.legend(fontsize=8, frameon=False)
  axis.margins(y=0.12)
  axis.spines[['top', 'right']].set_visible(False)
