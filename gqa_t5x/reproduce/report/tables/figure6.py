"""Figure 6: time per sample against key/value heads."""

import pathlib

from gqa_t5x.analysis import palette
from gqa_t5x.reproduce.experiments import paper
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.report import figures
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.report.figures import Series
from gqa_t5x.reproduce.results.reader import Reader, measured
from gqa_t5x.reproduce.results.rows import Row


def write(doc: Document, found: Reader, plan: Planner, folder: pathlib.Path) -> None:
  """Adds time per sample against key/value heads.

  Args:
    doc: the report.
    found: reads results.
    plan: of a scale.
    folder: where figures go.
  """
  timing = plan.experiment.heads
  path = plan.timing('figure6', timing).result
  if plan.experiment.public:
    doc.text(f'The paper: {paper.FIGURE6}')
  rows = found.rows(path, 'decode_benchmark', size=timing.size)
  by_heads = {row['num_kv_heads']: row for row in rows}
  table = []
  for heads in timing.num_kv_heads:
    row = by_heads.get(heads)
    theirs = (
      paper.FIGURE6_MHA_SECONDS if heads == 64 and plan.experiment.public else None
    )
    cells = [_number(doc, row, 'seconds_per_sample', 3, theirs)]
    cells += [_number(doc, row, 'ms_per_step', 1)]
    text = f'about {theirs:g}' if theirs else 'a drawing'
    table.append([str(heads), *([text] if plan.experiment.public else []), *cells])
  paper_head = ['paper, s/sample'] if plan.experiment.public else []
  doc.table(['key/value heads', *paper_head, 's/sample', 'ms/step'], table)
  if not rows:
    return
  name = f'figure6_{plan.experiment.name}.png'
  heads = sorted(by_heads)
  values = [by_heads[k]['seconds_per_sample'] for k in heads]
  decode = [
    row['ms_per_step'] / 1e3 * row['output_length'] / row['batch_size']
    for row in (by_heads[k] for k in heads)
  ]
  series = [
    Series('with the encoder', heads, values, palette.BLUE, 'o', line=True),
    Series('decoder alone', heads, decode, palette.VERMILION, 's', line=True),
  ]
  label, unit = 'key/value heads', 'time per sample (s)'
  options = {'x_ticks': heads, 'log': 'x', 'from_zero': True}
  figures.draw(folder / name, series, label, unit, **options)
  row = rows[0]
  doc.figure(
    name,
    f'Figure 6: T5.1.1-{row["size"]}, {row["dtype"]}, batch {row["batch_size"]}, input'
    f' {row["input_length"]}, output {row["output_length"]}, on {row["device"]}'
    f' ({row["source"]}).',
  )


def _number(doc: Document, row: Row | None, key: str, digits: int, theirs=None) -> str:
  if row is None:
    return doc.not_run()
  return doc.number(measured(row, row[key]), digits, theirs)
