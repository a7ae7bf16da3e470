"""The report of the miniature: a table and a figure."""

import operator
import pathlib
from typing import Any

from gqa_t5x import files
from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.studies import MINIATURE
from gqa_t5x.reproduce.report.document import NOT_RUN, Document
from gqa_t5x.reproduce.results.rows import Row, read_rows, versions

NAMES = {8: 'MHA', 2: 'GQA-2', 1: 'MQA'}
MHA_LINES = (('-', 'MHA, as pre-trained'), ('--', 'MHA, as many steps more'))


def write(output_dir: str) -> None:
  """Writes `report.md` and `report.png` next to the rows.

  Raises:
    BadInput: the rows are damaged or mixed.
  """
  plan = Planner(MINIATURE, output_dir)
  losses, times = (read_rows(plan.rows, kind) for kind in ('uptrain', 'decode'))
  doc = Document('Uptraining a tiny T5.1.1: MHA, GQA-2, MQA')
  _add_table(doc, losses, times)
  _draw(losses, times, plan.folder / 'report.png')
  doc.image('report.png', 'Loss at conversion and after uptraining, and decode time')
  files.write_text(plan.folder / 'report.md', doc.markdown())


def _add_table(doc: Document, losses: list[Row], times: list[Row]) -> None:
  """Adds the table and what its columns mean."""
  model = operator.itemgetter('method', 'num_kv_heads')
  uptrained = {model(row): row for row in losses if row['uptrain_steps']}
  decode = {row['num_kv_heads']: row for row in times}
  columns = {
    'model': lambda row: NAMES[row['num_kv_heads']],
    'conversion': lambda row: row['method'].replace('none', '-'),
    'parameters': lambda row: f'{row["parameters"]:,}',
    'cache B/token': lambda row: f'{row["cache_bytes_per_token"]:,}',
    'loss, acc. at conversion': _scores,
    'loss, acc. uptrained': lambda row: _scores(uptrained.get(model(row))),
    'decode ms/token': lambda row: (
      f'{decode[row["num_kv_heads"]]["ms_per_step"] / times[0]["batch_size"]:.3f}'
    ),
  }
  converted = [row for row in losses if not row['uptrain_steps']]
  rows = [[cell(row) for cell in columns.values()] for row in converted]
  doc.table(list(columns), rows, left=(0, 1))
  last_steps = max(row['uptrain_steps'] for row in losses)
  doc.text(
    f'All numbers measured on {losses[0]["device"]}, float32, {versions(losses[0])}.'
    ' Loss in nats and accuracy, per target token, on the validation split of'
    f' `pydocs_span_corruption`; pre-training {losses[0]["pretrain_steps"]} steps,'
    f' uptraining {last_steps} more (for MHA, too), one seed. mean, first, random: the'
    ' paper; svd: the shared heads of least squared error, with statistics of 512'
    ' sequences. Cache: keys and values'
    ' of all decoder layers for one output token, and as much again for one input'
    ' token. Decode time per token and sequence: greedy, batch'
    f' {times[0]["batch_size"]}, input {times[0]["input_length"]}, by slope, median.'
  )


def _scores(row: Row | None) -> str:
  if row is None:
    return NOT_RUN
  return f'{row["validation_loss"]:.3f}, {row["validation_accuracy"]:.3f}'


def _draw(losses: list[Row], times: list[Row], path: pathlib.Path) -> None:
  """Draws loss against uptraining steps, and decode time against K/V heads."""
  with figures.figure(path, 9, 3.6) as fig:
    left, right = fig.subplots(1, 2, width_ratios=(2, 1))
    _draw_losses(left, losses)
    values = {NAMES[row['num_kv_heads']]: row['ms_per_step'] for row in times}
    figures.bars(right, values, digits=1)
    label = f'ms per step, batch {times[0]["batch_size"]}'
    title = f'Decoding, input {times[0]["input_length"]}'
    figures.tidy(right, title=title, ylabel=label)


def _draw_losses(axis: Any, rows: list[Row]) -> None:
  """Groups by model: a mark per method at conversion, hollow after uptraining."""
  models = [2, 1]
  for row in rows:
    if row['method'] == 'none':
      style, label = MHA_LINES[bool(row['uptrain_steps'])]
      axis.axhline(row['validation_loss'], color='black', lw=1, ls=style, label=label)
  for i, (method, style) in enumerate(figures.METHODS.items()):
    for after in (False, True):
      losses = {
        models.index(row['num_kv_heads']) + (i - 1.5) * 0.2: row['validation_loss']
        for row in rows
        if row['method'] == method and bool(row['uptrain_steps']) == after
      }
      if not losses:
        continue
      label = f'{method}, {"uptrained" if after else "at conversion"}'
      marks = figures.Series(
        label, list(losses), list(losses.values()), *style, hollow=after
      )
      figures.plot(axis, [marks], ms=8, mew=1.8)
      # Below and above, for svd's two marks are close to each other.
      place = {'textcoords': 'offset points', 'xytext': (7, -9 if after else 2)}
      for x, y in losses.items():
        axis.annotate(f'{y:.2f}', (x, y), fontsize=8, **place)
  axis.set_xticks(range(len(models)), [NAMES[k] for k in models])
  axis.set_xlim(-0.5, len(models) - 0.5)
  axis.margins(y=0.15)
  label = 'validation loss (nats per token)'
  figures.tidy(axis, title='Conversion and uptraining', ylabel=label)
  figures.legend(axis, fontsize=7.5, loc='center left', bbox_to_anchor=(1, 0.5))
