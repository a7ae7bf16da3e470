"""Stages of an experiment: commands that need each other's results, run side by side.

A stage is data: a command as a user types it, what it reads and what it leaves. Every
command writes under a temporary name first, so a stage whose result exists is done,
and a run that was stopped goes on where it was.

On models this small, two trainings side by side with one thread each are almost twice
as fast as one after the other with two threads; so each process gets cores of
its own. A stage that runs alone gets the whole machine.
"""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gqa_t5x import files
from gqa_t5x.reproduce.runner import process
from gqa_t5x.reproduce.runner.process import StageFailed
from gqa_t5x.reproduce.runner.progress import Progress

# Work of a stage that does not train, in training steps; for the time to go alone.
SHORT = 20


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
  """One step of an experiment.

  Attributes:
    title: what it does.
    result: the file or folder that it leaves.
    command: arguments of Python, as a user types them; empty: the result is given.
    needs: stages whose results it reads.
    reads: what else it reads, and no stage makes: data sets, public checkpoints.
    leftover: a folder of this stage alone that is removed, should it be cut short.
    work: how much there is to do, in training steps; for the time to go alone.
    alone: whether it measures time, so that nothing else may run meanwhile.
    hours: an estimate of chip-hours; None where it takes minutes.
    macros: settings of the command, for those who check its result.
  """

  title: str
  result: pathlib.Path
  command: tuple[str, ...]
  needs: tuple['Stage', ...] = ()
  reads: tuple[str, ...] = ()
  leftover: pathlib.Path | None = None
  work: int = SHORT
  alone: bool = False
  hours: float | None = None
  macros: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    """The command as a user types it."""
    return ' '.join(_quote(word) for word in ('python', *self.command))


def _quote(word: str) -> str:
  """Quotes a word for the shell; gin's own quotes stay as they are."""
  if "'" in word and not set(word) & set('"$`\\!'):
    return f'"{word}"'
  return shlex.quote(word)


