"""A command in a process of its own: its log, its progress bars, its end."""

import asyncio
import contextlib
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TextIO

_LINES_SHOWN = 12
_SECONDS_TO_END = 10
_BAR = re.compile(r'.*?%\|[^]\n]*]?')  # of tqdm, to the end of its times


class StageFailed(Exception):
  """A run cannot go on; the message says why, and names the command and its log."""


async def run(
  command: Sequence[str],
  log: pathlib.Path,
  show: Callable[[str], None],
  cores: Sequence[int],
  environment: Mapping[str, str],
  lock: int,
) -> None:
  """Runs `python ...` to its end; ends it where the caller is cancelled.

  Args:
    command: arguments of Python.
    log: file for all that it prints but progress bars.
    show: is given each redraw of a progress bar.
    cores: that it may use.
    environment: further variables.
    lock: open file that the process inherits.

  Raises:
    StageFailed: it failed; the message has the end of the log.
  """
  words = [sys.executable, *command]
  with log.open('w', encoding='utf-8') as out:
    print(' '.join(words), file=out, flush=True)
    use_cores(cores)  # The process inherits them.
    process = await asyncio.create_subprocess_exec(
      *words,
      stdout=out,
      stderr=subprocess.PIPE,
      env={**os.environ, **environment},
      pass_fds=(lock,),
    )
    try:
      async for line in _lines(process.stderr):
        split_bar(line, show, out)
      code = await process.wait()
    finally:
      await _end(process)
  if code:
    end = '\n'.join(log.read_text('utf-8', 'replace').splitlines()[-_LINES_SHOWN:])
    raise StageFailed(
      f'{end}\n\nThis command failed with exit code {code}; its whole log is'
      f' {log}:\n  {" ".join(words)}'
    )


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
  """Yields lines, as which redraws of a bar count: they end in a carriage return."""
  rest = b''
  while chunk := await stream.read(2**16):
    *lines, rest = re.split(rb'\r\n|\r|\n', rest + chunk)
    for line in lines:
      yield line.decode(errors='replace')
  yield rest.decode(errors='replace')


def split_bar(line: str, show: Callable[[str], None], log: TextIO) -> None:
  """Sends a progress bar to `show`, and what a library prints behind it to the log."""
  if bar := _BAR.match(line):
    show(bar[0].rstrip())
    line = line[bar.end() :].lstrip()
  if line:
    print(line, file=log, flush=True)


async def _end(process: asyncio.subprocess.Process) -> None:
  """Ends a process that still runs: it is asked to, then killed."""
  with contextlib.suppress(ProcessLookupError):  # It has just ended.
    if process.returncode is None:
      process.terminate()
      try:
        await asyncio.wait_for(process.wait(), _SECONDS_TO_END)
      except TimeoutError:
        process.kill()


def available_cores() -> list[int]:
  """Returns the cores that this thread may use."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def use_cores(cores: Sequence[int]) -> None:
  """Keeps this thread, and the processes that it starts from now on, on some cores."""
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, cores)
