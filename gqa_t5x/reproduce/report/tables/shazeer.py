"""Shazeer's tables: translation, its times and its scores."""

import pathlib

from gqa_t5x.analysis.costs import formulas
from gqa_t5x.model import network
from gqa_t5x.reproduce.experiments import paper, targets
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.results.reader import Reader, measured
from gqa_t5x.reproduce.results.rows import Row


def write(doc: Document, found: Reader, plan: Planner, folder: pathlib.Path) -> None:
  """Adds Shazeer's table: microseconds per output token of encoder and decoder.

  Args:
    doc: the report.
    found: reads results.
    plan: of a scale.
    folder: not used: there is no figure.
  """
  del folder
  head = ['model', 'F', 'parameters', 'beams', 'paper: encoder + decoder, µs/token']
  table = []
  for name, facts in paper.SHAZEER.items():
    cfg = network.config(facts['size'])
    count = f'{sum(formulas.parameters(cfg).values()):,}'
    path = targets.shazeer_timing(plan, name).result
    rows = found.rows(path, 'decode_benchmark', size=facts['size'])
    for beams, (encoder, decoder) in facts['infer_us'].items():
      row = next((row for row in rows if row['num_beams'] == beams), None)
      cells = [name, str(cfg.mlp_dim), count, str(beams), f'{encoder:g} + {decoder:g}']
      table.append([*cells, *_our_times(doc, row)])
  doc.table([*head, 'ours: encoder', 'ours: decoder'], table)
  doc.text(
    'Time over all output tokens of a batch. The paper: TPUv2, length 128. Ours: '
    + _setting(plan)
    + ' Parameters are counted by formula (analytic); both models have as many.'
  )
  if plan.experiment.public:
    _write_bleu(doc, found, plan)


def _our_times(doc: Document, row: Row | None) -> list[str]:
  if row is None:
    return [doc.not_run(), doc.not_run()]
  decoder = 1e3 * row['ms_per_step'] / row['batch_size']
  encoder = 1e3 * row['encode_ms'] / row['batch_size'] / row['output_length']
  return [doc.number(measured(row, value), 1) for value in (encoder, decoder)]


def _setting(plan: Planner) -> str:
  timing = plan.experiment.shazeer
  return (
    f'{timing.dtype}, batch {timing.batch_size}, input {timing.input_length}, output'
    f' {timing.output_length}.'
  )


def _write_bleu(doc: Document, found: Reader, plan: Planner) -> None:
  rows = []
  for name, facts in paper.SHAZEER.items():
    for beams, theirs in facts['bleu_test'].items():
      number = found.translation(plan, facts['size'], beams)
      rows.append([name, str(beams), f'{theirs}', doc.number(number, 1, theirs)])
  doc.table(['model', 'beams', 'paper: BLEU, test set', 'ours'], rows)