def run(stages: Sequence[Stage], folder: pathlib.Path, jobs: int | None = None) -> int:
  """Runs what is not done yet.

  Args:
    stages: in any order that suits the reader; `needs` decide.
    folder: of the lock, the logs and the compilation cache.
    jobs: how many run at once; None: as many as this process has cores.

  Returns:
    The exit code: 0, 1 after an error, 130 after Ctrl-C.
  """
  start, cores = time.monotonic(), process.available_cores()
  jobs = len(cores) if jobs is None else jobs
  try:
    if jobs < 1:
      raise StageFailed(f'--jobs={jobs} must be at least 1.')
    check_plan(stages)
    with _locked(folder) as lock:
      asyncio.run(_Run(stages, folder, cores, jobs, lock).loop())
  except StageFailed as error:
    print(error, file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('\nStopped. Run the same command again to go on from here.', file=sys.stderr)
    return 130
  finally:
    process.use_cores(cores)
  print(f'Done in {time.monotonic() - start:.0f} s.')
  return 0


def check_plan(stages: Sequence[Stage]) -> None:
  """Raises StageFailed unless all is made once, and what it needs before it."""
  made: set[pathlib.Path] = set()
  for stage in stages:
    for need in stage.needs:
      if need.result not in made:
        raise StageFailed(
          f'{stage.title} needs {need.result}, which no earlier stage makes.'
        )
    if stage.result in made:
      raise StageFailed(
        f'{stage.title} makes {stage.result}, as an earlier stage does.'
      )
    made.add(stage.result)


def missing(stages: Sequence[Stage]) -> list[Stage]:
  """Returns the stages whose results are not there yet."""
  return [stage for stage in stages if not stage.result.exists()]


def share_cores(cores: Sequence[int], jobs: int) -> list[list[int]]:
  """Deals cores out to jobs; with more jobs than cores, some share one."""
  return [list(cores[i::jobs]) or [cores[i % len(cores)]] for i in range(jobs)]


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[int]:
  """Keeps other runs out of a folder; yields what processes inherit.

  So it stays locked as long as one of them writes, even where this one is killed.
  """
  folder.mkdir(parents=True, exist_ok=True)
  lock = files.lock(folder / 'lock')
  if lock is None:
    raise StageFailed(
      f'Another run is at work in {folder}; wait for it, or choose another'
      ' --output_dir.'
    )
  try:
    yield lock
  finally:
    os.close(lock)


class _Run:
  """One run: the stages that wait, those at work, and the cores that are free."""

  def __init__(
    self,
    stages: Sequence[Stage],
    folder: pathlib.Path,
    cores: Sequence[int],
    jobs: int,
    lock: int,
  ):
    self._stages, self._lock, self._jobs = list(stages), lock, jobs
    self._cores, self._free = cores, share_cores(cores, jobs)
    self._logs = folder / 'logs'
    self._logs.mkdir(exist_ok=True)
    self._environment = {
      'TQDM_MININTERVAL': '1',
      # Trainings of one shape compile the same programs: the first compiles for all.
      'JAX_COMPILATION_CACHE_DIR': str((folder / 'compilation_cache').absolute()),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
      # The arrays of a step come from the heap again, not page by page from the kernel:
      # 27% less CPU time a training step of the tiny model. Of glibc alone.
      'MALLOC_ARENA_MAX': '1',
      'MALLOC_MMAP_THRESHOLD_': '4000000000',  # bytes, as the next
      'MALLOC_TRIM_THRESHOLD_': '8000000000',
    }
    self._waiting = missing(stages)
    # Task -> its stage, and its cores; None: it is alone and has all of them.
    self._running: dict[asyncio.Task, tuple[Stage, list[int] | None]] = {}
    self._progress = Progress(self._stages, done=set(stages) - set(self._waiting))

  async def loop(self) -> None:
    """Runs every stage that waits; if one fails, ends all others and raises."""
    try:
      while self._waiting or self._running:
        self._start_ready()
        await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        for task in [task for task in self._running if task.done()]:
          _, cores = self._running.pop(task)
          task.result()  # Or it raises.
          if cores is not None:
            self._free.append(cores)
    finally:
      for task in self._running:
        task.cancel()
      await asyncio.gather(*self._running, return_exceptions=True)
      self._progress.close()

  def _start_ready(self) -> None:
    running = self._running.values()
    # A result may be there before its command ends: T5X saves, then evaluates.
    unfinished = {s.result for s in (*self._waiting, *(stage for stage, _ in running))}
    ready = [
      stage
      for stage in self._waiting
      if unfinished.isdisjoint(need.result for need in stage.needs)
    ]
    # Long ones first, so that none is left alone at the end while cores are idle.
    ready.sort(key=lambda stage: stage.work, reverse=True)
    # What measures time waits until there is nothing else to do.
    ready = [stage for stage in ready if not stage.alone] or ready[:1]
    if not ready or any(cores is None for _, cores in running):
      return
    if not running and (self._jobs == 1 or len(ready) == 1):
      self._start(ready[0], None)  # Nothing else can become ready meanwhile.
    elif not ready[0].alone:
      for stage in ready[: len(self._free)]:
        self._start(stage, self._free.pop(0))

  def _start(self, stage: Stage, cores: list[int] | None) -> None:
    """Starts a stage on some cores; None: on all, for it is alone."""
    self._waiting.remove(stage)
    task = asyncio.create_task(self._work(stage, cores or self._cores))
    self._running[task] = stage, cores

  async def _work(self, stage: Stage, cores: Sequence[int]) -> None:
    """Runs a stage to its end; leaves nothing of it if it fails or is cancelled."""
    _discard(stage)
    stage.result.parent.mkdir(parents=True, exist_ok=True)
    log = self._logs / f'{self._stages.index(stage) + 1:02d}.log'
    tick = time.monotonic()
    self._progress.begin(stage)
    try:
      await process.run(
        stage.command,
        log,
        lambda bar: self._progress.update(stage, bar),
        cores,
        self._environment,
        self._lock,
      )
      if not stage.result.exists():
        raise StageFailed(f'{stage} ended well, but left no {stage.result}.')
    except BaseException:
      _discard(stage)
      raise
    self._progress.end(stage, time.monotonic() - tick)


def _discard(stage: Stage) -> None:
  """Removes what a stage that did not end well has left."""
  if stage.leftover is not None:
    shutil.rmtree(stage.leftover, ignore_errors=True)
