"""Measures what grouped-query attention buys, on this machine: CPU, GPU or TPU.

  python -m gqa_t5x.benchmark decode --size=base --num_kv_heads=12,4,1

times a decode step of T5.1.1-base with 12, 4 and 1 key/value heads, beside what the
memory bus allows. Weights are random: what a step costs does not depend on them. Needs
JAX and Flax only. Any flag of a setting takes a comma list; all combinations are
measured, and those that fit into memory together take turns:

  python -m gqa_t5x.benchmark decode --size=xxl --dtype=bfloat16 --batch_size=64 \\
    --input_length=2048 --output_length=512 --json=rows.json --png=heads.png

--compare=t5x adds T5X's own network and decoding, where T5X is installed:

  python -m gqa_t5x.benchmark decode --size=base --input_length=512,2048 --compare=t5x

Two more things can be measured; the last one needs what conversion needs:

  python -m gqa_t5x.benchmark train --size=base --num_kv_heads=12,4
  python -m gqa_t5x.benchmark convert --size=large --work_dir=/path/on/that/disk

--json writes one row a setting. Beside the setting it holds, for `decode`:

  ms_per_step            one more token of every row: slope between two lengths
  encode_ms              the encoder, and all that is made once an input
  seconds_per_sample     (encode + output_length steps) / batch_size
  tokens_per_s           batch_size / step
  param_bytes_per_step   parameters that a step reads, by formula
  cache_bytes_per_step   keys and values that a step reads, by formula
  flops_per_step         by formula
  gb_per_s               both bytes / ms_per_step (1e9 bytes)
  stream_gb_per_s        what a plain sum reads on this machine, in this process
  roofline_fraction      gb_per_s / stream_gb_per_s
  matmul_gflop_per_s     products of as many rows as the step has, in this process
  roofline_ms            max(bytes / stream_gb_per_s, FLOPs / matmul_gflop_per_s)
  roofline_time_fraction roofline_ms / ms_per_step

for `train` (forward and backward pass, no optimizer):

  ms_per_step, tokens_per_s (of inputs and targets), flops_per_step (by formula),
  gflop_per_s, matmul_gflop_per_s (products of as many rows), matmul_fraction

for `convert`:

  seconds                of the conversion, until the result is on the disk
  cp_seconds             `cp -r` of the source and `sync`, in turn with it
  cp_fraction            cp_seconds / seconds
  input_bytes, output_bytes, gb_per_s (of the input), peak_mb (resident, 1e6 bytes)
"""

import functools
import importlib
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath

from gqa_t5x.analysis.benchmarks import benchmark_report
from gqa_t5x.analysis.benchmarks.settings import DTYPES, BadSetting
from gqa_t5x.model import sizes

BENCHMARKS = ('decode', 'train', 'convert')
FILL = 'fill'  # --batch_size of as many as fit
PARTIAL = '.partial'  # the file of --json while it grows
WORDS = {'size': sizes.SIZES, 'dtype': DTYPES, 'method': (), 'compression': ()}


def module_of(name: str) -> Any:
  """Returns the module of a benchmark: its LISTS, COLUMNS, Setting and measure.

  Args:
    name: one of BENCHMARKS.

  Raises:
    BadSetting: what it needs is not installed.
  """
  try:
    return importlib.import_module(f'gqa_t5x.analysis.benchmarks.{name}_benchmark')
  except ImportError as error:
    raise BadSetting(
      f'{name} needs {error.name}, which is not installed;'
      " pip install 'gqa_t5x[train]'."
    ) from error


def define_flags(name: str) -> flags.FlagValues:
  """The flags of a benchmark, apart from absl's global ones.

  Args:
    name: one of BENCHMARKS.
  """
  values = flags.FlagValues()
  define = {'flag_values': values, 'module_name': 'gqa_t5x.benchmark'}
  for flag, (default, text) in module_of(name).LISTS.items():
    flags.DEFINE_list(flag, default, text, **define)
  few, least = (3, 1) if name == 'convert' else (7, 5)
  flags.DEFINE_integer(
    'repeats', few, 'Times, of which the median counts.', least, **define
  )
  flags.DEFINE_string('json', None, 'Write the rows to this file.', **define)
  if name == 'convert':
    flags.DEFINE_string('work_dir', '.', 'A folder on the disk to measure.', **define)
  else:
    flags.DEFINE_enum('compare', None, ['t5x'], 'Measure T5X itself as well.', **define)
  if name == 'decode':
    flags.DEFINE_string('png', None, 'Draw seconds per sample to this file.', **define)
  flags.DEFINE_bool('help', False, 'Show this text.', short_name='h', **define)
  return values


def settings(name: str, args: flags.FlagValues) -> list[Any]:
  """Returns every combination of what the flags list.

  Args:
    name: one of BENCHMARKS.
    args: parsed flags.

  Returns:
    The settings, T5X's own after ours.

  Raises:
    BadSetting: for what is not a number, or an unknown size or dtype.
  """
  module = module_of(name)
  lists = {flag: _values(name, flag, args[flag].value) for flag in module.LISTS}
  ours = []
  for size in lists['size']:
    heads = lists['num_kv_heads'] or _default_heads(name, size)
    # Heads come last: those that differ in nothing else take turns.
    others = [flag for flag in lists if flag not in ('size', 'num_kv_heads')]
    for values in itertools.product(*(lists[flag] for flag in others)):
      for num_kv_heads in heads:
        fields = dict(zip(others, values, strict=True))
        setting = module.Setting(size=size, num_kv_heads=num_kv_heads, **fields)
        fill = fields.get('batch_size') == FILL
        ours.append(setting.filled() if fill else setting)
  return with_t5x(ours) if 'compare' in args and args.compare else ours


