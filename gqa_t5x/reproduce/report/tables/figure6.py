"""Figure 6: time per sample against key/value heads."""

from gqa_t5x.reproduce.experiments import paper
from gqa_t5x.reproduce.report.part import Part


def write(part: Part) -> None:
  """Adds a line for each number of key/value heads, and the figure."""
  public, timing = part.scale.public, part.scale.heads
  if public:
    part.doc.text(f'The paper: {paper.FIGURE6}')
  path = part.plan.timing('figure6', timing).result
  rows = part.found.rows(path, 'decode_benchmark', size=timing.size)
  by_heads = {row['num_kv_heads']: row for row in rows}
  table = []
  for heads in timing.num_kv_heads:
    row = by_heads.get(heads)
    theirs = paper.FIGURE6_MHA_SECONDS if heads == 64 and public else None
    text = f'about {theirs:g}' if theirs else 'a drawing'
    seconds = part.number(row, 'seconds_per_sample', 3, theirs)
    step = part.number(row, 'ms_per_step', 1)
    table.append([str(heads), *([text] if public else []), seconds, step])
  paper_head = ['paper, s/sample'] if public else []
  part.doc.table(['key/value heads', *paper_head, 's/sample', 'ms/step'], table)
  if not rows:
    return
  seconds = {
    heads: (
      row['seconds_per_sample'],
      row['ms_per_step'] / 1e3 * row['output_length'] / row['batch_size'],
    )
    for heads, row in by_heads.items()
  }
  row = rows[0]
  caption = (
    f'Figure 6: T5.1.1-{row["size"]}, {row["dtype"]}, batch {row["batch_size"]}, input'
    f' {row["input_length"]}, output {row["output_length"]}, on {row["device"]}'
    f' ({row["source"]}).'
  )
  name = f'figure6_{part.scale.name}.png'
  part.time_against_heads(name, caption, seconds, 'time per sample (s)')
