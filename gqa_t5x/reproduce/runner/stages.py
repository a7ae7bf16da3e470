"""Stages of an experiment: commands that need each other's results, run side by side.

A stage is data: a command as a user types it, what it reads and what it leaves. Every
command writes under a temporary name first, so a stage whose result exists is done,
and a run that was stopped goes on where it was.

On models this small, two trainings side by side with one thread each are almost twice
as fast as one after the other with two threads; so each process gets cores of
its own. A stage that runs alone gets the whole machine.
"""

import contextlib
import dataclasses
import os
import pathlib
import queue
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gqa_t5x import files
from gqa_t5x.reproduce.runner.process import Process, StageFailed
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

  @property
  def is_given(self) -> bool:
    """Whether the result is there, and no command of ours makes it."""
    return not self.command

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
  start = time.monotonic()
  jobs = len(available_cores()) if jobs is None else jobs
  try:
    if jobs < 1:
      raise StageFailed(f'--jobs={jobs} must be at least 1.')
    check_plan(stages)
    with _locked(folder) as lock:
      _Run(stages, folder, jobs, lock).loop()
  except StageFailed as error:
    print(error, file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('\nStopped. Run the same command again to go on from here.', file=sys.stderr)
    return 130
  print(f'Done in {time.monotonic() - start:.0f} s.')
  return 0


def check_plan(stages: Sequence[Stage]) -> None:
  """Raises unless every result is made once, and every need by an earlier stage.

  Raises:
    StageFailed: the message names the stage.
  """
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


def available_cores() -> list[int]:
  """The cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def share_cores(cores: Sequence[int], jobs: int) -> list[list[int]]:
  """Deals cores out to jobs; with more jobs than cores, some share one.

  Args:
    cores: what there is.
    jobs: how many run at once.

  Returns:
    The cores of each job.
  """
  return [list(cores[i::jobs]) or [cores[i % len(cores)]] for i in range(jobs)]


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[int]:
  """Keeps other runs out of a folder; yields the lock's descriptor.

  Processes inherit it, so that the folder stays locked as long as one of them writes,
  even where this one is killed.
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
  """One run: the stages that wait, those at work, and what they report."""

  def __init__(
    self, stages: Sequence[Stage], folder: pathlib.Path, jobs: int, lock: int
  ):
    self._stages, self._lock = list(stages), lock
    self._logs, self._cache = folder / 'logs', folder / 'compilation_cache'
    self._logs.mkdir(exist_ok=True)
    self._cores = available_cores()
    self._free = share_cores(self._cores, jobs)
    self._alone = jobs == 1
    self._waiting = missing(stages)
    self._running: dict[Stage, tuple[Process, threading.Thread, list[int] | None]] = {}
    self._events: queue.Queue = queue.Queue()
    self._progress = Progress(self._stages, done=set(stages) - set(self._waiting))

  def loop(self) -> None:
    """Runs every stage that waits.

    Raises:
      StageFailed: the first failure; all other processes have ended.
      KeyboardInterrupt: after Ctrl-C; all processes have ended.
    """
    try:
      while self._waiting or self._running:
        self._start_ready()
        self._handle(*self._events.get())
    finally:
      self._stop()
      self._progress.close()

  def _start_ready(self) -> None:
    # A result may be there before its command ends: T5X saves, then evaluates.
    unfinished = {stage.result for stage in (*self._waiting, *self._running)}
    ready = [
      stage
      for stage in self._waiting
      if unfinished.isdisjoint(need.result for need in stage.needs)
    ]
    # Long ones first, so that none is left alone at the end while cores are idle.
    ready.sort(key=lambda stage: stage.work, reverse=True)
    # What measures time waits until there is nothing else to do.
    ready = [s for s in ready if not s.alone] or ready[:1]
    if self._alone or len(ready) == 1:
      # Nothing else can become ready meanwhile: it gets all cores.
      if ready and not self._running:
        self._start(ready[0], None)
        return
      if self._alone:
        return
    if self._running and any(cores is None for *_, cores in self._running.values()):
      return
    for stage in ready[: len(self._free)]:
      self._start(stage, self._free.pop(0))

  def _start(self, stage: Stage, cores: list[int] | None) -> None:
    """Starts a stage on some cores; None: on all, for it is alone."""
    self._waiting.remove(stage)
    _discard(stage)
    stage.result.parent.mkdir(parents=True, exist_ok=True)
    number = self._stages.index(stage) + 1
    log = self._logs / f'{number:02d}.log'
    process = Process(stage.command, log, self._cache, self._lock)
    thread = threading.Thread(
      target=self._work, args=(stage, process, cores or self._cores), daemon=True
    )
    self._running[stage] = process, thread, cores
    self._progress.begin(stage, alone=cores is None)
    thread.start()

  def _work(self, stage: Stage, process: Process, cores: list[int]) -> None:
    """Runs a process to its end, in a thread of its own; reports by events."""
    if hasattr(os, 'sched_setaffinity'):
      os.sched_setaffinity(0, cores)  # Of this thread, so the process inherits it.
    tick, error = time.monotonic(), None
    try:
      process.run(lambda bar: self._events.put(('bar', stage, bar)))
      if not stage.result.exists():
        error = StageFailed(f'{stage} ended well, but left no {stage.result}.')
    except Exception as failure:
      error = failure
    self._events.put(('end', stage, error or time.monotonic() - tick))

  def _handle(self, kind: str, stage: Stage, what: str | float | Exception) -> None:
    if kind == 'bar':
      self._progress.update(stage, what)
      return
    if isinstance(what, Exception):
      raise what
    _, _, cores = self._running.pop(stage)
    if cores is not None:
      self._free.append(cores)
    self._progress.end(stage, what)

  def _stop(self) -> None:
    """Ends what still runs, after a failure or Ctrl-C."""
    for process, _, _ in self._running.values():
      process.terminate()
    for stage, (process, thread, _) in self._running.items():
      process.kill_after(seconds=10)
      thread.join(timeout=10)
      _discard(stage)


def _discard(stage: Stage) -> None:
  """Removes what a stage that did not end well has left."""
  if stage.leftover is not None:
    shutil.rmtree(stage.leftover, ignore_errors=True)
