"""Figure 5: how long to uptrain."""

import pathlib

from gqa_t5x.reproduce.experiments import paper, targets
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.report import figures
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.report.figures import Series
from gqa_t5x.reproduce.report.tables.figure4 import average_score
from gqa_t5x.reproduce.results.reader import Reader


def write(doc: Document, found: Reader, plan: Planner, folder: pathlib.Path) -> None:
  """Adds our scores against alpha; the paper's are a drawing without numbers.

  Args:
    doc: the report.
    found: reads results.
    plan: of the papers' scale.
    folder: where figures go.
  """
  doc.text(f'The paper: {paper.FIGURE5}')
  rows, series = [], []
  for base, alphas in plan.experiment.alphas.items():
    numbers = {
      alpha: average_score(found, plan, targets.at(base, alpha)) for alpha in alphas
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
