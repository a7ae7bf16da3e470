"""Rows to a table in Markdown and a figure."""

import json
import os
import pathlib
from typing import Any

Row = dict[str, Any]

NAMES = {8: 'MHA', 2: 'GQA-2', 1: 'MQA'}
# Okabe and Ito's palette, told apart by the colour-blind; markers differ, too.
STYLES = {
  'mean': ('#0072B2', 'o'),
  'first': ('#E69F00', 's'),
  'random': ('#CC79A7', '^'),
  'svd': ('#009E73', 'D'),
}


def write(rows_file: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes `report.md` and `report.png`.

  Args:
    rows_file: JSON list of rows (evaluate.py).
    folder: where the report goes.
  """
  rows = json.loads(rows_file.read_text())
  figure(rows, folder / 'report.png')
  temporary = folder / 'report.tmp'
  temporary.write_text(markdown(rows))
  os.replace(temporary, folder / 'report.md')


def markdown(rows: list[Row]) -> str:
  """Returns the report's table and what its columns mean."""
  losses = {_key(row): row for row in rows if row['kind'] == 'uptrain'}
  decode = {row['num_kv_heads']: row for row in rows if row['kind'] == 'decode'}
  first = next(iter(losses.values()))
  last_steps = max(steps for _, _, steps in losses)
  lines = [
    '# Uptraining a tiny T5.1.1: MHA, GQA-2, MQA',
    '',
    '| model | conversion | parameters | cache B/token | loss, acc. at conversion |'
    ' loss, acc. uptrained | decode ms/token |',
    '|---|---|---:|---:|---:|---:|---:|',
  ]
  for method, num_kv_heads, steps in losses:
    if steps:
      continue
    row = losses[method, num_kv_heads, 0]
    after = losses.get((method, num_kv_heads, last_steps))
    timing = decode[num_kv_heads]
    lines.append(
      f'| {NAMES[num_kv_heads]} | {method.replace("none", "-")}'
      f' | {row["parameters"]:,} | {row["cache_bytes_per_token"]:,}'
      f' | {_scores(row)} | {_scores(after)}'
      f' | {timing["ms_per_step"] / timing["batch_size"]:.3f}'
      ' |'
    )
  lines += [
    '',
    f'All numbers measured on {first["device"]}, float32, {_versions(first)}. Loss in'
    ' nats and accuracy, per target token, on the validation split of'
    f' `pydocs_span_corruption`; pre-training {first["pretrain_steps"]} steps,'
    f' uptraining {last_steps} more (for MHA, too), one seed. mean, first, random: the'
    ' paper; svd: the shared heads of least squared error, with statistics of 512'
    ' sequences. Cache: keys and values'
    ' of all decoder layers for one output token, and as much again for one input'
    ' token. Decode time per token and sequence: greedy, batch'
    f' {timing["batch_size"]}, input {timing["input_length"]}, by slope, median.',
    '',
    '![Loss at conversion and after uptraining, and decode time](report.png)',
    '',
  ]
  return '\n'.join(lines)


def _key(row: Row) -> tuple[str, int, int]:
  return row['method'], row['num_kv_heads'], row['uptrain_steps']


def _scores(row: Row | None) -> str:
  if row is None:
    return 'not run'
  return f'{row["validation_loss"]:.3f}, {row["validation_accuracy"]:.3f}'


def _versions(row: Row) -> str:
  return ', '.join(f'{name} {version}' for name, version in row['versions'].items())


def figure(rows: list[Row], path: pathlib.Path) -> None:
  """Draws loss against uptraining steps, and decode time against K/V heads."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  fig, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.6), width_ratios=(2, 1), layout='constrained'
  )
  _draw_losses(left, [row for row in rows if row['kind'] == 'uptrain'])
  decode = [row for row in rows if row['kind'] == 'decode']
  names = [NAMES[row['num_kv_heads']] for row in decode]
  values = [row['ms_per_step'] for row in decode]
  bars = right.bar(names, values, color='#56B4E9', edgecolor='black', linewidth=0.6)
  right.bar_label(bars, fmt='%.1f', fontsize=9)
  right.set_ylabel(f'ms per step, batch {decode[0]["batch_size"]}')
  right.set_title(f'Decoding, input {decode[0]["input_length"]}', fontsize=10)
  right.spines[['top', 'right']].set_visible(False)
  temporary = path.with_suffix('.tmp.png')
  fig.savefig(temporary, dpi=150)
  plt.close(fig)
  os.replace(temporary, path)


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
  axis.spines[['top', 'right']].set_visible(False)
