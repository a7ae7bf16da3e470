"""Rows of what was compiled for a TPU slice: one JSON object each, all per chip.

`decode_row` and `train_row` return (the row, the text of the compiled program or '' if
it does not fit). `slice_name` is such as `v4:2x2x2`, and `mesh` is of its devices.
"""

import dataclasses
import importlib.metadata
import math
import platform
import re
from collections.abc import Mapping
from typing import Any

import flax
import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gqa_t5x.analysis.hlo import parse, traffic
from gqa_t5x.analysis.tpu import decode_program, topology
from gqa_t5x.analysis.tpu.chips import CHIPS, Chip
from gqa_t5x.model import decode_cache

CompiledRow = dict[str, Any]
CompiledText = tuple[CompiledRow, str]
UNITS = {'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
# What the compiler says of a program that is too large, in either of two ways.
TOO_LARGE = (
  r'Used ([\d.]+)([BKMGT]) of [\d.]+[BKMGT] hbm',
  r'\(([\d.]+)([BKMGT])\) exceeds available HBM',
)


class TooLarge(Exception):
  """A program does not fit; the argument is the bytes that one device would need."""


def decode_row(
  slice_name: str,
  setting: decode_program.Setting,
  mesh: Mesh,
  lowered: Any,
  params: Any,
  specs: Any,
) -> CompiledText:
  """Compiles decoding, of what `decode_program.lower` returns.

  A step is one token position of the whole batch with the cache full. `prepare` is what
  comes before the first: the encoder, and cross-attention K and V.
  """
  cfg, chip = setting.config, _chip(slice_name)
  row = _first_keys('decode', slice_name, mesh) | {
    **dataclasses.asdict(setting),
    'num_kv_heads': cfg.cross_kv,
    'num_layers': cfg.num_decoder_layers,
    'least_bytes_per_step': chip.devices * setting.least_bytes(mesh.size),
    'parameters_bytes': chip.devices * bytes_on_device(params, specs, mesh),
    'cache_bytes': chip.devices * setting.cost.cache_bytes / mesh.size,
  }
  text = _compile(row, lowered, chip)
  if not text:
    return row, text
  module = parse.parse(text)
  loop = traffic.main_loop(module)
  # In it, the steps between two moves of recent keys and values into the cache.
  steps = {traffic.main_loop(module, loop): decode_cache.MAX_PENDING}
  step = traffic.count(module, loop, steps) * (1 / decode_cache.MAX_PENDING)
  row |= _step_keys(step, chip)
  prepare = traffic.count(module, trips={loop: 0} | steps)
  row |= {
    'prepare_flops': chip.devices * prepare.flops,
    'prepare_hbm_bytes': chip.devices * prepare.hbm_bytes,
    'prepare_collective_bytes': chip.devices * sum(prepare.collectives.values()),
    'prepare_roofline_ms': max(least_ms(prepare, chip).values()),
  }
  ms = row['prepare_roofline_ms'] + setting.output_length * row['roofline_ms']
  row['seconds_per_sample'] = 1e-3 * ms * row['chips'] / setting.batch_size
  return row, text


def train_row(
  slice_name: str,
  facts: Mapping[str, Any],
  mesh: Mesh,
  lowered: Any,
  state: Mapping[str, tuple[Any, Any]],
) -> CompiledText:
  """Compiles a training step; `facts` are keys of the row that say what is trained.

  `state` maps parts of the train state to their shapes and PartitionSpecs.
  """
  chip = _chip(slice_name)
  row = _first_keys('train', slice_name, mesh) | facts
  for name, (shapes, specs) in state.items():
    nbytes = bytes_on_device(shapes, specs, mesh)
    row[f'{name}_bytes'] = chip.devices * nbytes
  text = _compile(row, lowered, chip)
  if text:
    row |= _step_keys(traffic.count(parse.parse(text)), chip)
  return row, text


def _chip(slice_name: str) -> Chip:
  return CHIPS[topology.parse(slice_name)[0]]


def _first_keys(mode: str, slice_name: str, mesh: Mesh) -> CompiledRow:
  generation, shape = topology.parse(slice_name)
  chips = math.prod(shape)
  return {
    'kind': 'tpu_compile',
    'source': 'compiled',
    'mode': mode,
    'topology': slice_name,
    'device': f'TPU {generation}, {chips} chips',
    'chips': chips,
    'devices': mesh.size,
    'model_partitions': mesh.shape['model'],
    'data_partitions': mesh.shape['data'],
    'hbm_capacity_bytes': CHIPS[generation].usable,
    'versions': {
      'python': platform.python_version(),
      'flax': flax.__version__,
      **{name: importlib.metadata.version(name) for name in ('jax', 'libtpu')},
    },
  }


def _compile(row: CompiledRow, lowered: Any, chip: Chip) -> str:
  """Compiles, adds to the row what the program holds, and returns its text, if any."""
  n = chip.devices
  try:
    compiled = compile_program(lowered)
  except TooLarge as error:
    row |= {'fits': False, 'hbm_peak_bytes': n * error.args[0]}
    return ''
  stats = compiled.memory_analysis()
  argument, code = stats.argument_size_in_bytes, stats.generated_code_size_in_bytes
  # The most at any time: arguments, results, activations, caches; and the code.
  peak = stats.peak_memory_in_bytes
  row |= {
    'fits': True,
    'hbm_peak_bytes': n * (peak + code),
    'argument_bytes': n * argument,
    'activation_bytes': n * (peak - argument),
    'code_bytes': n * code,
  }
  return compiled.as_text()


def _step_keys(counted: traffic.Traffic, chip: Chip) -> CompiledRow:
  n, times = chip.devices, least_ms(counted, chip)
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


def compile_program(lowered: Any) -> Any:
  """Returns `lowered.compile()`; TooLarge if a device has not enough memory."""
  with topology.quiet(TooLarge):
    try:
      return lowered.compile()
    except Exception as error:
      for pattern in TOO_LARGE:
        if found := re.search(pattern, str(error)):
          raise TooLarge(float(found[1]) * UNITS[found[2]]) from error
      raise


def bytes_on_device(shapes: Any, specs: Any, mesh: Mesh) -> float:
  """Returns what a tree of arrays takes on one device of a mesh, without padding.

  `specs` is the same tree of PartitionSpecs; None is replicated.
  """
  leaves = jax.tree.leaves(shapes)
  specs = jax.tree.leaves(specs, is_leaf=lambda x: x is None or isinstance(x, P))
  total = 0.0
  for x, spec in zip(leaves, specs, strict=True):
    names = jax.tree.leaves(tuple(spec or ()))
    total += x.size * x.dtype.itemsize / math.prod(mesh.shape[name] for name in names)
  return total


def least_ms(counted: traffic.Traffic, chip: Chip) -> dict[str, float]:
  """Returns the least time of what one device does at its chip's published peaks.

  That is milliseconds of products (`compute`), of `memory` and of `links`. All three
  can go on at once: the largest is the roofline.
  """
  received = sum(counted.collectives.values())
  return {
    'compute': 1e3 * chip.devices * counted.flops / chip.flops,
    'memory': 1e3 * chip.devices * counted.hbm_bytes / chip.bandwidth,
    'links': 1e3 * chip.devices * received / chip.links,
  }
