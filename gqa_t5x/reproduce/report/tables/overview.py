"""The project's point at a glance: what fewer heads save, and what they cost."""

from typing import Any

from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments.models import MEAN, SVD, heads_label
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.report.tables.local_study import read_losses
from gqa_t5x.reproduce.results.losses import Losses

BARS = (
  ('converted by mean', MEAN, 0.0, figures.BLUE, ''),
  ('by mean, uptrained 5%', MEAN, 0.05, figures.BLUE, '///'),
  ('converted by svd', SVD, 0.0, figures.VERMILION, ''),
  ('by svd, uptrained 5%', SVD, 0.05, figures.VERMILION, '///'),
)


def write(part: Part) -> None:
  """Adds the figure, once both halves are there."""
  times, losses = part.decode_rows('figure6', part.scale.heads), read_losses(part)
  if not times or losses is None:
    return
  first, name = times[0], 'overview.png'
  times = sorted(times, key=lambda row: -row['num_kv_heads'])
  values = {str(row['num_kv_heads']): row['ms_per_step'] for row in times}
  with figures.figure(part.path(name), 9, 3.6) as fig:
    left, right = fig.subplots(1, 2)
    figures.bars(left, values, digits=0)
    label = f'key/value heads of {next(iter(values))} query heads'
    figures.tidy(left, title='Time', xlabel=label, ylabel='decode step (ms)')
    _draw_losses(right, losses)
  part.doc.figure(
    name,
    f'Fewer key/value heads decode faster (T5.1.1-{first["size"]}, input'
    f' {first["input_length"]}, batch {first["batch_size"]}, {first["device"]}),'
    ' and cost a tiny T5.1.1 next to nothing if it is converted by svd'
    f' ({losses.num_heads} heads, trained briefly; heads that were trained for long'
    ' lose more, see part 2). All measured.',
  )


def _draw_losses(axis: Any, losses: Losses) -> None:
  """Loss over MHA trained as long, for each number of heads."""
  width = 0.2
  for i, (label, method, alpha, color, hatch) in enumerate(BARS):
    values = {
      x + (i - 1.5) * width: losses.over_mha(method, num_kv_heads, alpha)
      for x, num_kv_heads in enumerate(losses.num_kv_heads)
    }
    values = {x: value for x, value in values.items() if value is not None}
    style = {'color': 'white' if hatch else color, 'edgecolor': color, 'hatch': hatch}
    bars = axis.bar(list(values), list(values.values()), width, label=label, **style)
    axis.bar_label(bars, fmt='%.3f', fontsize=8)
  names = [heads_label(num_kv_heads) for num_kv_heads in losses.num_kv_heads]
  axis.set_xticks(range(len(names)), names)
  axis.margins(y=0.12)
  title, label = 'Loss over MHA trained as long', 'loss over MHA (nats per token)'
  figures.tidy(axis, title=title, ylabel=label)
  figures.legend(axis)
