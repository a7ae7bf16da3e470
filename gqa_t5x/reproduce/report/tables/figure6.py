"""Figure 6: time per sample against key/value heads."""

from collections.abc import Callable, Mapping

from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments import paper
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.results.reader import Measured
from gqa_t5x.reproduce.results.rows import Row


def write(part: Part) -> None:
  """Adds a line for each number of key/value heads, and the figure."""
  if part.scale.public:
    part.doc.text(f'The paper: {paper.FIGURE6}')
  timing = part.scale.heads
  by_heads = {row['num_kv_heads']: row for row in part.decode_rows('figure6', timing)}
  columns = {'ms/step': lambda row: part.number(row, row['ms_per_step'], 1)}
  latent = part.decode_rows('figure6_latent', part.scale.latent)
  by_size = {part.scale.latent.kv_head_dim: next(iter(latent), None)}
  rows = {K: by_heads.get(K) for K in timing.num_kv_heads}
  add_table(part, rows, columns, by_size)
  if not by_heads:
    return
  row = next(iter(by_heads.values()))
  caption = (
    f'Figure 6: T5.1.1-{row["size"]}, {row["dtype"]}, batch {row["batch_size"]}, input'
    f' {row["input_length"]}, output {row["output_length"]}, on {row["device"]}'
    f' ({row["source"]}).'
  )
  decoder_ms = {
    K: row['ms_per_step'] * row['output_length'] / row['batch_size']
    for K, row in by_heads.items()
  }
  name, label = f'figure6_{part.scale.name}.png', 'time per sample (s)'
  add_figure(part, name, caption, by_heads, decoder_ms, label)


def add_table(
  part: Part,
  rows: Mapping[int, Row | None],
  columns: Mapping[str, Callable[[Row], str]],
  latent: Mapping[int, Row | None],
) -> None:
  """Adds the table of times per sample, at the papers' scale with theirs.

  Args:
    part: which it is added to.
    rows: K -> row.
    columns: head -> function of a row, for what else is told of it.
    latent: R -> row of one key/value head of so many numbers.
  """
  table = []
  drawn = {str(K): (row, 'a drawing') for K, row in rows.items()}
  drawn |= {f'1 of {R}': (row, paper.NOT_THERE) for R, row in latent.items()}
  for heads, (row, said) in drawn.items():
    is_mha = part.scale.public and heads == str(paper.FIGURE6_HEADS[-1])
    theirs = paper.FIGURE6_MHA_SECONDS if is_mha else None
    text = [f'about {theirs:g}' if theirs else said] if part.scale.public else []
    seconds = row and Measured.of(row, row['seconds_per_sample'])
    cells = [part.doc.number(seconds, 3, theirs), *part.cells(row, columns.values())]
    table.append([heads, *text, *cells])
  papers = ['paper, s/sample'] if part.scale.public else []
  part.doc.table(['key/value heads', *papers, 's/sample', *columns], table)


def add_figure(
  part: Part,
  name: str,
  caption: str,
  rows: Mapping[int, Row],
  decoder_ms: Mapping[int, float],
  label: str,
) -> None:
  """Adds the figure of times per sample.

  Args:
    part, name, caption, label: as of `Part.figure`.
    rows: K -> row with the time of encoder and decoder.
    decoder_ms: K -> time of the decoder alone, milliseconds per sample.
  """
  heads = sorted(rows)
  total = [rows[K]['seconds_per_sample'] for K in heads]
  decoder = [decoder_ms[K] / 1e3 for K in heads]
  series = [
    figures.Series('with the encoder', heads, total, figures.BLUE, 'o', line=True),
    figures.Series('decoder alone', heads, decoder, figures.VERMILION, 's', line=True),
  ]
  options = {'x_ticks': heads, 'log': 'x', 'from_zero': True}
  part.figure(name, caption, series, 'key/value heads', label, **options)
