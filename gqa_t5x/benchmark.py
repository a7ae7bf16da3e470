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

A row of --json holds, beside its setting:

  ms_per_step            one more token of every row: slope between two lengths
  encode_ms              the encoder, and cross-attention K and V, once an input
  seconds_per_sample     (encode + output_length steps) / batch_size
  tokens_per_s           batch_size / step
  param_bytes_per_step   parameters that a step reads, by formula
  cache_bytes_per_step   keys and values that a step reads, by formula
  gb_per_s               both / ms_per_step (1e9 bytes)
  stream_gb_per_s        what a plain sum reads on this machine, in this process
  roofline_fraction      gb_per_s / stream_gb_per_s
  matmul_gflop_per_s     products of as many rows as the step has, in this process
  roofline_ms            max(bytes / stream_gb_per_s, FLOPs / matmul_gflop_per_s)
  roofline_time_fraction roofline_ms / ms_per_step
"""

import itertools
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from gqa_t5x import network
from gqa_t5x.analysis import benchmark_report, decode_benchmark
from gqa_t5x.analysis.decode_benchmark import BadSetting, Setting

# Flags of a setting: each takes a comma list.
LISTS = {
  'size': ('base', 'Model sizes: ' + ', '.join(network.SIZES) + '.'),
  'num_kv_heads': (None, 'Key/value heads; by default every divisor of the heads.'),
  'batch_size': ('8', 'Inputs decoded together.'),
  'input_length': ('512', 'Tokens of each input.'),
  'output_length': ('64', 'Tokens decoded; positions of the self-attention cache.'),
  'dtype': ('float32', 'Of parameters, activations and cache: float32 or bfloat16.'),
  'num_beams': ('1', 'Beams of each input; 1 is greedy.'),
}
WORDS = ('size', 'dtype')


def define_flags() -> flags.FlagValues:
  """The command's flags, apart from absl's global ones."""
  values = flags.FlagValues()
  define = {'flag_values': values, 'module_name': 'gqa_t5x.benchmark'}
  for name, (default, text) in LISTS.items():
    flags.DEFINE_list(name, default, text, **define)
  flags.DEFINE_integer('repeats', 7, 'Times, of which the median counts.', 5, **define)
  flags.DEFINE_enum('compare', None, ['t5x'], 'Measure T5X itself as well.', **define)
  flags.DEFINE_string('json', None, 'Write the rows to this file.', **define)
  flags.DEFINE_string('png', None, 'Draw seconds per sample to this file.', **define)
  flags.DEFINE_bool('help', False, 'Show this text.', short_name='h', **define)
  return values


def settings(args: flags.FlagValues) -> list[Setting]:
  """Returns every combination of what the flags list.

  Args:
    args: parsed flags.

  Returns:
    The settings, T5X's own after ours.

  Raises:
    BadSetting: for what is not a number, or an unknown size or dtype.
  """
  lists = {name: _values(name, args[name].value) for name in LISTS}
  ours = []
  for size in lists['size']:
    if size not in network.SIZES:
      raise BadSetting(f'size={size}; choose from {", ".join(network.SIZES)}.')
    num_heads = network.SIZES[size]['num_heads']
    divisors = [k for k in range(num_heads, 0, -1) if num_heads % k == 0]
    # Heads come last: those that differ in nothing else take turns.
    names = [n for n in LISTS if n not in ('size', 'num_kv_heads')]
    for values in itertools.product(*(lists[name] for name in names)):
      for num_kv_heads in lists['num_kv_heads'] or divisors:
        ours.append(
          Setting(
            size=size,
            num_kv_heads=num_kv_heads,
            **dict(zip(names, values, strict=True)),
          )
        )
  return with_t5x(ours) if args.compare else ours


def with_t5x(ours: Sequence[Setting]) -> list[Setting]:
  """Returns settings, each list of heads followed by T5X's own network once."""
  result = []
  for setting in ours:
    result.append(setting)
  for setting in ours:
    theirs = Setting(
      **(vars(setting) | {'num_kv_heads': setting.config.num_heads, 'system': 't5x'})
    )
    if theirs not in result:
      result.append(theirs)
  return sorted(result, key=_turn)


def _turn(setting: Setting) -> tuple[Any, ...]:
  """Settings that differ in heads and network only are neighbours."""
  values = vars(setting) | {'num_kv_heads': 0, 'system': ''}
  sizes = list(network.SIZES)
  return sizes.index(setting.size), *(v for n, v in values.items() if n != 'size')


def _values(name: str, words: Sequence[str] | None) -> list[Any]:
  if not words:
    return []
  if name in WORDS:
    known = {'size': network.SIZES, 'dtype': decode_benchmark.DTYPES}[name]
    unknown = [word for word in words if word not in known]
    if unknown:
      raise BadSetting(f'{name}={unknown[0]}; choose from {", ".join(known)}.')
    return list(words)
  try:
    return [int(word) for word in words]
  except ValueError as error:
    raise BadSetting(f'{name}={",".join(words)} must be whole numbers.') from error


def run(args: flags.FlagValues, argv: Sequence[str]) -> None:
  """Measures, prints a table and writes files.

  Args:
    args: parsed flags.
    argv: what the user typed, for the rows.

  Raises:
    BadSetting: for what cannot be measured or written, before anything is run.
  """
  if args.png:
    benchmark_report.check_matplotlib()
  for path in filter(None, (args.json, args.png)):
    if not pathlib.Path(path).absolute().parent.is_dir():
      raise BadSetting(f'{path}: there is no such folder.')
  command = ' '.join(['python -m gqa_t5x.benchmark', *argv[1:]])
  chosen = settings(args)
  for setting in chosen:
    setting.check()
  with benchmark_report.progress(len(chosen)) as advance:
    rows = decode_benchmark.measure(chosen, args.repeats, command, advance)
  benchmark_report.print_table(rows)
  if args.json:
    temporary = pathlib.Path(args.json + '.tmp')
    temporary.write_text(json.dumps(rows, indent=1))
    os.replace(temporary, args.json)
  if args.png:
    benchmark_report.draw(rows, pathlib.Path(args.png))


def main(argv: Sequence[str]) -> int:
  """The command.

  Args:
    argv: program name, 'decode', and flags.

  Returns:
    Exit code: 0, 1 for bad input.
  """
  args = define_flags()
  try:
    words = args(list(argv))[1:]
    if args.help:
      print(__doc__ + '\nFlags:' + args.module_help('gqa_t5x.benchmark'))
      return 0
    if words != ['decode']:
      raise BadSetting(f'say what to measure: decode, not {" ".join(words)!r}.')
    run(args, argv)
    return 0
  except (BadSetting, flags.Error) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1


if __name__ == '__main__':
  sys.exit(main(sys.argv))
