"""Figure 6, Shazeer's table of times, and arithmetic intensity."""

import pathlib

from gqa_t5x.analysis.costs import formulas
from gqa_t5x.model import network
from gqa_t5x.reproduce.experiments import paper, targets
from gqa_t5x.reproduce.experiments.lab import Lab
from gqa_t5x.reproduce.report import figures
from gqa_t5x.reproduce.report.document import NOT_RUN, Document
from gqa_t5x.reproduce.report.figures import Series
from gqa_t5x.reproduce.results import intensity
from gqa_t5x.reproduce.results.results import Measured, Results, Row


def write_figure6(
  doc: Document, found: Results, lab: Lab, folder: pathlib.Path
) -> None:
  """Adds time per sample against key/value heads.

  Args:
    doc: the report.
    found: reads results.
    lab: of a scale.
    folder: where figures go.
  """
  timing, path = lab.scale.heads, lab.rows('figure6')
  if lab.scale.public:
    doc.text(f'The paper: {paper.FIGURE6}')
  rows = found.rows(path, 'decode_benchmark', size=timing.size)
  by_heads = {row['num_kv_heads']: row for row in rows}
  table = []
  for heads in timing.num_kv_heads:
    row = by_heads.get(heads)
    theirs = paper.FIGURE6_MHA_SECONDS if heads == 64 and lab.scale.public else None
    cells = [_number(doc, row, 'seconds_per_sample', 3, theirs)]
    cells += [_number(doc, row, 'ms_per_step', 1)]
    text = f'about {theirs:g}' if theirs else 'a drawing'
    table.append([str(heads), *([text] if lab.scale.public else []), *cells])
  paper_head = ['paper, s/sample'] if lab.scale.public else []
  doc.table(['key/value heads', *paper_head, 's/sample', 'ms/step'], table)
  if not rows:
    lab.timed('figure6', timing)
    doc.commands([str(lab.stage(path))])
    return
  name = f'figure6_{lab.scale.name}.png'
  heads = sorted(by_heads)
  values = [by_heads[k]['seconds_per_sample'] for k in heads]
  decode = [
    row['ms_per_step'] / 1e3 * row['output_length'] / row['batch_size']
    for row in (by_heads[k] for k in heads)
  ]
  series = [
    Series('with the encoder', heads, values, figures.BLUE, 'o', line=True),
    Series('decoder alone', heads, decode, figures.VERMILION, 's', line=True),
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
    return NOT_RUN
  return doc.number(_measured(row, row[key]), digits, theirs)


def _measured(row: Row, value: float) -> Measured:
  return Measured((value,), row['source'], (row['command'],))


def write_shazeer(doc: Document, found: Results, lab: Lab) -> None:
  """Adds Shazeer's table: microseconds per output token of encoder and decoder.

  Args:
    doc: the report.
    found: reads results.
    lab: of a scale.
  """
  head = ['model', 'F', 'parameters', 'beams', 'paper: encoder + decoder, µs/token']
  table, wanted = [], Lab(lab.scale, str(lab.output_dir))
  for name, facts in paper.SHAZEER.items():
    cfg = network.config(facts['size'])
    count = f'{formulas.num_parameters(cfg):,}'
    rows_name = f'shazeer_{name.lower()}'
    rows = found.rows(lab.rows(rows_name), 'decode_benchmark', size=facts['size'])
    if not rows:
      wanted.timed(rows_name, targets.shazeer_timing(lab, facts['size']))
    for beams, (encoder, decoder) in facts['infer_us'].items():
      row = next((row for row in rows if row['num_beams'] == beams), None)
      cells = [name, str(cfg.mlp_dim), count, str(beams), f'{encoder:g} + {decoder:g}']
      table.append([*cells, *_our_times(doc, row)])
  doc.table([*head, 'ours: encoder', 'ours: decoder'], table)
  doc.text(
    'Time over all output tokens of a batch. The paper: TPUv2, length 128. Ours: '
    + _setting(lab)
    + ' Parameters are counted by formula (analytic); both models have as many.'
  )
  if lab.scale.public:
    _write_bleu(doc, found, lab, wanted)
  doc.commands([str(s) for s in wanted.stages if not s.result.exists()])


def _our_times(doc: Document, row: Row | None) -> list[str]:
  if row is None:
    return [NOT_RUN, NOT_RUN]
  decoder = 1e3 * row['ms_per_step'] / row['batch_size']
  encoder = 1e3 * row['encode_ms'] / row['batch_size'] / row['output_length']
  return [doc.number(_measured(row, value), 1) for value in (encoder, decoder)]


def _setting(lab: Lab) -> str:
  timing = lab.scale.shazeer
  return (
    f'{timing.dtype}, batch {timing.batch_size}, input {timing.input_length}, output'
    f' {timing.output_length}.'
  )


def _write_bleu(doc: Document, found: Results, lab: Lab, wanted: Lab) -> None:
  rows = []
  for name, facts in paper.SHAZEER.items():
    wanted.translated(facts['size'])
    for beams, theirs in facts['bleu_test'].items():
      number = found.translation(lab, facts['size'], beams)
      rows.append([name, str(beams), f'{theirs}', doc.number(number, 1, theirs)])
  doc.table(['model', 'beams', 'paper: BLEU, test set', 'ours'], rows)


def write_intensity(
  doc: Document, found: Results, lab: Lab, folder: pathlib.Path
) -> None:
  """Adds the figure of arithmetic intensity.

  Args:
    doc: the report.
    found: reads results.
    lab: of the local scale.
    folder: where figures go.
  """
  path = lab.output_dir / intensity.FILE
  rows = found.rows(path, 'intensity', source='analytic')
  if not rows:
    targets.intensity(lab)
    doc.text(f'{NOT_RUN.capitalize()}.')
    doc.commands([str(lab.stage(path))])
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
  command = (rows[0]['command'],)
  table = []
  for heads, name in names.items():
    for batch_size in intensity.BATCHES:
      cells = [
        doc.number(Measured((row['intensity'],), row['source'], command), 1)
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
