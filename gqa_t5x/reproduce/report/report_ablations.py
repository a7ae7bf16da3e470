"""Figures 4 and 5: how to convert, and how long to uptrain."""

import pathlib

from gqa_t5x.reproduce.experiments import conversion, paper, targets
from gqa_t5x.reproduce.experiments.arms import title
from gqa_t5x.reproduce.experiments.lab import STUDY, Lab
from gqa_t5x.reproduce.experiments.models import Model
from gqa_t5x.reproduce.report import conversion_figures as study_figures
from gqa_t5x.reproduce.report import figures
from gqa_t5x.reproduce.report.conversion_report import MEAN, MHA, Losses
from gqa_t5x.reproduce.report.document import NOT_RUN, Document
from gqa_t5x.reproduce.report.figures import Series
from gqa_t5x.reproduce.results import results
from gqa_t5x.reproduce.results.results import Measured, Results

METHOD_COLORS = {
  'mean': (figures.BLUE, 'o'),
  'first': (figures.ORANGE, 's'),
  'random': (figures.PINK, '^'),
  'svd': (figures.VERMILION, 'D'),
}


def write_figure4(
  doc: Document, found: Results, lab: Lab, folder: pathlib.Path
) -> None:
  """Adds the paper's figure 4 beside our scores of the same models.

  Args:
    doc: the report.
    found: reads results.
    lab: of the papers' scale.
    folder: where figures go.
  """
  rows, series, wanted = [], [], Lab(lab.scale, str(lab.output_dir))
  for x, model in enumerate(lab.scale.ablation):
    ours = _average(found, lab, model, wanted)
    color, marker = METHOD_COLORS[model.method]
    theirs = paper.FIGURE4.get(model.method)
    text = f'{theirs[0]} to {theirs[1]}' if theirs else 'not in the paper'
    middle = sum(theirs) / 2 if theirs else None
    rows.append([model.method, text, doc.number(ours, 1, middle)])
    if theirs:
      label = f'{model.method}, paper'
      series.append(Series(label, [x], [middle], color, marker, hollow=True))
    if ours:
      series.append(Series(f'{model.method}, ours', [x], [ours.mean], color, marker))
  doc.table(['T5-Large to MQA by', 'paper, read off the chart', 'ours'], rows)
  names = [model.method for model in lab.scale.ablation]
  figures.draw(
    folder / 'figure4_paper.png',
    series,
    'method of conversion',
    'average score',
    x_ticks=range(len(names)),
    x_names=names,
  )
  caption = (
    f'Figure 4: T5-Large converted to MQA, alpha = {paper.ALPHA:g}; average of'
    ' CNN/Daily Mail, Multi-News, TriviaQA.'
  )
  doc.figure('figure4_paper.png', caption)
  doc.commands(_left(wanted))


def write_figure5(
  doc: Document, found: Results, lab: Lab, folder: pathlib.Path
) -> None:
  """Adds our scores against alpha; the paper's are a drawing without numbers.

  Args:
    doc: the report.
    found: reads results.
    lab: of the papers' scale.
    folder: where figures go.
  """
  doc.text(f'The paper: {paper.FIGURE5}')
  rows, series, wanted = [], [], Lab(lab.scale, str(lab.output_dir))
  for base, alphas in lab.scale.alphas.items():
    wanted.checkpoint(targets.at(base, max(alphas)))
    numbers = {
      alpha: _average(found, lab, targets.at(base, alpha), wanted) for alpha in alphas
    }
    cells = [
      doc.number(numbers[alpha], 1) if alpha in numbers else ''
      for alpha in paper.ALPHAS
    ]
    rows.append([base.label, *cells])
    points = {100 * a: n.mean for a, n in numbers.items() if n}
    if points:
      style = figures.style(base.label)
      x, y = list(points), list(points.values())
      series.append(Series(base.label, x, y, *style, line=True))
  doc.table(['model', *(f'alpha = {alpha:g}' for alpha in paper.ALPHAS)], rows)
  if series:
    label = 'uptraining, % of pre-training'
    figures.draw(folder / 'figure5_paper.png', series, label, 'average score')
    doc.figure('figure5_paper.png', 'Figure 5: T5-XXL, average score against alpha.')
  doc.commands(_left(wanted))


