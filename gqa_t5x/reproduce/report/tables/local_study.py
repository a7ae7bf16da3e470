"""Figures 4 and 5 on one machine: the quick study of conversion."""

from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments import models, paper
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.studies import QUICK
from gqa_t5x.reproduce.report import conversion_figures
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.results.losses import Losses
from gqa_t5x.reproduce.results.reader import Measured


def write(part: Part) -> None:
  """Adds figures 4 and 5 of the local study of conversion."""
  doc, losses = part.doc, read_losses(part)
  if losses is None:
    doc.text(f'Figures 4 and 5: {doc.not_run()}.')
    return
  doc.text(
    f'Loss over that of the MHA model as pre-trained ({losses.base:.3f} nats per token)'
    " on the validation split of `pydocs_span_corruption`: the shape of the paper's"
    " figures 4 and 5, with a loss for a score. svd is this project's own method."
  )
  alphas = [f'alpha = {alpha:g}' for alpha in paper.ALPHAS]
  for K in losses.num_kv_heads:
    methods = (*models.PAPER_METHODS, models.SVD)
    rows = [[m.title, *_cells(doc, losses, m, K)] for m in methods]
    doc.table(
      [f'{losses.num_heads} heads to {models.heads_label(K)} by', *alphas], rows
    )
  mha = _cells(doc, losses, models.MHA, losses.num_heads)
  doc.table(['not converted', *alphas], [['MHA, trained on', *mha]])
  conversion_figures.draw_losses(losses, part.path('conversion.png'))
  doc.figure('conversion.png', 'Loss by method of conversion, and while uptraining.')
  _add_figure5(part, losses)


def read_losses(part: Part) -> Losses | None:
  """Returns the losses of the study that the local scale shares; None if not run."""
  path = Planner(QUICK, str(part.plan.output_dir)).rows
  rows = part.found.rows(path, 'conversion', source='measured')
  return Losses(rows) if rows else None


def _cells(doc: Document, losses: Losses, method: models.Method, K: int) -> list[str]:
  seeds = [tuple(losses.of(method, K, alpha).values()) for alpha in paper.ALPHAS]
  command = (losses.rows[0]['command'],)
  numbers = [Measured(found, 'measured', command) if found else None for found in seeds]
  return [doc.number(number, 3) for number in numbers]


def _add_figure5(part: Part, losses: Losses) -> None:
  series = []
  converted = [(models.heads_label(K), models.MEAN, K) for K in losses.num_kv_heads]
  for name, *model in [('MHA', models.MHA, losses.num_heads), *converted]:
    alphas = losses.alphas(*model)
    values = [losses.mean(*model, alpha) + losses.base for alpha in alphas]
    percent, style = [100 * alpha for alpha in alphas], figures.heads_style(name)
    series.append(figures.Series(name, percent, values, *style, line=True))
  part.figure(
    'figure5_local.png',
    'Figure 5 at this scale: loss against alpha, converted by mean, as in the paper.',
    series,
    'uptraining, % of pre-training',
    'validation loss (nats per token)',
  )
