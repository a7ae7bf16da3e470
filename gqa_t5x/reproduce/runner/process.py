"""A command in a process of its own: its log, its progress bars, its end."""

import os
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

_LINES_SHOWN = 12
_BAR = re.compile(r'.*?%\|[^]\n]*]?')  # of tqdm, to the end of its times


class StageFailed(Exception):
  """A run cannot go on; the message says why, and names the command and its log."""


class Process:
  """Runs `python ...` once; may be ended from another thread at any time."""

  def __init__(
    self,
    command: Sequence[str],
    log: pathlib.Path,
    compilation_cache: pathlib.Path,
    lock: int,
  ):
    """Starts nothing yet.

    Args:
      command: arguments of Python.
      log: file for all that it prints but progress bars.
      compilation_cache: folder where JAX keeps compiled programs.
      lock: open file that the process inherits.
    """
    self._command, self._log = [sys.executable, *command], log
    self._lock = lock
    self._env = {
      **os.environ,
      'TQDM_MININTERVAL': '1',
      # Trainings of one shape compile the same programs: the first compiles for all.
      'JAX_COMPILATION_CACHE_DIR': str(compilation_cache.absolute()),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
    }
    self._guard = threading.Lock()
    self._process: subprocess.Popen | None = None
    self._stopped = False

  def run(self, show: Callable[[str], None]) -> None:
    """Runs the command to its end.

    Args:
      show: is given each redraw of a progress bar.

    Raises:
      StageFailed: it failed; the message has the end of the log.
    """
    with self._log.open('w') as out:
      print(' '.join(self._command), file=out, flush=True)
      with self._guard:
        if self._stopped:
          return
        self._process = subprocess.Popen(
          self._command,
          stdout=out,
          stderr=subprocess.PIPE,
          env=self._env,
          text=True,
          errors='replace',
          bufsize=1,
          pass_fds=(self._lock,),
        )
      split_bars(self._process.stderr, show, out)
      code = self._process.wait()
    if code:
      end = '\n'.join(self._log.read_text().splitlines()[-_LINES_SHOWN:])
      raise StageFailed(
        f'{end}\n\nThis command failed with exit code {code}; its whole log is'
        f' {self._log}:\n  {" ".join(self._command)}'
      )

  def terminate(self) -> None:
    """Asks the process to end, or keeps it from starting."""
    with self._guard:
      self._stopped = True
      if self._process is not None:
        self._process.terminate()

  def kill_after(self, seconds: float) -> None:
    """Kills the process if it does not end by itself in time."""
    if self._process is None:
      return
    try:
      self._process.wait(seconds)
    except subprocess.TimeoutExpired:
      self._process.kill()


def split_bars(lines: Iterable[str], show: Callable[[str], None], log: TextIO) -> None:
  """Sends progress bars to `show` and all else to the log.

  Universal newlines have made each redraw of a bar, which ends in a carriage return,
  a line of its own; what a library prints next stands behind it.

  Args:
    lines: what a command writes to stderr.
    show: is given each redraw of a bar, without its end of line.
    log: open file.
  """
  for line in lines:
    if bar := _BAR.match(line):
      show(bar[0].rstrip())
      line = line[bar.end() :].lstrip()
    if line:
      log.write(line)
      log.flush()