def _average(found: Results, lab: Lab, model: Model, wanted: Lab) -> Measured | None:
  """The mean over the tasks; adds to `wanted` what it lacks."""
  scores = []
  for task in lab.scale.ablation_tasks:
    scores.append(found.score(lab, model, task))
    if scores[-1] is None:
      wanted.finetuned(model, task, 1)
  return results.mean(scores)


def _left(wanted: Lab) -> list[str]:
  return [str(stage) for stage in wanted.stages if not stage.result.exists()]


# --- On this machine ------------------------------------------------------------


def write_study(doc: Document, found: Results, lab: Lab, folder: pathlib.Path) -> None:
  """Adds figures 4 and 5 of the local study of conversion.

  Args:
    doc: the report.
    found: reads results.
    lab: of the local scale.
    folder: where figures go.
  """
  paths = conversion.Paths(lab.output_dir, STUDY)
  rows = found.rows(paths.rows, 'conversion', source='measured')
  if not rows:
    doc.text(f'Figures 4 and 5: {NOT_RUN}.')
    doc.commands([str(s) for s in conversion.plan(paths.output_dir, STUDY)])
    return
  losses = Losses(rows)
  doc.text(
    f'Loss over that of the MHA model as pre-trained ({losses.base:.3f} nats per token)'
    " on the validation split of `pydocs_span_corruption`: the shape of the paper's"
    " figures 4 and 5, with a loss for a score. svd is this project's own method."
  )
  command = (rows[0]['command'],)
  for heads in losses.num_kv_heads:
    name = 'MQA' if heads == 1 else f'GQA-{heads}'
    doc.table(
      [f'{losses.num_heads} heads to {name} by', *_alpha_heads(losses)],
      [
        [title(*label), *_cells(doc, losses, label, heads, command)]
        for label in conversion.STUDIES[STUDY].methods
      ],
    )
  mha = _cells(doc, losses, MHA, losses.num_heads, command)
  doc.table(['not converted', *_alpha_heads(losses)], [['MHA, trained on', *mha]])
  study_figures.draw_losses(losses, folder / 'conversion.png')
  doc.figure('conversion.png', 'Loss by method of conversion, and while uptraining.')
  _draw_figure5(losses, folder / 'figure5_local.png')
  doc.figure(
    'figure5_local.png',
    'Figure 5 at this scale: loss against alpha, converted by mean, as in the paper.',
  )


def _alpha_heads(losses: Losses) -> list[str]:
  return [f'alpha = {alpha:g}' for alpha in paper.ALPHAS]


def _cells(doc: Document, losses: Losses, label, heads: int, command) -> list[str]:
  cells = []
  for alpha in paper.ALPHAS:
    values = tuple(losses.of(label, heads, alpha).values())
    number = Measured(values, 'measured', command) if values else None
    cells.append(doc.number(number, 3))
  return cells


def _draw_figure5(losses: Losses, path: pathlib.Path) -> None:
  series = []
  models = [('MHA', MHA, losses.num_heads)]
  for heads in losses.num_kv_heads:
    models.append(('MQA' if heads == 1 else f'GQA-{heads}', MEAN, heads))
  for name, label, heads in models:
    alphas = losses.alphas(label, heads)
    values = [losses.mean(label, heads, alpha) + losses.base for alpha in alphas]
    percent = [100 * alpha for alpha in alphas]
    series.append(Series(name, percent, values, *figures.style(name), line=True))
  label = 'uptraining, % of pre-training'
  figures.draw(path, series, label, 'validation loss (nats per token)')
