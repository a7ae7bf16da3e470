"""Rows of benchmarks as a table with bars, and as a figure."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich.console
import rich.progress
import rich.table

from gqa_t5x.analysis.decode_benchmark import BadSetting

Row = dict[str, Any]
BAR = 24  # characters of the slowest row


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[Row], None]]:
  """Shows how many rows are done, and the time to go.

  Args:
    total: rows.

  Yields:
    What is to be called with each row.
  """
  columns = (
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
  )
  console = rich.console.Console(stderr=True)
  with rich.progress.Progress(*columns, console=console, transient=True) as bar:
    task = bar.add_task('measure', total=total)
    yield lambda row: bar.advance(task)


def print_table(rows: Sequence[Row]) -> None:
  """Prints rows with bars for the milliseconds of a step."""
  table = rich.table.Table(box=None, pad_edge=False)
  for name in ('model', 'K', 'batch', 'input', 'beams'):
    table.add_column(name, justify='left' if name == 'model' else 'right')
  for name in ('ms/step', '', 'GB/s', 'of stream', 'of roofline', 's/sample'):
    table.add_column(name, justify='left' if not name else 'right', no_wrap=True)
  slowest = max(row['ms_per_step'] for row in rows)
  for row in rows:
    name = row['size'] if row['system'] == 'gqa_t5x' else f'{row["size"]} (T5X)'
    table.add_row(
      name,
      *(str(row[n]) for n in ('num_kv_heads', 'batch_size', 'input_length')),
      str(row['num_beams']),
      f'{row["ms_per_step"]:.3g}',
      '█' * max(1, round(BAR * row['ms_per_step'] / slowest)),
      f'{row["gb_per_s"]:.3g}',
      f'{row["roofline_fraction"]:.0%}',
      f'{row["roofline_time_fraction"]:.0%}',
      f'{row["seconds_per_sample"]:.3g}',
    )
  width = None if os.isatty(1) else 120
  console = rich.console.Console(width=width, highlight=False)
  console.print(table)
  row = rows[0]
  console.print(
    f'measured on {row["device"]}, {row["dtype"]}; a plain sum reads'
    f' {row["stream_gb_per_s"]:.3g} GB/s'
  )


def check_matplotlib() -> None:
  """Raises BadSetting if figures cannot be drawn."""
  try:
    import matplotlib  # noqa: F401
  except ImportError as error:
    raise BadSetting(
      '--png needs matplotlib, which is not installed; pip install matplotlib.'
    ) from error


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
  """Draws seconds per sample against key/value heads: the paper's figure 6.

  Args:
    rows: of decode benchmarks; those that differ in heads only are one line.
    path: the PNG file.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  names = ('size', 'batch_size', 'input_length', 'output_length', 'num_beams', 'dtype')
  differing = [n for n in names if len({row[n] for row in rows}) > 1] or ['size']
  lines: dict[str, list[Row]] = {}
  for row in rows:
    label = ', '.join(f'{n.replace("_", " ")} {row[n]}' for n in differing)
    label += '' if row['system'] == 'gqa_t5x' else ' (T5X)'
    lines.setdefault(label, []).append(row)
  fig, axis = plt.subplots(figsize=(5.5, 3.6), layout='constrained')
  for label, found in lines.items():
    points = sorted((row['num_kv_heads'], row['seconds_per_sample']) for row in found)
    heads, values = zip(*points, strict=True)
    axis.plot(heads, values, marker='o' if len(points) > 1 else 'x', label=label)
  heads = sorted({row['num_kv_heads'] for row in rows})
  axis.set_xscale('log', base=2)
  axis.set_xticks(heads, [str(k) for k in heads])
  axis.minorticks_off()
  axis.set_ylim(bottom=0)
  axis.set_xlabel('key/value heads')
  axis.set_ylabel('time per sample (s)')
  axis.set_title(f'measured on {rows[0]["device"]}', fontsize=9)
  axis.grid(axis='y', lw=0.4, color='0.85')
  axis.spines[['top', 'right']].set_visible(False)
  axis.legend(fontsize=8, frameon=False)
  temporary = path.with_suffix('.tmp.png')
  fig.savefig(temporary, dpi=150)
  plt.close(fig)
  os.replace(temporary, path)
