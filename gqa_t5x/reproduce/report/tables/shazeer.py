"""Shazeer's tables: translation, its times and its scores."""

from gqa_t5x.analysis.costs import formulas
from gqa_t5x.model import network
from gqa_t5x.reproduce.experiments import paper, targets
from gqa_t5x.reproduce.report.part import Part


def write(part: Part) -> None:
  """Adds microseconds per output token of encoder and decoder, and BLEU."""

  def encoder(row):
    per_token = row['encode_ms'] / row['batch_size'] / row['output_length']
    return part.number(row, 1e3 * per_token, 1)

  def decoder(row):
    return part.number(row, 1e3 * row['ms_per_step'] / row['batch_size'], 1)

  table = []
  for name, facts in paper.SHAZEER.items():
    cfg = network.config(facts['size'])
    count = f'{formulas.num_parameters(cfg):,}'
    path = targets.shazeer_timing(part.plan, name).result
    rows = part.found.rows(path, 'decode_benchmark', size=facts['size'])
    for beams, theirs in facts['infer_us'].items():
      row = next((row for row in rows if row['num_beams'] == beams), None)
      times = '{:g} + {:g}'.format(*theirs)
      ours = part.cells(row, [encoder, decoder])
      table.append([name, str(cfg.mlp_dim), count, str(beams), times, *ours])
  head = ['model', 'F', 'parameters', 'beams', 'paper: encoder + decoder, µs/token']
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


def _write_bleu(part: Part) -> None:
  rows = []
  for name, facts in paper.SHAZEER.items():
    for beams, theirs in facts['bleu_test'].items():
      number = part.found.translation(part.plan, facts['size'], beams)
      ours = part.doc.number(number, 1, theirs)
      rows.append([name, str(beams), f'{theirs}', ours])
  part.doc.table(['model', 'beams', 'paper: BLEU, test set', 'ours'], rows)
