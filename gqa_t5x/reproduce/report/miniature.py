"""The report of the miniature: a table and a figure."""

import json
import pathlib
from typing import Any

from gqa_t5x import files
from gqa_t5x.analysis.palette import BLUE, GREEN, ORANGE, PINK, SKY
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.studies import MINIATURE
from gqa_t5x.reproduce.report.document import NOT_RUN, Document
from gqa_t5x.reproduce.report.figures import plt, save, tidy
from gqa_t5x.reproduce.results.rows import Row

NAMES = {8: 'MHA', 2: 'GQA-2', 1: 'MQA'}
STYLES = {
  'mean': (BLUE, 'o'),
  'first': (ORANGE, 's'),
  'random': (PINK, '^'),
  'svd': (GREEN, 'D'),
}


def write(output_dir: str) -> None:
  """Writes `report.md` and `report.png`.

  Args:
    output_dir: folder of the rows and of the report.
  """
  plan = Planner(MINIATURE, output_dir)
  folder, rows = plan.folder, json.loads(plan.rows.read_text())
  doc = Document('Uptraining a tiny T5.1.1: MHA, GQA-2, MQA')
  _add_table(doc, rows)
  draw(rows, folder / 'report.png')
  doc.image('report.png', 'Loss at conversion and after uptraining, and decode time')
  files.write_text(folder / 'report.md', doc.markdown())


def _add_table(doc: Document, rows: list[Row]) -> None:
  """Adds the table and what its columns mean."""
  losses = {_key(row): row for row in rows if row['kind'] == 'uptrain'}
  decode = {row['num_kv_heads']: row for row in rows if row['kind'] == 'decode'}
  first = next(iter(losses.values()))
  last_steps = max(steps for _, _, steps in losses)
  table = []
  for (method, num_kv_heads, steps), row in losses.items():
    if steps:
      continue
    timing = decode[num_kv_heads]
    table.append(
      [
        NAMES[num_kv_heads],
        method.replace('none', '-'),
        f'{row["parameters"]:,}',
        f'{row["cache_bytes_per_token"]:,}',
        _scores(row),
        _scores(losses.get((method, num_kv_heads, last_steps))),
        f'{timing["ms_per_step"] / timing["batch_size"]:.3f}',
      ]
    )
  head = ['model', 'conversion', 'parameters', 'cache B/token']
  times = ['loss, acc. at conversion', 'loss, acc. uptrained', 'decode ms/token']
  doc.table([*head, *times], table, left=(0, 1))
  doc.text(
    f'All numbers measured on {first["device"]}, float32, {_versions(first)}. Loss in'
    ' nats and accuracy, per target token, on the validation split of'
    f' `pydocs_span_corruption`; pre-training {first["pretrain_steps"]} steps,'
    f' uptraining {last_steps} more (for MHA, too), one seed. mean, first, random: the'
    ' paper; svd: the shared heads of least squared error, with statistics of 512'
    ' sequences. Cache: keys and values'
    ' of all decoder layers for one output token, and as much again for one input'
    ' token. Decode time per token and sequence: greedy, batch'
    f' {timing["batch_size"]}, input {timing["input_length"]}, by slope, median.'
  )


def _key(row: Row) -> tuple[str, int, int]:
  return row['method'], row['num_kv_heads'], row['uptrain_steps']


def _scores(row: Row | None) -> str:
  if row is None:
    return NOT_RUN
  return f'{row["validation_loss"]:.3f}, {row["validation_accuracy"]:.3f}'


def _versions(row: Row) -> str:
  return ', '.join(f'{name} {version}' for name, version in row['versions'].items())


def draw(rows: list[Row], path: pathlib.Path) -> None:
  """Draws loss against uptraining steps, and decode time against K/V heads."""
  fig, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.6), width_ratios=(2, 1), layout='constrained'
  )
  _draw_losses(left, [row for row in rows if row['kind'] == 'uptrain'])
  decode = [row for row in rows if row['kind'] == 'decode']
  names = [NAMES[row['num_kv_heads']] for row in decode]
  values = [row['ms_per_step'] for row in decode]
  bars = right.bar(names, values, color=SKY, edgecolor='black', linewidth=0.6)
  right.bar_label(bars, fmt='%.1f', fontsize=9)
  right.set_ylabel(f'ms per step, batch {decode[0]["batch_size"]}')
  right.set_title(f'Decoding, input {decode[0]["input_length"]}', fontsize=10)
  tidy(right)
  save(fig, path)


def _draw_losses(axis: Any, rows: list[Row]) -> None:
  """Groups by model: a mark per method at conversion, hollow after uptraining."""
  models = [2, 1]
  width = 0.2
  mha = [row for row in rows if row['method'] == 'none']
  for row in mha:
    style = '-' if row['uptrain_steps'] == 0 else '--'
    label = 'MHA, as pre-trained' if style == '-' else 'MHA, as many steps more'
    axis.axhline(row['validation_loss'], color='black', lw=1, ls=style, label=label)
  for i, (method, (color, marker)) in enumerate(STYLES.items()):
    for row in (row for row in rows if row['method'] == method):
      x = models.index(row['num_kv_heads']) + (i - 1.5) * width
      after = row['uptrain_steps'] > 0
      axis.plot(
        x,
        row['validation_loss'],
        marker,
        ms=8,
        color=color,
        mfc='white' if after else color,
        mew=1.8,
        label=f'{method}, {"uptrained" if after else "at conversion"}'
        if x < 0.5
        else None,
      )
      axis.annotate(
        f'{row["validation_loss"]:.2f}',
        (x, row['validation_loss']),
        textcoords='offset points',
        # Below and above, for svd's two marks are close to each other.
        xytext=(7, -9 if after else 2),
        fontsize=8,
      )
  axis.set_xticks(range(len(models)), [NAMES[k] for k in models])
  axis.set_xlim(-0.5, len(models) - 0.5)
  axis.margins(y=0.15)
  axis.set_ylabel('validation loss (nats per token)')
  axis.set_title('Conversion and uptraining', fontsize=10)
  axis.legend(fontsize=7.5, frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
  tidy(axis)
