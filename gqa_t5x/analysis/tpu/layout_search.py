"""Finds the layout of a TPU slice that serves best: partitions, batch, microbatches."""

import functools
from collections.abc import Callable, Iterable, Sequence

from gqa_t5x.analysis.tpu.json_rows import CompiledText

# From model partitions and a number, such as the batch size, to the result.
Compile = Callable[[int, int], CompiledText]


def search_decode(
  num_devices: int,
  chips: int,
  partitions: int | None,
  most_per_chip: int,
  compile_batch: Compile,
) -> CompiledText | None:
  """Finds the model partitions that decode fastest, each with its largest batch.

  That is with the least seconds per sample; None if nothing fits.

  Args:
    num_devices, chips: of the slice.
    partitions: model partitions; None tries all.
    most_per_chip: the largest batch, inputs a chip.
    compile_batch: takes the batch size.
  """

  def batches(M):
    """A chip gets whole inputs, and every copy of the model as many as the others."""
    copies = num_devices // M
    found = (n * chips for n in range(1, most_per_chip + 1))
    return [batch for batch in found if batch % copies == 0]

  tried = [partitions] if partitions else _powers_of_two(num_devices)
  return _best(tried, batches, compile_batch, 'seconds_per_sample')


def search_train(
  num_devices: int, batch_size: int, compile_parts: Compile
) -> CompiledText | None:
  """Finds the model partitions that train fastest, each with the fewest microbatches.

  That is with the least time by the roofline; None if nothing fits. `compile_parts`
  takes the number of microbatches.
  """

  def rows_together(M):
    """Rows of a microbatch on one copy of the model."""
    rows, rest = divmod(batch_size, num_devices // M)
    return [] if rest else [rows // n for n in _powers_of_two(rows)]

  def compile_rows(M, together):
    return compile_parts(M, batch_size // (num_devices // M) // together)

  return _best(_powers_of_two(num_devices), rows_together, compile_rows, 'roofline_ms')


def _best(
  partitions: Iterable[int],
  sizes_of: Callable[[int], Sequence[int]],
  compile_size: Compile,
  key: str,
) -> CompiledText | None:
  """Returns the result with the least `key`, of the largest sizes that fit."""
  found = (largest(sizes_of(M), functools.partial(compile_size, M)) for M in partitions)
  return min(filter(None, found), key=lambda result: result[0][key], default=None)


def largest(
  sizes: Sequence[int], compile_size: Callable[[int], CompiledText]
) -> CompiledText | None:
  """Returns the result of the largest of ascending sizes that fits, or None.

  Every program says how much it needs, also one that does not fit; all but what a chip
  must hold in any case grows with the size, so that the next guess is near.
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


def _powers_of_two(number: int) -> list[int]:
  """Returns all powers of two that divide a number, the largest first."""
  found = (2**i for i in reversed(range(number.bit_length())))
  return [n for n in found if number % n == 0]
