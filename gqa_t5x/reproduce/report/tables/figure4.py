"""Figure 4: how to convert."""

import pathlib

from gqa_t5x.analysis import palette
from gqa_t5x.reproduce.experiments import paper
from gqa_t5x.reproduce.experiments.models import Model
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.report import figures
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.report.figures import Series
from gqa_t5x.reproduce.results import reader
from gqa_t5x.reproduce.results.reader import Measured, Reader

STYLES = {
  'mean': (palette.BLUE, 'o'),
  'first': (palette.ORANGE, 's'),
  'random': (palette.PINK, '^'),
  'svd': (palette.VERMILION, 'D'),
}


def write(doc: Document, found: Reader, plan: Planner, folder: pathlib.Path) -> None:
  """Adds the paper's figure 4 and our scores of the same models.

  Args:
    doc: the report.
    found: reads results.
    plan: of the papers' scale.
    folder: where figures go.
  """
  rows, series, names = [], [], []
  for model in plan.experiment.ablation:
    ours = average_score(found, plan, model)
    color, marker = STYLES[model.method]
    theirs = paper.FIGURE4.get(model.method)
    text = f'{theirs[0]} to {theirs[1]}' if theirs else 'not in the paper'
    middle = sum(theirs) / 2 if theirs else None
    rows.append([model.method, text, doc.number(ours, 1, middle)])
    x = len(names)
    if theirs or ours:
      names.append(model.method)
    if theirs:
      label = f'{model.method}, paper'
      series.append(Series(label, [x], [middle], color, marker, hollow=True))
    if ours:
      series.append(Series(f'{model.method}, ours', [x], [ours.mean], color, marker))
  doc.table(['T5-Large to MQA by', 'paper, read off the chart', 'ours'], rows)
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


def average_score(found: Reader, plan: Planner, model: Model) -> Measured | None:
  """Returns the mean over the tasks of figures 4 and 5; None unless all were run."""
  tasks = plan.experiment.ablation_tasks
  return reader.mean([found.score(plan, model, task) for task in tasks])
