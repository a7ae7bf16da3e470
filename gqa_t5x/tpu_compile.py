"""Compiles training or decoding for a TPU slice, on any machine, without a TPU.

Says whether it fits, what one chip holds, computes, reads and receives, and how long
that takes at least. Needs the TPU compiler, which is installed with JAX for TPU:
pip install --constraint constraints.txt 'jax[tpu]'

  python -m gqa_t5x.tpu_compile --topology=v3:8x16 --gin_file=gin/uptrain_gqa8.gin

compiles the training step of a gin file (XXL takes minutes). Bindings as for t5x.train:
--gin.MODEL_PARTITIONS=16 --gin.NUM_MICROBATCHES=8. No path is needed: nothing is read.

  python -m gqa_t5x.tpu_compile --topology=v4:2x2x2 --size=xxl --num_kv_heads=8 \\
    --batch_size=128 --input_length=2048 --output_length=512

compiles decoding: encoder, cross-attention K and V, and the loop (XXL takes a minute).
--search looks for the number of model partitions, and the largest batch or the fewest
microbatches that fit, with the least time.

Slices, in chips: v3:4x4, v4:2x2x4, v5e:4x8, v5p:2x2x2, v6e:8x8. v3 has two devices a
chip.

--json writes one object. All its numbers are per chip, and those of decoding for one
token position of the whole batch, the cache being full:

  fits, hbm_peak_bytes, hbm_capacity_bytes   what the program needs, what a chip gives
  parameters_bytes, optimizer_bytes, cache_bytes   parts of it, without padding
  flops_per_step              of matrix products
  hbm_bytes_per_step          read and written, counted in the compiled program
  least_bytes_per_step        decoding: parameters once, keys and values once
  collective_bytes_per_step   received from other chips
  collectives_per_step        the same by kind
  compute_ms, memory_ms, links_ms   at the chip's published peaks
  roofline_ms                 the largest of the three
  cycles_per_step             the compiler's estimate of its instructions, one after
                              another, without the copies that go on beside them
  prepare_...                 decoding: before the first step
  seconds_per_sample          decoding: (prepare + output_length steps) * chips / batch

Exit code: 0 if it fits, 2 if not, 1 on an error.
"""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'  # The machine's own accelerator is left alone.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags, logging
from etils import epath
from t5x import gin_utils

from gqa_t5x.analysis.benchmarks.settings import DTYPES, BadSetting
from gqa_t5x.analysis.tpu import (
  compile_decode,
  compile_report,
  compile_search,
  compile_train,
  compiled_rows,
  topology,
)
from gqa_t5x.model import axes, sizes

MODES = ('train', 'decode')


def define_flags() -> flags.FlagValues:
  """The flags of the command, apart from absl's global ones."""
  values = flags.FlagValues()
  define = {'flag_values': values, 'module_name': 'gqa_t5x.tpu_compile'}

  def whole(name, default, text, least=1):
    flags.DEFINE_integer(name, default, text, least, **define)

  text = 'The slice: GENERATION:SHAPE in chips, such as v4:2x2x2.'
  flags.DEFINE_string('topology', None, text, **define)
  text = 'What to compile; train if there is a gin file.'
  flags.DEFINE_enum('mode', None, MODES, text, **define)
  text = 'Training: a gin file. May be repeated; later files override earlier ones.'
  flags.DEFINE_multi_string('gin_file', [], text, **define)
  text = 'NAME = VALUE, applied after the files; --gin.NAME=VALUE is short for it.'
  flags.DEFINE_multi_string('gin_bindings', [], text, **define)
  text = 'Comma-separated folders that hold the gin files.'
  flags.DEFINE_list('gin_search_paths', ['.'], text, **define)
  text = 'Decoding: the model.'
  flags.DEFINE_enum('size', None, list(sizes.SIZES), text, **define)
  whole('num_kv_heads', None, "Key/value heads; the size's own by default, or MHA.")
  whole('num_layers', None, "Of encoder and decoder each; the size's by default.")
  whole('batch_size', 8, 'Inputs decoded together, on the whole slice.')
  whole('input_length', 512, 'Tokens of each input.')
  whole('output_length', 64, 'Tokens decoded; positions of the self-attention cache.')
  whole('num_beams', 1, 'Beams of each input; 1 is greedy.')
  text = 'Of parameters, activations and cache.'
  flags.DEFINE_enum('dtype', 'bfloat16', list(DTYPES), text, **define)
  whole('model_partitions', None, 'Devices a copy of the model; all by default.')
  text = 'How kept keys and values are split over them; by rule if not given.'
  flags.DEFINE_enum('kv_sharding', None, list(axes.KV_SHARDINGS), text, **define)
  text = 'Look for the best layout, whatever --batch_size says.'
  flags.DEFINE_bool('search', False, text, **define)
  whole('max_batch_per_chip', 32, 'The largest batch that --search tries, per chip.')
  flags.DEFINE_string('json', None, 'Write the object to this file.', **define)
  flags.DEFINE_string('hlo', None, "Write the compiled program's text here.", **define)
  flags.DEFINE_bool('help', False, 'Show this text.', short_name='h', **define)
  return values


