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
                              another, without the copies that go on meanwhile
  prepare_...                 decoding: before the first step
  seconds_per_sample          decoding: (prepare + output_length steps) * chips / batch

Exit code: 0 if it fits, 2 if not, 1 on an error, 130 or 143 when stopped.
"""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'  # The machine's own accelerator is left alone.

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags

from gqa_t5x import command_line, files, quiet
from gqa_t5x.analysis import models
from gqa_t5x.analysis.tpu import (
  decode_program,
  json_rows,
  layout_search,
  row_text,
  topology,
)
from gqa_t5x.analysis.tpu.json_rows import CompiledText
from gqa_t5x.errors import BadInput
from gqa_t5x.model import axes, quantize, sizes
from gqa_t5x.training import gin_command

# Flags: name, default and text.
WHOLE_NUMBERS = (
  ('num_kv_heads', None, "Key/value heads; the size's own by default, or MHA."),
  ('kv_head_dim', None, 'Size of a key/value head; the head size by default.'),
  ('num_layers', None, "Of encoder and decoder each; the size's by default."),
  ('batch_size', 8, 'Inputs decoded together, on the whole slice.'),
  ('input_length', 512, 'Tokens of each input.'),
  ('output_length', 64, 'Tokens decoded; positions of the self-attention cache.'),
  ('num_beams', 1, 'Beams of each input; 1 is greedy.'),
  ('model_partitions', None, 'Devices a copy of the model; all by default.'),
  ('max_batch_per_chip', 32, 'The largest batch that --search tries, per chip.'),
)


def define_flags() -> command_line.Command:
  """The flags of the command."""
  command = command_line.Command('gqa_t5x.tpu_compile', __doc__)
  text = 'The slice: GENERATION:SHAPE in chips, such as v4:2x2x2.'
  command.text('topology', None, text)
  text = 'What to compile; train if there is a gin file.'
  command.choice('mode', None, ('train', 'decode'), text)
  gin_command.gin_flags(command)
  command.choice('size', None, sizes.SIZES, 'Decoding: the model.')
  for name, default, text in WHOLE_NUMBERS:
    command.whole(name, default, text)
  text = 'Of parameters, activations and cache.'
  command.choice('dtype', 'bfloat16', models.DTYPES, text)
  text = 'Decoding: what is int8; --dtype is of all else.'
  command.choice('quantize', None, quantize.QUANTIZATIONS, text)
  text = 'How kept keys and values are split over them; by rule if not given.'
  command.choice('kv_sharding', None, axes.KV_SHARDINGS, text)
  text = 'Look for the best layout, whatever --batch_size says.'
  command.switch('search', False, text)
  command.text('json', None, 'Write the object to this file.')
  command.text('hlo', None, "Write the compiled program's text here.")
  return command


def run(args: flags.FlagValues, given: Sequence[str]) -> int:
  """Compiles what the flags say, prints and writes it; returns the exit code.

  `given` are the arguments as they were typed.
  """
  files.check_outputs(args.json, args.hlo)
  row, text = _compile(args)
  words = [word for word in given if not word.startswith(('--json', '--hlo'))]
  row['command'] = ' '.join(['python -m gqa_t5x.tpu_compile', *words])
  if args.json:
    files.write_json(args.json, row)
  if args.hlo and text:
    files.write_text(args.hlo, text)
  print(row_text.text(row))
  return 0 if row['fits'] else 2


def _compile(args: flags.FlagValues) -> CompiledText:
  if not args.topology:
    raise BadInput('--topology is missing; such as --topology=v4:2x2x2.')
  topology.parse(args.topology)
  mode = args.mode or ('train' if args.gin_file else 'decode')
  if mode == 'train' and not args.gin_file:
    raise BadInput('--gin_file is missing; see --help for an example.')
  if mode == 'decode' and args.size is None:
    raise BadInput('decoding needs --size, and training a --gin_file; see --help.')
  result = _train(args) if mode == 'train' else _decode(args)
  if result is None:
    raise BadInput(f'{args.topology}: nothing fits, with any number of partitions.')
  return result


def _lowering() -> Any:
  """The module that needs T5X, which --help need not wait for."""
  quiet.import_tensorflow()
  from gqa_t5x.training import lowering

  return lowering


def _decode(args: flags.FlagValues) -> CompiledText | None:
  devices = topology.devices(args.topology)
  partitions = args.model_partitions or len(devices)
  if len(devices) % partitions:
    raise BadInput(
      f'model_partitions={partitions} does not divide the {len(devices)} devices of'
      f' {args.topology}.'
    )
  fields = dataclasses.fields(decode_program.Setting)
  given = {field.name: args[field.name].value for field in fields}
  setting = decode_program.Setting(**given | {'model_partitions': partitions})
  if not args.search:
    return _compile_decoding(args.topology, setting)

  def compile_batch(M, batch_size):
    changed = dataclasses.replace(setting, model_partitions=M, batch_size=batch_size)
    return _shown(_compile_decoding(args.topology, changed))

  return layout_search.search_decode(
    len(devices),
    math.prod(topology.parse(args.topology)[1]),
    args.model_partitions,
    args.max_batch_per_chip,
    compile_batch,
  )


def _compile_decoding(slice_name: str, setting: decode_program.Setting) -> CompiledText:
  cfg = setting.config
  num_kv_heads = math.gcd(cfg.self_kv, cfg.cross_kv)
  with _refusals():
    partitioner = _lowering().decoding_partitioner(
      topology.devices(slice_name),
      setting.model_partitions,
      None if num_kv_heads == cfg.num_heads else num_kv_heads,
      setting.kv_sharding,
    )
    lowered = decode_program.lower(setting, partitioner)
  return json_rows.decode_row(slice_name, setting, partitioner.mesh, *lowered)


def _train(args: flags.FlagValues) -> CompiledText | None:
  def configure(*more):
    bindings = [*args.gin_bindings, *more]
    with _refusals():
      return _lowering().train_arguments(args.gin_file, bindings, args.gin_search_paths)

  if not args.search:
    return _compile_training(args.topology, configure())

  def compile_parts(M, microbatches):
    more = f'MODEL_PARTITIONS = {M}', f'NUM_MICROBATCHES = {microbatches}'
    row, text = _compile_training(args.topology, configure(*more))
    row['num_microbatches'] = microbatches
    return _shown((row, text))

  batch_size = configure()['train_dataset_cfg'].batch_size
  num_devices = len(topology.devices(args.topology))
  return layout_search.search_train(num_devices, batch_size, compile_parts)


def _compile_training(slice_name: str, arguments: dict[str, Any]) -> CompiledText:
  partitioner, data = arguments['partitioner'], arguments['train_dataset_cfg']
  partitioner.devices = topology.devices(slice_name)
  with _refusals():
    copies = partitioner.mesh.shape['data']
    if data.batch_size % copies:
      raise BadInput(
        f'BATCH_SIZE={data.batch_size} is not divisible by the {copies} copies of the'
        f' model on {slice_name}; set MODEL_PARTITIONS or BATCH_SIZE.'
      )
    lowered, state = _lowering().lower_train_step(**arguments)
  cfg = arguments['model'].module.config
  facts = {
    'num_kv_heads': cfg.cross_kv,
    'kv_head_dim': cfg.kv_head_dim,
    'batch_size': data.batch_size,
    'input_length': data.task_feature_lengths['inputs'],
    'output_length': data.task_feature_lengths['targets'],
    'dtype': str(jnp.dtype(cfg.dtype)),
  }
  return json_rows.train_row(slice_name, facts, partitioner.mesh, lowered, state)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
  """What gin, T5X and the model refuse is bad input."""
  try:
    yield
  except ValueError as error:
    raise BadInput(str(error)) from error


def _shown(result: CompiledText) -> CompiledText:
  """Tells the user what a search has tried."""
  print(row_text.headline(result[0]), file=sys.stderr, flush=True)
  return result


def main(argv: Sequence[str]) -> int:
  """The command; argv is program name and flags. Returns the exit code."""
  return define_flags().run(argv, functools.partial(run, given=argv[1:]))


if __name__ == '__main__':
  sys.exit(main(sys.argv))
