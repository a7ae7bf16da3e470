"""Measures what grouped-query attention buys, on this machine: CPU, GPU or TPU.

  python -m gqa_t5x.benchmark decode --size=base --num_kv_heads=12,4,1

times a decode step of T5.1.1-base with 12, 4 and 1 key/value heads, and says what the
memory bus allows. Weights are random: what a step costs does not depend on them. Needs
JAX and Flax only. Any flag of a setting takes a comma list; all combinations are
measured, and those that fit into memory together take turns:

  python -m gqa_t5x.benchmark decode --size=xxl --dtype=bfloat16 --batch_size=64 \\
    --input_length=2048 --output_length=512 --json=rows.json --png=heads.png

--compare=t5x adds T5X's own network and decoding, where T5X is installed:

  python -m gqa_t5x.benchmark decode --size=base --input_length=512,2048 --compare=t5x

--compare=ctranslate2 adds CTranslate2 (pip install 'gqa_t5x[ctranslate2]') with the
same heads, in float32 and with weights in int8; on one core of a CPU:

  taskset -c 0 python -m gqa_t5x.benchmark decode --compare=ctranslate2

Two more things can be measured; the last one needs what conversion needs:

  python -m gqa_t5x.benchmark train --size=base --num_kv_heads=12,4
  python -m gqa_t5x.benchmark convert --size=large --work_dir=/path/on/that/disk

For a GPU or TPU that is there for a few minutes, all that is wanted of it, the most
wanted first; --size=tiny tries the command on a CPU:

  python -m gqa_t5x.benchmark accelerator --minutes=8 --json=rows.json

--json writes one row a setting. In addition to the setting it holds, for `decode`:

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

Of CTranslate2 in int8 the times alone.

for `train` (forward and backward pass, no optimizer):

  ms_per_step, tokens_per_s (of inputs and targets), flops_per_step (by formula),
  gflop_per_s, matmul_gflop_per_s (products of as many rows), matmul_fraction

for `convert`:

  seconds                of the conversion, until the result is on the disk
  cp_seconds             `cp -r` of the source and `sync`, in turn with it
  cp_fraction            cp_seconds / seconds
  input_bytes, output_bytes, gb_per_s (of the input), peak_mb (resident, 1e6 bytes)

for `accelerator` rows of `decode` and `train`, in bfloat16 (float32 on a CPU), with all
key/value heads, an eighth of them, and one; and in addition:

  part                   heads, largest batch (that fits), beams (4, an eighth of the
                         batch), int8 (weights; weights and cache), training (of large,
                         if the size is xxl), beside T5X (of base; T5X's network where
                         it is installed), with encoder
  seconds                that the row took, compilation included

What decodes does so from made-up keys and values, but for the last part. A part
that is not expected to end in time is left out. A GPU's memory is taken but for 5%,
unless XLA_CLIENT_MEM_FRACTION says otherwise. Exit code: 0, or 1 if a part failed.
"""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from gqa_t5x import command_line, files, quiet
from gqa_t5x.analysis import models
from gqa_t5x.analysis.benchmarks import table_and_figure
from gqa_t5x.errors import BadInput
from gqa_t5x.model import quantize, sizes

FILL = 'fill'  # --batch_size of as many as fit
T5X, CTRANSLATE2 = 't5x', 'ctranslate2'  # of --compare
# Systems, as rows call them -> how CTranslate2 stores the weights.
CT2_SYSTEMS = {'ctranslate2': 'float32', 'ctranslate2_int8': 'int8'}
ACCELERATOR = 'accelerator'
# How much of a GPU's memory JAX takes, by the newer name and the older one.
MEMORY_SHARES = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')
PARTIAL = '.partial'  # the file of --json while it grows
FLOAT = 'none'  # of --quantize
WORDS = {'size': sizes.SIZES, 'dtype': models.DTYPES, 'method': (), 'compression': ()}
WORDS['quantize'] = (FLOAT, *quantize.QUANTIZATIONS)

