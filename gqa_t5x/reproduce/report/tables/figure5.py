"""Figure 5: how long to uptrain."""

from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments import paper, targets
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.report.tables.figure4 import average_score


def write(part: Part) -> None:
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
