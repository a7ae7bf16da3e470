"""Figures 4 and 5, the ablations of the paper: how to convert, how long to uptrain."""

from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments import paper, targets
from gqa_t5x.reproduce.experiments.models import Model
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.results import reader
from gqa_t5x.reproduce.results.reader import Measured


def write_figure4(part: Part) -> None:
  """Adds the paper's figure 4 and our scores of the same models."""
  rows, series, names = [], [], []
  for model in part.scale.ablation:
    method = model.method.name
    ours, theirs = average_score(part, model), paper.FIGURE4.get(method)
    text = f'{theirs[0]} to {theirs[1]}' if theirs else paper.NOT_THERE
    middle = sum(theirs) / 2 if theirs else None
    rows.append([method, text, part.doc.number(ours, 1, middle)])
    x, style = [len(names)], figures.METHODS[method]
    for whose, value in (('paper', middle), ('ours', ours and ours.mean)):
      if value is not None:
        label = f'{method}, {whose}'
        series.append(
          figures.Series(label, x, [value], *style, hollow=whose == 'paper')
        )
    if theirs or ours:
      names.append(method)
  head = ['T5-Large to MQA by', 'paper, read off the chart', 'ours']
  part.doc.table(head, rows)
  part.figure(
    'figure4_paper.png',
    f'Figure 4: T5-Large converted to MQA, alpha = {paper.ALPHA:g}; average of'
    ' CNN/Daily Mail, Multi-News, TriviaQA.',
    series,
    'method of conversion',
    'average score',
    x_ticks=range(len(names)),
    x_names=names,
  )


def write_figure5(part: Part) -> None:
  """Adds our scores against alpha; the paper's are a drawing without numbers."""
  part.doc.text(f'The paper: {paper.FIGURE5}')
  rows, series = [], []
  for base, alphas in part.scale.alphas.items():
    numbers = {a: average_score(part, targets.at(base, a)) for a in alphas}
    cells = [
      part.doc.number(numbers[alpha], 1) if alpha in numbers else ''
      for alpha in paper.ALPHAS
    ]
    rows.append([base.label, *cells])
    points = {100 * a: n.mean for a, n in numbers.items() if n}
    if points:
      style = figures.heads_style(base.label)
      x, y = list(points), list(points.values())
      series.append(figures.Series(base.label, x, y, *style, line=True))
  part.doc.table(['model', *(f'alpha = {alpha:g}' for alpha in paper.ALPHAS)], rows)
  part.figure(
    'figure5_paper.png',
    'Figure 5: T5-XXL, average score against alpha.',
    series,
    'uptraining, % of pre-training',
    'average score',
  )


def average_score(part: Part, model: Model) -> Measured | None:
  """Returns the mean over the tasks of figures 4 and 5; None unless all were run."""
  tasks = part.scale.ablation_tasks
  return reader.mean([part.found.score(part.plan, model, task) for task in tasks])
