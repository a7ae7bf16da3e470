"""Rows of benchmarks as a table with bars, and as a figure."""

import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tqdm

from gqa_t5x.errors import BadInput

BAR = 24  # characters of the slowest row
TIMES = ('ms_per_step', 'seconds')
# What stands behind a model; of ours nothing.
_SYSTEMS = {
  't5x': ' (T5X)',
  'ctranslate2': ' (CTranslate2)',
  'ctranslate2_int8': ' (CTranslate2, int8)',
}
# Other columns are numbers.
LEFT = ('part', 'model', 'size', 'quantize', 'method', 'compression', 'bar')


def progress(rows: Iterable[Any], total: int) -> Iterator[Any]:
  """Returns the rows, and shows how many are done, and the time to go."""
  return iter(tqdm.tqdm(rows, 'measure', total, leave=False, disable=None))


def print_table(rows: Sequence[dict[str, Any]], columns: Mapping[str, str]) -> None:
  """Prints rows of one benchmark; bars stand next to the first key that is a time.

  `columns` maps keys of a row to heads of columns; what no row has is left out.
  """
  found = {'model'}.union(*rows)
  columns = {key: head for key, head in columns.items() if key in found}
  time = next(key for key in columns if key in TIMES)
  slowest = max(row[time] for row in rows)
  mark = '█' if _prints('█') else '#'
  bars = [{'bar': mark * max(1, round(BAR * row[time] / slowest))} for row in rows]
  keys = [*columns]
  keys.insert(keys.index(time) + 1, 'bar')
  lines = [[columns.get(key, '') for key in keys]]
  for row, bar in zip(rows, bars, strict=True):
    lines.append([_cell(row | bar, key) for key in keys])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  for line in lines:
    cells = [
      f'{cell:{"<" if key in LEFT else ">"}{width}}'
      for cell, key, width in zip(line, keys, widths, strict=True)
    ]
    print('  '.join(cells).rstrip())
  said = f'measured on {rows[0]["device"]}'
  if 'dtype' in rows[0]:
    said += f', {rows[0]["dtype"]}'
  if 'stream_gb_per_s' in rows[0]:
    said += f'; a plain sum reads {rows[0]["stream_gb_per_s"]:.3g} GB/s'
  print(said)


def _prints(text: str) -> bool:
  """Whether standard output has signs for a text."""
  try:
    text.encode(sys.stdout.encoding or 'utf-8')
  except UnicodeEncodeError:
    return False
  return True


def _cell(row: dict[str, Any], key: str) -> str:
  if key == 'model':
    return row['size'] + _SYSTEMS.get(row['system'], '')
  value = row.get(key, '')
  if not isinstance(value, float):
    return str(value)
  if key.endswith('fraction'):
    return f'{value:.0%}'
  return f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'


def check_figure(path: str) -> None:
  """Raises BadInput if a figure cannot be drawn, or not to a file of this suffix."""
  try:
    from matplotlib import backend_bases
  except ImportError as error:
    raise BadInput(
      '--png needs matplotlib, which is not installed; pip install matplotlib.'
    ) from error
  suffix = pathlib.Path(path).suffix.lower().removeprefix('.')
  known = backend_bases.FigureCanvasBase.filetypes
  if suffix and suffix not in known:
    raise BadInput(f'{path}: choose one of the suffixes {", ".join(known)}.')


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws seconds per sample against key/value heads: the paper's figure 6.

  Of `rows` of decode benchmarks, those that differ in heads only are one line.
  """
  from gqa_t5x.analysis import figures

  names = ('size', 'kv_head_dim', 'batch_size', 'input_length', 'output_length')
  names += ('num_beams', 'dtype')
  differing = [n for n in names if len({row.get(n) for row in rows}) > 1] or ['size']
  lines: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    label = _said(row, differing) + _SYSTEMS.get(row['system'], '')
    lines.setdefault(label, []).append(row)
  same = _said(rows[0], [n for n in names[1:-1] if n not in differing])
  title = [f'measured on {rows[0]["device"]}, {rows[0]["dtype"]}', same]
  with figures.figure(path, 5.5, 3.6) as fig:
    axis = fig.add_subplot()
    axis.set_prop_cycle(color=figures.LINES)
    for label, found in lines.items():
      points = sorted((row['num_kv_heads'], row['seconds_per_sample']) for row in found)
      heads, values = zip(*points, strict=True)
      axis.plot(heads, values, marker='o' if len(points) > 1 else 'x', label=label)
    heads = sorted({row['num_kv_heads'] for row in rows})
    axis.set_xscale('log', base=2)
    axis.set_xticks(heads, [str(k) for k in heads])
    axis.minorticks_off()
    axis.set_ylim(0, 1.08 * max(row['seconds_per_sample'] for row in rows))
    figures.tidy(axis, 'y', xlabel='key/value heads', ylabel='time per sample (s)')
    axis.set_title('\n'.join(filter(None, title)), fontsize=9)
    figures.legend(axis)


def _said(row: dict[str, Any], keys: Sequence[str]) -> str:
  return ', '.join(f'{key.replace("_", " ")} {row[key]}' for key in keys if key in row)