def _default_heads(name: str, size: str) -> list[int]:
  dims = sizes.SIZES[size]
  num_heads = dims['num_heads']
  if name == 'convert':
    return [max(1, num_heads // 4)]
  if 'num_kv_heads' in dims:
    return [dims['num_kv_heads']]
  return [k for k in range(num_heads, 0, -1) if num_heads % k == 0]


def with_t5x(ours: Sequence[Any]) -> list[Any]:
  """Returns settings, each list of heads followed by T5X's own network once."""
  result = list(ours)
  for setting in ours:
    changes = {'num_kv_heads': setting.config.num_heads, 'system': 't5x'}
    theirs = type(setting)(**(vars(setting) | changes))
    if theirs not in result:
      result.append(theirs)
  return sorted(result, key=_turn)


def _turn(setting: Any) -> tuple[Any, ...]:
  """Settings that differ in heads and network only are neighbours."""
  values = vars(setting) | {'num_kv_heads': 0, 'system': ''}
  known = list(sizes.SIZES)
  return known.index(setting.size), *(v for n, v in values.items() if n != 'size')


def _values(name: str, flag: str, words: Sequence[str] | None) -> list[Any]:
  if not words:
    return []
  if flag in WORDS:
    known = WORDS[flag]
    unknown = [word for word in words if known and word not in known]
    if unknown:
      raise BadSetting(f'{flag}={unknown[0]}; choose from {", ".join(known)}.')
    return list(words)
  can_fill = name == 'decode' and flag == 'batch_size'
  try:
    return [FILL if word == FILL and can_fill else int(word) for word in words]
  except ValueError as error:
    raise BadSetting(f'{flag}={",".join(words)} must be whole numbers.') from error


def run(name: str, args: flags.FlagValues) -> None:
  """Measures, prints a table and writes files.

  A benchmark's `measure(chosen, repeats, command)` yields rows in the order of the
  settings; those that fit into memory together take turns, and the median of so many
  repeats counts.

  Args:
    name: one of BENCHMARKS.
    args: parsed flags.

  Raises:
    BadSetting: for what cannot be measured or written, before anything is run.
  """
  png = args.png if 'png' in args else None
  if png:
    benchmark_report.check_matplotlib()
  for path in filter(None, (args.json, png)):
    if '://' not in path and not pathlib.Path(path).absolute().parent.is_dir():
      raise BadSetting(f'{path}: there is no such folder.')
  module = module_of(name)
  command = _command(name, args)
  measure = module.measure
  if name == 'convert':
    if not pathlib.Path(args.work_dir).is_dir():
      raise BadSetting(f'work_dir={args.work_dir}: there is no such folder.')
    measure = functools.partial(measure, work_dir=args.work_dir)
  chosen = settings(name, args)
  for setting in chosen:
    setting.check()
  rows = []
  with benchmark_report.progress(len(chosen)) as advance:
    for row in measure(chosen, args.repeats, command):
      rows.append(row)
      advance(row)
      if args.json:  # What was measured is not lost if the rest is stopped.
        epath.Path(args.json + PARTIAL).write_text(json.dumps(rows, indent=1))
  if args.json:
    epath.Path(args.json + PARTIAL).replace(args.json)
  benchmark_report.print_table(rows, module.COLUMNS)
  if png:
    benchmark_report.draw(rows, pathlib.Path(png))


def _command(name: str, args: flags.FlagValues) -> str:
  """Returns what to type for the same rows, wherever they are written."""
  given = [
    args[flag].serialize()
    for flag in (*module_of(name).LISTS, 'repeats', 'compare')
    if flag in args and args[flag].present
  ]
  return ' '.join(['python -m gqa_t5x.benchmark', name, *given])


def main(argv: Sequence[str]) -> int:
  """The command.

  Args:
    argv: program name, one of BENCHMARKS, and flags.

  Returns:
    Exit code: 0, 1 for bad input, 130 when interrupted.
  """
  words = [word for word in argv[1:] if not word.startswith('-')]
  name = words[0] if words else None
  wants_help = {'--help', '-h', '-help'} & set(argv)
  try:
    if name not in BENCHMARKS and not wants_help:
      raise BadSetting(f'say what to measure: {", ".join(BENCHMARKS)}; not {name!r}.')
    name = name if name in BENCHMARKS else 'decode'
    args = define_flags(name)
    rest = args(list(argv))[1:]
    if args.help:
      text = args.module_help('gqa_t5x.benchmark')
      print(f'{__doc__}\nFlags of {name}:{text}')
      return 0
    if rest != [name]:
      raise BadSetting(f'unexpected argument {rest[1]!r}; see --help.')
    run(name, args)
    return 0
  except (BadSetting, flags.Error) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f'stopped; rows until then: --json{PARTIAL}', file=sys.stderr)
    return 130


if __name__ == '__main__':
  sys.exit(main(sys.argv))