_SIZE = ('base', 'Model sizes: ' + ', '.join(sizes.SIZES) + '.')
_HEADS = "Key/value heads; by default the size's own, or every divisor of its heads."
_SIZES = 'Size of a key/value head; the head size by default.'
# Benchmark -> the flags that take a comma list of settings: default and text.
LISTS = {
  'decode': {
    'size': _SIZE,
    'num_kv_heads': (None, _HEADS),
    'kv_head_dim': (None, _SIZES),
    'batch_size': ('8', 'Inputs decoded together; fill: as many as fit, by eights.'),
    'input_length': ('512', 'Tokens of each input.'),
    'output_length': ('64', 'Tokens decoded; positions of the self-attention cache.'),
    'dtype': ('float32', 'Of parameters, activations and cache: float32 or bfloat16.'),
    'num_beams': ('1', 'Beams of each input; 1 is greedy.'),
    'quantize': (FLOAT, 'What is int8: ' + ', '.join(WORDS['quantize']) + '.'),
  },
  'train': {
    'size': _SIZE,
    'num_kv_heads': (None, _HEADS),
    'kv_head_dim': (None, _SIZES),
    'batch_size': ('8', 'Examples of a batch.'),
    'input_length': ('512', 'Tokens of each input.'),
    'target_length': ('128', 'Tokens of each target.'),
    'dtype': (
      'float32',
      'Of activations, float32 or bfloat16; parameters are float32.',
    ),
  },
  'convert': {
    'size': _SIZE,
    'num_kv_heads': (None, 'Key/value heads; by default a quarter of the heads.'),
    'method': ('mean', 'Of conversion, as of gqa_t5x.convert.'),
    'compression': ('none,zstd', 'Of the result, as of gqa_t5x.convert.'),
  },
  ACCELERATOR: {},
}
# Flags of ACCELERATOR: default, text and least number.
NUMBERS = {
  'batch_size': (64, 'Inputs decoded together.', 1),
  'input_length': (2048, 'Tokens of each input.', 1),
  'output_length': (32, 'Tokens decoded; positions of the self-attention cache.', 4),
  'minutes': (8, 'What is not expected to end in time is left out.', 1),
}


def define_flags(name: str) -> command_line.Command:
  """The flags of a benchmark, a key of LISTS."""
  doc = f'{__doc__}\nThese are the flags of `{name}`; others: benchmark NAME --help.'
  command = command_line.Command('gqa_t5x.benchmark', doc, max_words=1)
  for flag, (default, text) in LISTS[name].items():
    command.words(flag, default, text)
  few, least = (3, 1) if name in ('convert', ACCELERATOR) else (7, 5)
  command.whole('repeats', few, 'Times, of which the median counts.', least)
  command.text('json', None, 'Write the rows to this file.')
  if name == 'convert':
    command.text('work_dir', '.', 'A folder on the disk to measure.')
  elif name == ACCELERATOR:
    command.choice('size', 'xxl', sizes.SIZES, 'The model.')
    for flag, (default, text, least) in NUMBERS.items():
      command.whole(flag, default, text, least)
  else:
    known = [T5X, CTRANSLATE2] if name == 'decode' else [T5X]
    command.choice('compare', None, known, 'Measure this program as well.')
  if name == 'decode':
    command.text('png', None, 'Draw seconds per sample to this file.')
  return command


