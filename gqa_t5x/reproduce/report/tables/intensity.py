"""Arithmetic intensity: why key/value heads matter."""

from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments import targets
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.results.intensity import LENGTHS

NAMES = {64: 'MHA', 8: 'GQA-8', 1: 'MQA'}


def write(part: Part) -> None:
  """Adds the figure of arithmetic intensity, and its numbers."""
  path = targets.intensity_file(part.plan.output_dir)
  rows = part.found.rows(path, 'intensity', source='analytic')
  if not rows:
    part.doc.text(f'{part.doc.not_run().capitalize()}.')
    return
  found = {}
  for row in rows:
    label = f'{NAMES[row["num_kv_heads"]]}, batch {row["batch_size"]}'
    found.setdefault(label, []).append(row)
  series = [
    figures.Series(
      label,
      [row['input_length'] for row in found[label]],
      [row['intensity'] for row in found[label]],
      *figures.heads_style(name),
      hollow=batch == 8,
      line=True,
    )
    for name in NAMES.values()
    for batch in (128, 8)
    for label in [f'{name}, batch {batch}']
  ]
  table = [
    [label, *(part.number(row, row['intensity'], 1) for row in few)]
    for label, few in found.items()
  ]
  part.figure(
    'intensity.png',
    "Arithmetic intensity of a decode step of T5-XXL's attention, by Shazeer's"
    ' formulas (analytic): n g/(d h) + 1/b, inverted.',
    series,
    'length (tokens)',
    'multiply-adds per number read',
    x_ticks=LENGTHS,
    log='xy',
  )
  part.doc.table(['model', *(f'length {n}' for n in LENGTHS)], table)
