"""Arithmetic intensity: why key/value heads matter."""

import pathlib

from gqa_t5x.reproduce.experiments import targets
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.report import figures
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.report.figures import Series
from gqa_t5x.reproduce.results import intensity
from gqa_t5x.reproduce.results.reader import Reader, measured


def write(doc: Document, found: Reader, plan: Planner, folder: pathlib.Path) -> None:
  """Adds the figure of arithmetic intensity.

  Args:
    doc: the report.
    found: reads results.
    plan: of the local scale.
    folder: where figures go.
  """
  path = targets.intensity_file(plan.output_dir)
  rows = found.rows(path, 'intensity', source='analytic')
  if not rows:
    doc.text(f'{doc.not_run().capitalize()}.')
    return
  names = dict(zip(intensity.HEADS, ('MHA', 'GQA-8', 'MQA'), strict=True))
  batch = intensity.BATCHES[-2]
  series = []
  for heads, name in names.items():
    for batch_size, hollow in ((batch, False), (8, True)):
      points = {
        row['input_length']: row['intensity']
        for row in rows
        if (row['num_kv_heads'], row['batch_size']) == (heads, batch_size)
      }
      label, style = f'{name}, batch {batch_size}', figures.style(name)
      x, y = list(points), list(points.values())
      series.append(Series(label, x, y, *style, hollow=hollow, line=True))
  options = {'x_ticks': intensity.LENGTHS, 'log': 'xy'}
  unit = 'multiply-adds per number read'
  figures.draw(folder / 'intensity.png', series, 'length (tokens)', unit, **options)
  table = []
  for heads, name in names.items():
    for batch_size in intensity.BATCHES:
      cells = [
        doc.number(measured(row, row['intensity']), 1)
        for row in rows
        if (row['num_kv_heads'], row['batch_size']) == (heads, batch_size)
      ]
      table.append([f'{name}, batch {batch_size}', *cells])
  doc.figure(
    'intensity.png',
    "Arithmetic intensity of a decode step of T5-XXL's attention, by Shazeer's"
    ' formulas (analytic): n g/(d h) + 1/b, inverted.',
  )
  doc.table(['model', *(f'length {n}' for n in intensity.LENGTHS)], table)
