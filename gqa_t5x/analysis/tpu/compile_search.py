"""Finds the layout of a TPU slice that serves best: partitions, batch, microbatches."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from gqa_t5x.analysis.benchmarks.settings import BadSetting
from gqa_t5x.analysis.tpu import compiled_rows, topology
from gqa_t5x.analysis.tpu.compile_decode import Decode
from gqa_t5x.analysis.tpu.compiled_rows import Row

Result = tuple[Row, str]


def search_decode(
  slice_name: str,
  setting: Decode,
  partitions: int | None,
  most_per_chip: int,
  seen: Callable[[Row], None],
) -> Result:
  """Finds the model partitions that decode fastest, each with its largest batch.

  Args:
    slice_name: such as `v4:2x2x2`.
    setting: what to decode; its batch size and model partitions are replaced.
    partitions: model partitions; None tries all.
    most_per_chip: the largest batch, inputs a chip.
    seen: called with the row of everything that was compiled.

  Returns:
    The row with the least seconds per sample, and its text.

  Raises:
    BadSetting: nothing fits.
  """
  chips = math.prod(topology.parse(slice_name)[1])

  def compile_batch(M: int, per_chip: int) -> Result:
    result = compiled_rows.decode_row(
      slice_name,
      dataclasses.replace(setting, batch_size=per_chip * chips, model_partitions=M),
    )
    seen(result[0])
    return result

  found = []
  for M in [partitions] if partitions else _partitions(slice_name):
    copies = len(topology.devices(slice_name)) // M
    # A chip gets whole inputs, and every copy of the model as many as the others.
    units = [n for n in range(1, most_per_chip + 1) if n * chips % copies == 0]
    result = largest(units, lambda n, M=M: compile_batch(M, n))
    if result is not None:
      found.append(result)
  return _best(found, 'seconds_per_sample', slice_name)


def search_train(
  slice_name: str,
  configure: Callable[[list[str]], dict[str, Any]],
  seen: Callable[[Row], None],
) -> Result:
  """Finds the model partitions that train fastest, each with the fewest microbatches.

  Args:
    slice_name: such as `v3:8x16`.
    configure: from further gin bindings to `compile_train.arguments`.
    seen: called with the row of everything that was compiled.

  Returns:
    The row with the least time by the roofline, and its text.

  Raises:
    BadSetting: nothing fits.
  """
  num_devices = len(topology.devices(slice_name))

  def compile_parts(partitions: int, microbatches: int) -> Result:
    bindings = [
      f'MODEL_PARTITIONS = {partitions}',
      f'NUM_MICROBATCHES = {microbatches}',
    ]
    row, text = compiled_rows.train_row(slice_name, configure(bindings))
    row['num_microbatches'] = microbatches
    seen(row)
    return row, text

  batch_size = configure([])['train_dataset_cfg'].batch_size
  found = []
  for partitions in _partitions(slice_name):
    rows = batch_size // (num_devices // partitions)  # of a copy of the model
    parts = [n for n in _powers_of_two(rows) if rows % n == 0]
    if batch_size % (num_devices // partitions) == 0:
      sizes = [rows // n for n in reversed(parts)]
      result = largest(sizes, lambda n, p=partitions, r=rows: compile_parts(p, r // n))
      if result is not None:
        found.append(result)
  return _best(found, 'roofline_ms', slice_name)


def largest(sizes: list[int], compile_size: Callable[[int], Result]) -> Result | None:
  """Returns the largest size that fits, or None.

  Every program says how much it needs, also one that does not fit; all but what a chip
  must hold in any case grows with the size, so that the next guess is near.

  Args:
    sizes: in ascending order.
    compile_size: from a size to its row.
  """
  low, high, best = 0, len(sizes), None  # sizes[:low] fit, sizes[high:] do not
  guess = high - 1
  while low < high:
    row, text = compile_size(sizes[guess])
    if row['fits']:
      low, best = guess + 1, (row, text)
    else:
      high = guess
    fixed = row['parameters_bytes'] + row.get('optimizer_bytes', 0)
    room = row['hbm_capacity_bytes'] - fixed
    size = sizes[guess] * room / (row['hbm_peak_bytes'] - fixed)
    guess = min(high - 1, max(low, sum(n <= size for n in sizes) - 1))
  return best


def _partitions(slice_name: str) -> Iterator[int]:
  """All powers of two that divide the devices, the largest first."""
  num_devices = len(topology.devices(slice_name))
  return (n for n in reversed(_powers_of_two(num_devices)) if num_devices % n == 0)


def _powers_of_two(most: int) -> list[int]:
  return [2**i for i in range(most.bit_length())]


def _best(found: list[Result], key: str, slice_name: str) -> Result:
  if not found:
    raise BadSetting(f'{slice_name}: nothing fits, with any number of partitions.')
  return min(found, key=lambda result: result[0][key])
