"""Times compiled functions, and what the machine itself can do in the same process.

Everything is warmed up first; a number is the median over repeats, and things that are
compared take turns.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Far larger than any cache of a processor, far smaller than the memory of a device.
STREAM_BYTES = {'cpu': 2**29, 'gpu': 2**32, 'tpu': 2**31}
# Enough arithmetic to time: about a second of a CPU, some ten milliseconds of others.
PRODUCT_FLOPS = {'cpu': 1e11, 'gpu': 1e13, 'tpu': 1e13}
MACHINE_REPEATS = 5
ENOUGH_S = 10.0  # `median_seconds` begins no call after so many seconds of calls.


def seconds(run: Callable[[], Any]) -> float:
  """Returns the seconds of one call, until its result is there."""
  tick = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - tick


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
  """Returns the median seconds of a call, of so many repeats at most."""
  jax.block_until_ready(run())
  times = []
  while len(times) < repeats and sum(times) < ENOUGH_S:
    times.append(seconds(run))
  return statistics.median(times)


def medians(runs: Sequence[Callable[[], float]], repeats: int) -> list[float]:
  """Returns the median of what each function measures; they take turns."""
  rounds = [[run() for run in runs] for _ in range(repeats)]
  return [statistics.median(values) for values in zip(*rounds, strict=True)]


def slope(run: Callable[[int], Any], few: int, many: int) -> float:
  """Returns the seconds of one more step of a function that does so many steps.

  (Seconds of many - seconds of few) / (many - few): what does not grow with the steps
  drops out.
  """
  short, long = seconds(lambda: run(few)), seconds(lambda: run(many))
  return (long - short) / (many - few)


def slopes(
  measures: Sequence[Callable[[int, int], float]],
  counts: tuple[int, int],
  repeats: int,
) -> list[float]:
  """Returns the median of the seconds of a step by each measure, e.g. a `slope`.

  They are called with `counts`, few steps and many, and take turns; the first round
  warms up.
  """
  for measure in measures:
    measure(*counts)
  return medians([functools.partial(measure, *counts) for measure in measures], repeats)


def stream_gb_per_s() -> float:
  """Returns the rate of a streaming read, GB/s (1e9 bytes): a sum of a long array."""
  size = STREAM_BYTES[jax.default_backend()] // 4
  array = jnp.ones(size, jnp.float32)
  total = jax.jit(jnp.sum)
  return 4e-9 * size / median_seconds(lambda: total(array), MACHINE_REPEATS)


def matmul_gflop_per_s(rows: int, D: int, F: int, dtype: Any) -> float:
  """Returns the rate of products of few rows, GFLOP/s, 2 a multiply-add.

  There are more kernels than fit into a cache, as in a decode step, as many `[D, F]` as
  `[F, D]`, and none waits for another. They are the second factor of a product, or the
  first, transposed; the faster counts.
  """
  nbytes, flops = 2 * D * F * jnp.dtype(dtype).itemsize, 2 * rows * 2 * D * F
  backend = jax.default_backend()
  number = min(STREAM_BYTES[backend] // 2 // nbytes, PRODUCT_FLOPS[backend] // flops)
  number = max(1, int(number))
  inputs = jnp.ones((rows, D), dtype), jnp.ones((rows, F), dtype)

  def rate(product, *shapes):
    kernels = [[jnp.full(shape, i, dtype) for shape in shapes] for i in range(number)]
    run = jax.jit(
      lambda inputs, kernels: [
        product(x, w) for pair in kernels for x, w in zip(inputs, pair, strict=True)
      ]
    )
    taken = median_seconds(lambda: run(inputs, kernels), MACHINE_REPEATS)
    return 1e-9 * number * flops / taken

  return max(
    rate(lambda x, w: x @ w, (D, F), (F, D)),
    rate(lambda x, w: lax.optimization_barrier(w @ x.T).T, (F, D), (D, F)),
  )


def in_groups(
  settings: Sequence[Any], make: Callable[[Any], Any]
) -> Iterator[tuple[list[Any], list[Any]]]:
  """Yields (settings, what was made of them), as many as fit into memory together.

  They are neighbours whose `nbytes()` are at most half of the free memory. The second
  list is emptied before the next is made.
  """
  room = (free_bytes() or 0) // 2
  groups: list[list[Any]] = []
  for setting in settings:
    together = groups[-1] if groups else []
    if together and sum(s.nbytes() for s in [*together, setting]) <= room:
      together.append(setting)
    else:
      groups.append([setting])
  for together in groups:
    made = [make(setting) for setting in together]
    yield together, made
    made.clear()


def free_bytes() -> int | None:
  """Returns the bytes of memory that are free on the device; None if unknown."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats['bytes_in_use']
  try:
    with open('/proc/meminfo', encoding='utf-8') as file:
      lines = dict(line.split(':') for line in file)
    return int(lines['MemAvailable'].split()[0]) * 1024
  except (OSError, KeyError):
    return None
