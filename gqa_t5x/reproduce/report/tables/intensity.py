"""Arithmetic intensity: why key/value heads matter."""

from gqa_t5x.reproduce.experiments import targets
from gqa_t5x.reproduce.report import figures
from gqa_t5x.reproduce.report.figures import Series
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.results import intensity


def write(part: Part) -> None:
  """Adds the figure of arithmetic intensity, and its numbers."""
  path = targets.intensity_file(part.plan.output_dir)
  rows = part.found.rows(path, 'intensity', source='analytic')
  if not rows:
    part.doc.text(f'{part.doc.not_run().capitalize()}.')
    return
  names = dict(zip(intensity.HEADS, ('MHA', 'GQA-8', 'MQA'), strict=True))
  found = {
    (heads, batch): [
      row for row in rows if (row['num_kv_heads'], row['batch_size']) == (heads, batch)
    ]
    for heads in names
    for batch in intensity.BATCHES
  }
  series = []
  for heads, name in names.items():
    for batch, hollow in ((intensity.BATCHES[-2], False), (8, True)):
      x = [row['input_length'] for row in found[heads, batch]]
      y = [row['intensity'] for row in found[heads, batch]]
      label, style = f'{name}, batch {batch}', figures.style(name)
      series.append(Series(label, x, y, *style, hollow=hollow, line=True))
  table = [
    [f'{names[heads]}, batch {batch}', *(part.number(r, 'intensity', 1) for r in few)]
    for (heads, batch), few in found.items()
  ]
  part.figure(
    'intensity.png',
    "Arithmetic intensity of a decode step of T5-XXL's attention, by Shazeer's"
    ' formulas (analytic): n g/(d h) + 1/b, inverted.',
    series,
    'length (tokens)',
    'multiply-adds per number read',
    x_ticks=intensity.LENGTHS,
    log='xy',
  )
  part.doc.table(['model', *(f'length {n}' for n in intensity.LENGTHS)], table)
