"""The project's point at a glance: what fewer heads save, and what they cost."""

from typing import Any

from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments import targets
from gqa_t5x.reproduce.experiments.models import MEAN, SVD, heads_label
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.report.tables import training
from gqa_t5x.reproduce.report.tables.local_study import read_losses
from gqa_t5x.reproduce.studies.heads import LATENT, Variant
from gqa_t5x.reproduce.studies.training_study import NUM_KV_HEADS

BARS = (
  ('converted by mean', Variant(MEAN), 0.0, figures.BLUE, ''),
  ('by mean, uptrained 5%', Variant(MEAN), 0.05, figures.BLUE, '///'),
  ('converted by svd', Variant(SVD), 0.0, figures.VERMILION, ''),
  ('by svd, uptrained 5%', Variant(SVD), 0.05, figures.VERMILION, '///'),
  ('latent form, by svd', LATENT, 0.0, figures.BLACK, ''),
  ('latent, uptrained 5%', LATENT, 0.05, figures.BLACK, '///'),
)


def write(part: Part) -> None:
  """Adds the figure, once both halves are there."""
  times, costs = part.decode_rows('figure6', part.scale.heads), _costs(part)
  if not times or costs is None:
    return
  first, name = times[0], 'overview.png'
  times = sorted(times, key=lambda row: -row['num_kv_heads'])
  values = {str(row['num_kv_heads']): row['ms_per_step'] for row in times}
  with figures.figure(part.path(name), 9, 3.6) as fig:
    left, right = fig.subplots(1, 2, width_ratios=(2, 3))
    figures.bars(left, values, digits=0)
    label = f'key/value heads of {next(iter(values))} query heads'
    figures.tidy(left, title='Time', xlabel=label, ylabel='decode step (ms)')
    _draw_costs(right, *costs[1:])
  part.doc.figure(
    name,
    f'Fewer key/value heads decode faster (T5.1.1-{first["size"]}, input'
    f' {first["input_length"]}, batch {first["batch_size"]}, {first["device"]}). What'
    f' they cost a tiny T5.1.1 of 8 heads, {costs[0]}. Latent: one wide head with the'
    ' same cache. All measured.',
  )


def _costs(part: Part) -> tuple[str, tuple[int, ...], training.Cost] | None:
  """What was converted, in words, to which K, and the costs; None if nothing was.

  Of the models of the study against training, it is the one to which svd costs most;
  without that study the model of the quick one, which costs less.
  """
  path = targets.training_file(part.plan.output_dir)
  rows = part.found.rows(path, 'training', source='measured')
  fewest = {'variant': Variant(SVD).title, 'cache_heads': min(NUM_KV_HEADS)}
  converted = [row for row in rows if row | fewest == row and not row['alpha']]
  if converted:
    model = training.model_of(max(converted, key=lambda row: row['excess_loss']))
    title = f'the one that lost most of all tried ({training.name_of(model)} steps)'
    return title, NUM_KV_HEADS, training.costs(rows, model)
  losses = read_losses(part)
  if losses is None:
    return None

  def cost(variant, K, alpha):
    return None if variant.latent else losses.over_mha(variant.method, K, alpha)

  return 'trained briefly', tuple(losses.num_kv_heads), cost


def _draw_costs(axis: Any, num_kv_heads: tuple[int, ...], cost: training.Cost) -> None:
  """Loss over MHA trained as long, for each number of heads."""
  width = 0.15
  for i, (label, variant, alpha, color, hatch) in enumerate(BARS):
    values = {
      x + (i - 2.5) * width: cost(variant, K, alpha) for x, K in enumerate(num_kv_heads)
    }
    values = {x: value for x, value in values.items() if value is not None}
    if values:
      style = {'color': 'white' if hatch else color, 'edgecolor': color, 'hatch': hatch}
      bars = axis.bar(list(values), list(values.values()), width, label=label, **style)
      axis.bar_label(bars, fmt='%.2f', fontsize=7)
  names = [heads_label(K) for K in num_kv_heads]
  axis.set_xticks(range(len(names)), names)
  axis.margins(y=0.12)
  title, label = 'Loss over MHA trained as long', 'loss over MHA (nats per token)'
  figures.tidy(axis, title=title, ylabel=label)
  figures.legend(axis)