def run(args: flags.FlagValues, name: str | None = None) -> int:
  """Measures, prints a table and writes files; BadInput comes before anything is run.

  A benchmark's `measure(chosen, repeats, command)` yields rows in the order of the
  settings; those that fit into memory together take turns, and the median of so many
  repeats counts.
  """
  if name not in LISTS:
    raise BadInput(f'say what to measure: {", ".join(LISTS)}; not {name!r}.')
  png = getattr(args, 'png', None)
  files.check_outputs(args.json, png)
  if png:
    table_and_figure.check_figure(png)
  if name == ACCELERATOR:
    return _run_accelerator(args)
  quiet.find_devices()
  module = _module(name)
  measure = functools.partial(module.measure, command=_command(name, args))
  if name == 'convert':
    if not pathlib.Path(args.work_dir).is_dir():
      raise BadInput(f'work_dir={args.work_dir}: there is no such folder.')
    measure = functools.partial(measure, work_dir=args.work_dir)
  elif args.compare:
    others = _ctranslate2() if args.compare == CTRANSLATE2 else _t5x(name)
    measure = functools.partial(measure, others=others)
  lists = {flag: args[flag].value for flag in LISTS[name]}
  chosen = settings(name, lists, getattr(args, 'compare', None))
  for setting in chosen:
    setting.check()
  measured = measure(chosen, args.repeats)
  rows = _kept(table_and_figure.progress(measured, len(chosen)), args.json)
  table_and_figure.print_table(rows, module.COLUMNS)
  if png:
    table_and_figure.draw(rows, pathlib.Path(png))
  return 0


def _kept(measured: Iterable[dict[str, Any]], path: str | None) -> list[dict[str, Any]]:
  """Returns the rows, and writes them to a file, if there is a path."""
  rows = []
  keeps = path and not files.is_stream(path)
  for row in measured:
    rows.append(row)
    if keeps:  # What was measured is not lost if the rest is stopped.
      files.write_json(path + PARTIAL, rows)
  if path:
    files.write_json(path, rows)
  if keeps:
    epath.Path(path + PARTIAL).unlink(missing_ok=True)
  return rows


def _run_accelerator(args: flags.FlagValues) -> int:
  """Measures the parts in their order, prints each, a table and the targets."""
  deadline = time.monotonic() + 60 * args.minutes
  if not any(share in os.environ for share in MEMORY_SHARES):
    os.environ[MEMORY_SHARES[0]] = '.95'
  quiet.find_devices()
  module, failed = _module(ACCELERATOR), []
  wanted = module.parts(
    args.size, args.batch_size, args.input_length, args.output_length
  )
  command = _command(ACCELERATOR, args)
  t5x = functools.partial(_t5x, 'decode')
  rows = _kept(
    module.measure(wanted, args.repeats, command, deadline, t5x, failed), args.json
  )
  if rows:
    table_and_figure.print_table(rows, module.COLUMNS)
  for line in module.verdicts(rows, args.size):
    print(line)
  return 1 if failed or not rows else 0


def _module(name: str) -> Any:
  """Returns the module of a benchmark: its COLUMNS, Setting and measure."""
  try:
    return importlib.import_module(f'gqa_t5x.analysis.benchmarks.{name}_benchmark')
  except ImportError as error:
    raise BadInput(
      f'{name} needs {error.name}, which is not installed;'
      " pip install 'gqa_t5x[train]'."
    ) from error


def _t5x(name: str) -> Any:
  """Returns what `measure` of decode or train takes as the others."""
  try:
    quiet.import_tensorflow()
    from gqa_t5x.training import t5x_baseline
  except ImportError as error:
    raise BadInput(
      "--compare=t5x needs T5X's own example network (t5x.examples.t5), which is not"
      ' installed; run make setup ENGINE=t5x.'
    ) from error
  if name == 'train':
    return {T5X: t5x_baseline.network}
  from gqa_t5x.analysis.benchmarks import timing

  def decoder(*args):
    prepare, decode = t5x_baseline.decoder(*args)
    return prepare, functools.partial(timing.slope, decode)

  return {T5X: decoder}


def _ctranslate2() -> Any:
  """Returns what `measure` of decode takes as the others."""
  if importlib.util.find_spec('ctranslate2') is None:
    raise BadInput(
      "--compare=ctranslate2 needs ctranslate2: pip install 'gqa_t5x[ctranslate2]'."
    )
  from gqa_t5x.analysis.benchmarks import ctranslate2_decoder

  return {
    system: functools.partial(ctranslate2_decoder.decoder, quantization)
    for system, quantization in CT2_SYSTEMS.items()
  }


