"""Runs independent pieces of work side by side, within a budget of memory.

Reading, computing and writing overlap because each piece does all three in a thread of
its own; NumPy, TensorStore and hashlib release Python's lock while they work.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import threadpoolctl

_MAX_THREADS = 8
# Python, JAX and TensorStore take some 200 MB: well below 1 GiB together.
BUDGET = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class Job:
  """A piece of work, and the bytes of memory that it holds at its peak, estimated."""

  run: Callable[[], Any]
  nbytes: int


def run_jobs(
  jobs: Sequence[Job],
  on_done: Callable[[int], None] = lambda index: None,
  *,
  budget: int = BUDGET,
  num_threads: int | None = None,
) -> list[Any]:
  """Runs jobs in threads; those that run together fit the budget.

  A job starts when the ones before it have started and its memory is free. A job above
  the budget runs alone. Peak memory depends on the largest job and the budget only, not
  on how many jobs or threads there are.

  Args:
    jobs: the work. All results are kept, so they should be small.
    on_done: called with the index of each job that is done, in the caller's thread.
    budget: bytes that may be held at a time.
    num_threads: jobs at a time; None: two a processor, so that one computes while
      another waits for the disk, and at most 8.

  Returns:
    What the jobs returned, in their order. If one raises, or a signal's handler in the
    caller, jobs that run are waited for, and the others never start.
  """
  cores = os.cpu_count() or 1
  num_threads = num_threads or min(2 * cores, _MAX_THREADS)
  results: list[Any] = [None] * len(jobs)
  waiting = collections.deque(range(len(jobs)))
  running: dict[futures.Future, int] = {}
  free = budget
  pool = futures.ThreadPoolExecutor(num_threads, thread_name_prefix='convert')
  # More BLAS threads than cores wait for each other.
  blas = threadpoolctl.threadpool_limits(max(cores // num_threads, 1), 'blas')
  try:
    with blas:
      while waiting or running:
        while waiting and len(running) < num_threads:
          if running and jobs[waiting[0]].nbytes > free:
            break
          index = waiting.popleft()
          free -= jobs[index].nbytes
          running[pool.submit(jobs[index].run)] = index
        done, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
        for future in sorted(done, key=running.get):
          index = running.pop(future)
          free += jobs[index].nbytes
          results[index] = future.result()
          on_done(index)
  finally:
    pool.shutdown(cancel_futures=True)
  return results
