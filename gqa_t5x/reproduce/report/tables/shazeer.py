"""Shazeer's tables: translation, its times and its scores."""

from gqa_t5x.analysis.costs import formulas
from gqa_t5x.model import network
from gqa_t5x.reproduce.experiments import paper, targets
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.results.rows import Row


def write(part: Part) -> None:
  """Adds microseconds per output token of encoder and decoder, and BLEU."""
  head = ['model', 'F', 'parameters', 'beams', 'paper: encoder + decoder, µs/token']
  table = []
  for name, facts in paper.SHAZEER.items():
    cfg = network.config(facts['size'])
    count = f'{formulas.num_parameters(cfg):,}'
    path = targets.shazeer_timing(part.plan, name).result
    rows = part.found.rows(path, 'decode_benchmark', size=facts['size'])
    for beams, (encoder, decoder) in facts['infer_us'].items():
      row = next((row for row in rows if row['num_beams'] == beams), None)
      cells = [name, str(cfg.mlp_dim), count, str(beams), f'{encoder:g} + {decoder:g}']
      table.append([*cells, *_our_times(part, row)])
  part.doc.table([*head, 'ours: encoder', 'ours: decoder'], table)
  timing = part.scale.shazeer
  part.doc.text(
    'Time over all output tokens of a batch. The paper: TPUv2, length 128. Ours:'
    f' {timing.dtype}, batch {timing.batch_size}, input {timing.input_length}, output'
    f' {timing.output_length}. Parameters are counted by formula (analytic); both'
    ' models have as many.'
  )
  if part.scale.public:
    _write_bleu(part)


def _our_times(part: Part, row: Row | None) -> list[str]:
  if row is None:
    return [part.doc.not_run(), part.doc.not_run()]
  decoder = 1e3 * row['ms_per_step'] / row['batch_size']
  encoder = 1e3 * row['encode_ms'] / row['batch_size'] / row['output_length']
  return [part.computed(row, value, 1) for value in (encoder, decoder)]


def _write_bleu(part: Part) -> None:
  rows = []
  for name, facts in paper.SHAZEER.items():
    for beams, theirs in facts['bleu_test'].items():
      number = part.found.translation(part.plan, facts['size'], beams)
      ours = part.doc.number(number, 1, theirs)
      rows.append([name, str(beams), f'{theirs}', ours])
  part.doc.table(['model', 'beams', 'paper: BLEU, test set', 'ours'], rows)
