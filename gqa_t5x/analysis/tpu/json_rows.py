"""Rows of what was compiled for a TPU slice: one JSON object each, all per chip."""

import importlib.metadata
import math
import platform
from collections.abc import Mapping
from typing import Any

import flax
from jax.sharding import Mesh

from gqa_t5x.analysis.hlo import traffic
from gqa_t5x.analysis.tpu import decode_program, program, topology
from gqa_t5x.analysis.tpu.chips import CHIPS, Chip
from gqa_t5x.model import decode_cache

CompiledRow = dict[str, Any]


def decode_row(
  slice_name: str,
  setting: decode_program.Setting,
  mesh: Mesh,
  lowered: Any,
  params: Any,
  specs: Any,
) -> tuple[CompiledRow, str]:
  """Compiles decoding.

  A step is one token position of the whole batch with the cache full. `prepare` is what
  comes before the first: the encoder, and cross-attention K and V.

  Args:
    slice_name: such as `v4:2x2x2`.
    setting: what to decode.
    mesh: of the slice's devices.
    lowered, params, specs: of `decode_program.lower`.

  Returns:
    (the row, the text of the compiled program or '' if it does not fit).
  """
  cfg, chip = setting.config, _chip(slice_name)
  row = _first_keys('decode', slice_name, mesh) | {
    'size': setting.size,
    'num_kv_heads': cfg.cross_kv,
    'batch_size': setting.batch_size,
    'input_length': setting.input_length,
    'output_length': setting.output_length,
    'num_beams': setting.num_beams,
    'dtype': setting.dtype,
    'kv_sharding': setting.kv_sharding,
    'num_layers': cfg.num_decoder_layers,
    'least_bytes_per_step': chip.devices * setting.least_bytes(mesh.size),
    'parameters_bytes': chip.devices * program.bytes_on_device(params, specs, mesh),
    'cache_bytes': chip.devices * setting.cost.cache_bytes / mesh.size,
  }
  compiled = _compile(row, lowered, chip)
  if compiled is None:
    return row, ''
  module = compiled.module
  loop = traffic.main_loop(module)
  # In it, the steps between two moves of recent keys and values into the cache.
  steps = {traffic.main_loop(module, loop): decode_cache.MAX_PENDING}
  step = traffic.count(module, loop, steps) * (1 / decode_cache.MAX_PENDING)
  row |= _step_keys(step, chip)
  row |= _prepare_keys(traffic.count(module, trips={loop: 0} | steps), chip)
  ms = row['prepare_roofline_ms'] + setting.output_length * row['roofline_ms']
  row['seconds_per_sample'] = 1e-3 * ms * row['chips'] / setting.batch_size
  return row, compiled.text


def train_row(
  slice_name: str,
  facts: Mapping[str, Any],
  mesh: Mesh,
  lowered: Any,
  state: Mapping[str, tuple[Any, Any]],
) -> tuple[CompiledRow, str]:
  """Compiles a training step.

  Args:
    slice_name: such as `v3:8x16`.
    facts: keys of the row that say what is trained.
    mesh: of the slice's devices.
    lowered: the step.
    state: part of the train state -> its shapes and PartitionSpecs.

  Returns:
    (the row, the text of the compiled program or '' if it does not fit).
  """
  chip = _chip(slice_name)
  row = _first_keys('train', slice_name, mesh) | facts
  for name, (shapes, specs) in state.items():
    nbytes = program.bytes_on_device(shapes, specs, mesh)
    row[f'{name}_bytes'] = chip.devices * nbytes
  compiled = _compile(row, lowered, chip)
  if compiled is None:
    return row, ''
  row |= _step_keys(traffic.count(compiled.module), chip)
  return row, compiled.text


def _chip(slice_name: str) -> Chip:
  return CHIPS[topology.parse(slice_name)[0]]


def _first_keys(mode: str, slice_name: str, mesh: Mesh) -> CompiledRow:
  chip, chips = _chip(slice_name), math.prod(topology.parse(slice_name)[1])
  packages = ('jax', 'libtpu')
  return {
    'kind': 'tpu_compile',
    'source': 'compiled',
    'mode': mode,
    'topology': slice_name,
    'device': f'TPU {slice_name.partition(":")[0]}, {chips} chips',
    'chips': chips,
    'devices': mesh.size,
    'model_partitions': mesh.shape['model'],
    'data_partitions': mesh.shape['data'],
    'hbm_capacity_bytes': chip.usable,
    'versions': {
      'python': platform.python_version(),
      'flax': flax.__version__,
      **{name: importlib.metadata.version(name) for name in packages},
    },
  }


def _compile(row: CompiledRow, lowered: Any, chip: Chip) -> program.Program | None:
  """Compiles, and adds to the row what it holds; None if it does not fit."""
  n = chip.devices
  try:
    compiled = program.compile_program(lowered)
  except program.TooLarge as error:
    row |= {'fits': False, 'hbm_peak_bytes': n * error.needed}
    return None
  argument, code = compiled.argument_bytes, compiled.code_bytes
  row |= {
    'fits': True,
    'hbm_peak_bytes': n * compiled.peak_bytes,
    'argument_bytes': n * argument,
    'activation_bytes': n * (compiled.peak_bytes - argument - code),
    'code_bytes': n * code,
  }
  return compiled


def _prepare_keys(counted: traffic.Traffic, chip: Chip) -> CompiledRow:
  """Keys of what is done once a batch."""
  n = chip.devices
  return {
    'prepare_flops': n * counted.flops,
    'prepare_hbm_bytes': n * counted.hbm_bytes,
    'prepare_collective_bytes': n * sum(counted.collectives.values()),
    'prepare_roofline_ms': max(program.least_ms(counted, chip).values()),
  }


def _step_keys(counted: traffic.Traffic, chip: Chip) -> CompiledRow:
  """Keys of what a step does."""
  n, times = chip.devices, program.least_ms(counted, chip)
  received = {kind: n * nbytes for kind, nbytes in counted.collectives.items()}
  return {
    'flops_per_step': n * counted.flops,
    'hbm_bytes_per_step': n * counted.hbm_bytes,
    'collective_bytes_per_step': sum(received.values()),
    'collectives_per_step': received,
    **{f'{name}_ms': ms for name, ms in times.items()},
    'roofline_ms': max(times.values()),
    'cycles_per_step': counted.cycles,
  }
