"""Conversion against training: what it costs, and what uptraining wins back."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments import targets, trainings
from gqa_t5x.reproduce.experiments.models import MEAN, MHA, SVD, SVD_BY_WEIGHTS
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.results.rows import Row
from gqa_t5x.reproduce.studies.heads import LATENT, Variant
from gqa_t5x.reproduce.studies.training_study import NUM_KV_HEADS, UPTRAINED, VARIANTS

STYLES = {
  Variant(MEAN): figures.METHODS['mean'],
  Variant(SVD_BY_WEIGHTS): (figures.GREEN, 'v'),
  Variant(SVD): figures.METHODS['svd'],
  LATENT: (figures.BLACK, 'o'),
}
SIDES = ('key', 'value')
# (variant, cache of so many heads, alpha) -> loss over MHA's; None if it was not run.
Cost = Callable[[Variant, int, float], float | None]


def write(part: Part) -> None:
  """Adds the tables and the figure."""
  path = targets.training_file(part.plan.output_dir)
  rows, worth, spectra = (
    part.found.rows(path, kind, source='measured')
    for kind in ('training', 'training_worth', 'training_spectrum')
  )
  if not rows or not worth or not spectra:
    part.doc.text(f'{part.doc.not_run().capitalize()}.')
    return
  part.doc.text(_conditions(rows))
  models = list(dict.fromkeys(map(model_of, rows)))
  _add_models(part, models, rows, worth)
  for K in NUM_KV_HEADS:
    _add_losses(part, models, rows, K)
  _add_uptraining(part, models, rows)
  _add_spectra(part, models, spectra)
  _draw(part, models, rows)


def _conditions(rows: Sequence[Row]) -> str:
  row = rows[0]
  return (
    f'One size ({row["size"]}), pre-trained in several ways, converted at the steps'
    ' given. Excess loss: cross-entropy in nats per target token over that of the model'
    f' before it was converted, on the same {row["validation_batches"]} batches of'
    f' {row["batch_size"]} packed rows. Statistics are of'
    f' {trainings.CALIBRATION_BATCHES} batches of the training split. Latent: all heads'
    ' read one shared head, with as many numbers as the others have together.'
  )


def model_of(row: Row) -> tuple[str, int]:
  """The pre-training and its steps."""
  return row['training'], row['pretrain_steps']


def name_of(model: tuple[str, int]) -> str:
  """What a reader calls it."""
  return f'{model[0]}, {model[1]:,}'


def _find(rows: Sequence[Row], model: tuple[str, int], **more: Any) -> Row | None:
  """The row of a model with these values; None if there is none."""
  wanted = dict(zip(('training', 'pretrain_steps'), model, strict=True)) | more
  return next((row for row in rows if row | wanted == row), None)


def costs(rows: Sequence[Row], model: tuple[str, int]) -> Cost:
  """What conversion costs a model: excess loss over that of MHA trained as long."""

  def cost(variant: Variant, K: int, alpha: float) -> float | None:
    row = _find(rows, model, variant=variant.title, cache_heads=K, alpha=alpha)
    mha = _find(rows, model, variant=Variant(MHA).title, alpha=alpha)
    return row and mha and row['excess_loss'] - mha['excess_loss']

  return cost


def _excess(part: Part, row: Row | None, over: float = 0.0) -> str:
  return '-' if row is None else part.number(row, row['excess_loss'] - over, 3)


def _add_models(part: Part, models, rows, worth) -> None:
  """What the models lose, and what attention is worth to them."""
  table = []
  for model in models:
    mha = _find(rows, model, variant=Variant(MHA).title, uptrain_steps=0)
    cells = [part.number(mha, mha['validation_loss'], 3)]
    cells += [_excess(part, _find(worth, model, zeroed=k)) for k in ('self', 'cross')]
    table.append([name_of(model), *cells])
  part.doc.text('What attention of the decoder is worth: the loss without it.')
  head = ['pre-training, steps', 'loss', 'excess without self-', 'without cross-']
  part.doc.table(head, table)


def _add_losses(part: Part, models, rows, K: int) -> None:
  """Excess loss right after conversion, by method and model."""
  table = []
  for variant in VARIANTS:
    found = [
      _find(rows, m, variant=variant.title, cache_heads=K, uptrain_steps=0)
      for m in models
    ]
    if any(found):
      table.append([variant.title, *(_excess(part, row) for row in found)])
  part.doc.text(f'Excess loss right after conversion, cache of {K} of 8 heads:')
  part.doc.table(['by', *map(name_of, models)], table)


def _add_uptraining(part: Part, models, rows) -> None:
  """Loss over MHA that was trained on as long."""
  alphas = (0.0, *trainings.UPTRAINED)
  table = []
  for model in models:
    mha = [
      _find(rows, model, variant=Variant(MHA).title, uptrain_steps=steps)
      for steps in (round(model[1] * alpha) for alpha in alphas)
    ]
    for K in NUM_KV_HEADS:
      for variant in UPTRAINED:
        found = [
          _find(
            rows,
            model,
            variant=variant.title,
            cache_heads=K,
            uptrain_steps=row['uptrain_steps'],
          )
          for row in mha
        ]
        if any(found):
          cells = (
            _excess(part, row, over['excess_loss'])
            for row, over in zip(found, mha, strict=True)
          )
          table.append([name_of(model), str(K), variant.title, *cells])
  part.doc.text('Loss over that of MHA trained on for as many steps:')
  times = (f'after {alpha:.0%}' if alpha else 'step 0' for alpha in alphas)
  part.doc.table(['pre-training, steps', 'K', 'by', *times], table, left=(0, 2))


def _add_spectra(part: Part, models, spectra) -> None:
  """Dropped share of the spectrum, mean over modules, layers and groups."""
  for side in SIDES:
    found: dict[tuple, dict[tuple, list[float]]] = {}
    for row in spectra:
      if row['side'] == side:
        key = row['statistics'], 'kv_head_dim' in row, row['cache_heads']
        of_model = found.setdefault(key, {}).setdefault(model_of(row), [])
        of_model += row['dropped_share']
    table = [
      [
        f'{"latent, " * latent}{used}',
        str(K),
        *(part.number(spectra[0], statistics.fmean(means[m]), 3) for m in models),
      ]
      for (used, latent, K), means in sorted(found.items(), reverse=True)
    ]
    part.doc.text(f'Share of the {side}s that does not fit into the cache:')
    part.doc.table(['statistics', 'K', *map(name_of, models)], table)


def _draw(part: Part, models, rows: Sequence[Row]) -> None:
  """Excess loss by optimizer, task and steps."""
  name = 'training.png'
  with figures.figure(part.path(name), 11, 3.8) as fig:
    axes = fig.subplots(1, len(NUM_KV_HEADS), sharey=True)
    for axis, K in zip(axes, NUM_KV_HEADS, strict=True):
      figures.plot(axis, _series(rows, models, K))
      axis.set_xticks(range(len(models)), [f'{t}\n{s:,}' for t, s in models])
      axis.tick_params(axis='x', labelsize=7)
      axis.set_yscale('symlog', linthresh=0.001)
      title = f'cache of {K} of 8 heads'
      ylabel = 'excess loss, nats' if axis is axes[0] else ''
      figures.tidy(axis, 'y', title, ylabel=ylabel)
    lines, labels = axes[0].get_legend_handles_labels()
    fig.legend(lines, labels, loc='outside lower center', ncols=4, fontsize=8)
  part.doc.figure(
    name,
    'Excess loss right after conversion, by optimizer and steps of pre-training.'
    ' Measured.',
  )


def _series(rows, models, K: int) -> list[figures.Series]:
  series = []
  for variant, style in STYLES.items():
    points = {}
    for x, model in enumerate(models):
      row = _find(rows, model, variant=variant.title, cache_heads=K, uptrain_steps=0)
      if row is not None:
        points[x] = row['excess_loss']
    if points:
      drawn = variant.title, list(points), list(points.values())
      series.append(figures.Series(*drawn, *style, hollow=variant.latent, line=True))
  return series