def _command(name: str, args: flags.FlagValues) -> str:
  """Returns what to type for the same rows, wherever they are written."""
  given = [
    args[flag].serialize()
    for flag in dict.fromkeys((*LISTS[name], 'size', *NUMBERS, 'repeats', 'compare'))
    if flag in args and args[flag].present
  ]
  return ' '.join(['python -m gqa_t5x.benchmark', name, *given])


def settings(
  name: str, lists: Mapping[str, Sequence[str] | None], compare: str | None
) -> list[Any]:
  """Returns every combination of what the flags of a benchmark list.

  Args:
    name: a key of LISTS.
    lists: flag -> the words that were given, refused where they cannot be.
    compare: what follows each list of heads: T5X's own network once, or CTranslate2
      with the same heads.
  """
  make = _module(name).Setting
  values = {flag: _values(name, flag, words) for flag, words in lists.items()}
  if 'kv_head_dim' in values:
    values['kv_head_dim'] = values['kv_head_dim'] or [None]
  # Heads come last: those that differ in nothing else take turns.
  others = [flag for flag in values if flag not in ('size', 'num_kv_heads')]
  found = []
  for size, *rest in itertools.product(
    values['size'], *(values[flag] for flag in others)
  ):
    fields = dict(zip(others, rest, strict=True), size=size)
    if fields.get('quantize') == FLOAT:
      fields['quantize'] = None
    heads = values['num_kv_heads'] or _default_heads(name, size)
    ours = [make(num_kv_heads=num_kv_heads, **fields) for num_kv_heads in heads]
    if fields.get('batch_size') == FILL:
      ours = [setting.filled() for setting in ours]
    found += ours
    if compare == CTRANSLATE2:
      if (R := fields['kv_head_dim']) is not None:
        raise BadInput(
          f'kv_head_dim={R}: CTranslate2 has no such heads; leave out --kv_head_dim or'
          ' --compare=ctranslate2.'
        )
      if fields['dtype'] != 'float32':
        raise BadInput(
          f'dtype={fields["dtype"]}: CTranslate2 is compared in float32 alone.'
        )
      found += dict.fromkeys(
        dataclasses.replace(one, system=system, quantize=None)
        for system in CT2_SYSTEMS
        for one in ours
      )
    elif compare:
      changes = {'num_kv_heads': sizes.SIZES[size]['num_heads'], 'kv_head_dim': None}
      changes['system'] = T5X
      if name == 'decode':
        changes['quantize'] = None
      found += dict.fromkeys(dataclasses.replace(one, **changes) for one in ours)
  return found


def _default_heads(name: str, size: str) -> list[int]:
  num_heads = sizes.SIZES[size]['num_heads']
  if name == 'convert':
    return [max(1, num_heads // 4)]
  own = sizes.SIZES[size].get('num_kv_heads')
  return [own] if own else [k for k in range(num_heads, 0, -1) if num_heads % k == 0]


def _values(name: str, flag: str, words: Sequence[str] | None) -> list[Any]:
  if not words:
    return []
  if known := WORDS.get(flag):
    for word in words:
      if word not in known:
        raise BadInput(f'{flag}={word}; choose from {", ".join(known)}.')
  if flag in WORDS:
    return list(words)
  can_fill = name == 'decode' and flag == 'batch_size'
  try:
    found = [FILL if word == FILL and can_fill else int(word) for word in words]
  except ValueError as error:
    raise BadInput(f'{flag}={",".join(words)} must be whole numbers.') from error
  if any(number != FILL and number > command_line.MOST for number in found):
    raise BadInput(f'{flag} must be at most {command_line.MOST}.')
  return found


def main(argv: Sequence[str]) -> int:
  """The command; argv is program name, a key of LISTS, and flags."""
  words = [word for word in argv[1:] if not word.startswith('-')]
  name = words[0] if words and words[0] in LISTS else 'decode'
  stopped = f'stopped; rows until then: --json{PARTIAL}'
  return define_flags(name).run(argv, run, stopped=stopped)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
