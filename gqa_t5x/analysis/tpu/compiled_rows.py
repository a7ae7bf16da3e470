"""Rows of what was compiled for a TPU slice: one JSON object each, all per chip."""

import importlib.metadata
import math
import platform
from typing import Any

import flax
import jax
from t5x import partitioning as t5x_partitioning

from gqa_t5x.analysis.benchmarks.settings import BadSetting
from gqa_t5x.analysis.hlo import traffic
from gqa_t5x.analysis.tpu import compile_decode, compile_train, program, topology
from gqa_t5x.analysis.tpu.chips import CHIPS, Chip
from gqa_t5x.model import axes, decode_cache
from gqa_t5x.training import partitioning

Row = dict[str, Any]


def decode_row(slice_name: str, setting: compile_decode.Decode) -> tuple[Row, str]:
  """Compiles decoding.

  A step is one token position of the whole batch with the cache full. `prepare` is what
  comes before the first: the encoder, and cross-attention K and V.

  Args:
    slice_name: such as `v4:2x2x2`.
    setting: what to decode.

  Returns:
    (the row, the text of the compiled program or '' if it does not fit).

  Raises:
    BadSetting: what cannot be compiled.
  """
  cfg, devices = setting.config, topology.devices(slice_name)
  num_kv_heads = math.gcd(cfg.self_kv, cfg.cross_kv)
  if num_kv_heads == cfg.num_heads:
    num_kv_heads = None
  M = setting.model_partitions
  try:
    rules = t5x_partitioning.standard_logical_axis_rules(
      additional_rules=axes.kv_head_rules(num_kv_heads, M, setting.kv_sharding)
    )
    partitioner = partitioning.Partitioner(num_partitions=M, logical_axis_rules=rules)
    partitioner.devices = devices
    lowered, parts = compile_decode.lower(setting, partitioner)
  except ValueError as error:
    raise BadSetting(str(error)) from error
  chip = _chip(slice_name)
  row = _row('decode', slice_name, len(devices), partitioner)
  row |= {
    'size': setting.size,
    'num_kv_heads': cfg.cross_kv,
    'batch_size': setting.batch_size,
    'input_length': setting.input_length,
    'output_length': setting.output_length,
    'num_beams': setting.num_beams,
    'dtype': setting.dtype,
    'kv_sharding': setting.kv_sharding,
    'num_layers': cfg.num_decoder_layers,
    'least_bytes_per_step': chip.devices * setting.least_bytes(len(devices)),
  }
  compiled = _compile(row, lowered, parts, chip)
  if compiled is None:
    return row, ''
  module = compiled.module
  loop = traffic.main_loop(module)
  steps = {traffic.main_loop(module, loop): decode_cache.MAX_PENDING}
  step = traffic.count(module, loop, steps) * (1 / decode_cache.MAX_PENDING)
  _add_step(row, program.cost(step, chip), chip)
  prepare = program.cost(traffic.count(module, trips={loop: 0} | steps), chip)
  row |= _named('prepare', prepare, chip)
  ms = row['prepare_roofline_ms'] + setting.output_length * row['roofline_ms']
  row['seconds_per_sample'] = 1e-3 * ms * row['chips'] / setting.batch_size
  return row, compiled.text


def train_row(slice_name: str, arguments: dict[str, Any]) -> tuple[Row, str]:
  """Compiles a training step.

  Args:
    slice_name: such as `v3:8x16`.
    arguments: of `compile_train.arguments`.

  Returns:
    (the row, the text of the compiled program or '' if it does not fit).

  Raises:
    BadSetting: what cannot be compiled.
  """
  devices = topology.devices(slice_name)
  partitioner, cfg = arguments['partitioner'], arguments['train_dataset_cfg']
  partitioner.devices = devices
  try:
    copies = partitioner.mesh.shape['data']
    if cfg.batch_size % copies:
      raise BadSetting(
        f'BATCH_SIZE={cfg.batch_size} is not divisible by the {copies} copies of the'
        f' model on {slice_name}; set MODEL_PARTITIONS or BATCH_SIZE.'
      )
    lowered, parts = compile_train.lower(**arguments)
  except ValueError as error:
    raise BadSetting(str(error)) from error
  model = arguments['model'].module.config
  chip = _chip(slice_name)
  row = _row('train', slice_name, len(devices), partitioner)
  row |= {
    'num_kv_heads': model.cross_kv,
    'batch_size': cfg.batch_size,
    'input_length': cfg.task_feature_lengths['inputs'],
    'output_length': cfg.task_feature_lengths['targets'],
    'dtype': str(jax.numpy.dtype(model.dtype)),
  }
  compiled = _compile(row, lowered, parts, chip)
  if compiled is None:
    return row, ''
  _add_step(row, program.cost(traffic.count(compiled.module), chip), chip)
  return row, compiled.text


def _chip(slice_name: str) -> Chip:
  return CHIPS[topology.parse(slice_name)[0]]


def _row(mode: str, slice_name: str, num_devices: int, partitioner: Any) -> Row:
  """What rows of both kinds begin with."""
  chip, chips = _chip(slice_name), math.prod(topology.parse(slice_name)[1])
  packages = ('jax', 'libtpu')
  return {
    'kind': 'tpu_compile',
    'source': 'compiled',
    'mode': mode,
    'topology': slice_name,
    'device': f'TPU {slice_name.partition(":")[0]}, {chips} chips',
    'chips': chips,
    'devices': num_devices,
    'model_partitions': partitioner.mesh.shape['model'],
    'data_partitions': partitioner.mesh.shape['data'],
    'hbm_capacity_bytes': chip.usable,
    'versions': {
      'python': platform.python_version(),
      'flax': flax.__version__,
      **{name: importlib.metadata.version(name) for name in packages},
    },
  }


def _compile(
  row: Row, lowered: Any, parts: dict[str, float], chip: Chip
) -> program.Program | None:
  """Compiles, and adds to the row what it holds; None if it does not fit."""
  n = chip.devices
  row |= {f'{name}_bytes': n * nbytes for name, nbytes in parts.items()}
  try:
    compiled = program.compile_program(lowered)
  except program.TooLarge as error:
    row |= {'fits': False, 'hbm_peak_bytes': n * error.needed}
    return None
  memory = compiled.memory
  row |= {
    'fits': True,
    'hbm_peak_bytes': n * memory.peak,
    'argument_bytes': n * memory.arguments,
    'activation_bytes': n * (memory.peak - memory.arguments - memory.code),
    'code_bytes': n * memory.code,
  }
  return compiled


def _named(part: str, cost: program.Cost, chip: Chip) -> Row:
  """Keys of what is done once a batch."""
  return {
    f'{part}_flops': cost.flops,
    f'{part}_hbm_bytes': cost.hbm_bytes,
    f'{part}_collective_bytes': cost.collective_bytes,
    f'{part}_roofline_ms': cost.roofline_ms(chip),
  }


def _add_step(row: Row, cost: program.Cost, chip: Chip) -> None:
  """Adds what a step does."""
  times = cost.times_ms(chip)
  row |= {
    'flops_per_step': cost.flops,
    'hbm_bytes_per_step': cost.hbm_bytes,
    'collective_bytes_per_step': cost.collective_bytes,
    'collectives_per_step': cost.collectives,
    **{f'{name}_ms': ms for name, ms in times.items()},
    'roofline_ms': cost.roofline_ms(chip),
    'cycles_per_step': cost.cycles,
  }
