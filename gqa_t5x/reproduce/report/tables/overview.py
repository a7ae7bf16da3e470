"""The project's point at a glance: what fewer heads save, and what they cost."""

from typing import Any

from gqa_t5x.analysis import palette
from gqa_t5x.reproduce.experiments.models import MEAN, SVD, heads_label
from gqa_t5x.reproduce.report import figures
from gqa_t5x.reproduce.report.figures import plt
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.report.tables.local_study import read_losses
from gqa_t5x.reproduce.results.losses import Losses
from gqa_t5x.reproduce.results.rows import Row

BARS = (
  ('converted by mean', MEAN, 0.0, palette.BLUE, ''),
  ('by mean, uptrained 5%', MEAN, 0.05, palette.BLUE, '///'),
  ('converted by svd', SVD, 0.0, palette.VERMILION, ''),
  ('by svd, uptrained 5%', SVD, 0.05, palette.VERMILION, '///'),
)


def write(part: Part) -> None:
  """Adds the figure, once both halves are there."""
  timing = part.scale.heads
  path = part.plan.timing('figure6', timing).result
  times = part.found.rows(path, 'decode_benchmark', size=timing.size)
  losses = read_losses(part)
  if not times or losses is None:
    return
  fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
  _draw_times(left, times)
  _draw_losses(right, losses)
  figures.save(fig, part.path('overview.png'))
  first = times[0]
  part.doc.figure(
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
    range(len(names)), values, color=palette.SKY, edgecolor='black', linewidth=0.6
  )
  axis.bar_label(bars, fmt='%.0f', fontsize=9)
  axis.set_xticks(range(len(names)), names)
  axis.set_xlabel(f'key/value heads of {names[0]} query heads')
  axis.set_ylabel('decode step (ms)')
  axis.set_title('Time', fontsize=10)
  figures.tidy(axis)


def _draw_losses(axis: Any, losses: Losses) -> None:
  """Loss over MHA trained as long, for each number of heads."""
  width = 0.2
  for i, (label, method, alpha, color, hatch) in enumerate(BARS):
    values = {
      x + (i - 1.5) * width: losses.over_mha(method, heads, alpha)
      for x, heads in enumerate(losses.num_kv_heads)
    }
    values = {x: value for x, value in values.items() if value is not None}
    bars = axis.bar(
      list(values),
      list(values.values()),
      width,
      color='white' if hatch else color,
      edgecolor=color,
      hatch=hatch,
      label=label,
    )
    axis.bar_label(bars, fmt='%.3f', fontsize=8)
  names = [heads_label(heads) for heads in losses.num_kv_heads]
  axis.set_xticks(range(len(names)), names)
  axis.set_ylabel('loss over MHA (nats per token)')
  axis.set_title('Loss over MHA trained as long', fontsize=10)
  axis.legend(fontsize=8, frameon=False)
  axis.margins(y=0.12)
  figures.tidy(axis)