def compile_all(args: flags.FlagValues) -> tuple[dict[str, Any], str]:
  """Compiles what the flags say.

  Args:
    args: parsed flags.

  Returns:
    (the row, the text of the program).

  Raises:
    BadSetting: what cannot be compiled.
  """
  if not args.topology:
    raise BadSetting('--topology is missing; such as --topology=v4:2x2x2.')
  topology.parse(args.topology)
  mode = args.mode or ('train' if args.gin_file else 'decode')
  if mode == 'train':
    return _train(args)
  if args.size is None:
    raise BadSetting('decoding needs --size, and training a --gin_file; see --help.')
  return _decode(args)


def _seen(row: dict[str, Any]) -> None:
  print(compile_report.headline(row), file=sys.stderr, flush=True)


def _decode(args: flags.FlagValues) -> tuple[dict[str, Any], str]:
  num_devices = len(topology.devices(args.topology))
  partitions = args.model_partitions or num_devices
  if num_devices % partitions:
    raise BadSetting(
      f'model_partitions={partitions} does not divide the {num_devices} devices of'
      f' {args.topology}.'
    )
  setting = compile_decode.Decode(
    size=args.size,
    num_kv_heads=args.num_kv_heads,
    batch_size=args.batch_size,
    input_length=args.input_length,
    output_length=args.output_length,
    num_beams=args.num_beams,
    dtype=args.dtype,
    model_partitions=partitions,
    kv_sharding=args.kv_sharding,
    num_layers=args.num_layers,
  )
  if args.search:
    return compile_search.search_decode(
      args.topology, setting, args.model_partitions, args.max_batch_per_chip, _seen
    )
  return compiled_rows.decode_row(args.topology, setting)


def _train(args: flags.FlagValues) -> tuple[dict[str, Any], str]:
  if not args.gin_file:
    raise BadSetting('--gin_file is missing; see --help for an example.')
  configure = functools.partial(_configure, args)
  if args.search:
    return compile_search.search_train(args.topology, configure, _seen)
  return compiled_rows.train_row(args.topology, configure([]))


def _configure(args: flags.FlagValues, bindings: list[str]) -> dict[str, Any]:
  """Returns what t5x.train would get; errors of gin are BadSetting."""
  try:
    return compile_train.arguments(
      args.gin_file, [*args.gin_bindings, *bindings], args.gin_search_paths
    )
  except (ValueError, OSError) as error:
    raise BadSetting(' '.join(str(error).split())) from error


def _write(path: str, text: str) -> None:
  partial = epath.Path(path + '.partial')
  partial.write_text(text)
  partial.replace(path)


def main(argv: Sequence[str]) -> int:
  """The command.

  Args:
    argv: program name and flags.

  Returns:
    Exit code: 0 if it fits, 2 if not, 1 on an error, 130 when interrupted.
  """
  try:
    args = define_flags()
    rest = args(list(gin_utils.rewrite_gin_args(argv)))[1:]
    if args.help:
      print(f'{__doc__}\nFlags:{args.module_help("gqa_t5x.tpu_compile")}')
      return 0
    if rest:
      raise BadSetting(f'unexpected argument {rest[0]!r}; see --help.')
    for path in filter(None, (args.json, args.hlo)):
      if '://' not in path and not epath.Path(path).absolute().parent.is_dir():
        raise BadSetting(f'{path}: there is no such folder.')
    row, text = compile_all(args)
    given = [word for word in argv[1:] if not word.startswith(('--json', '--hlo'))]
    row['command'] = ' '.join(['python -m gqa_t5x.tpu_compile', *given])
    if args.json:
      _write(args.json, json.dumps(row, indent=1))
    if args.hlo and text:
      _write(args.hlo, text)
    print(compile_report.text(row))
    return 0 if row['fits'] else 2
  except (BadSetting, flags.Error) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('stopped', file=sys.stderr)
    return 130


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  sys.exit(main(sys.argv))
