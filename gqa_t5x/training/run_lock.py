"""Keeps a second run out of a run's folder, local or gs://.

Two runs in one folder would remove each other's unfinished checkpoints. Locally the
operating system holds the lock, and gives it back however a process ends. A bucket has
no such thing: there, a file is written anew every few seconds, and whoever finds one
waits to see whether that goes on.
"""

import atexit
import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from typing import IO, Any

from etils import epath

NAME = 'in_use'
BEAT_S = 15.0  # between two signs of life in a bucket


class InUse(ValueError):
  """Another run is at work in the folder; the message names it."""


def hold(folder: epath.Path, beat_s: float = BEAT_S) -> Any:
  """Locks a folder until this process ends.

  Args:
    folder: an existing folder.
    beat_s: seconds between signs of life in a bucket; a run that was killed there
      delays the next one by three of them.

  Returns:
    What holds the lock; to be kept.

  Raises:
    InUse: another process holds it.
    OSError: the folder cannot be written.
  """
  if '://' in os.fspath(folder):
    return Heartbeat(folder / NAME, beat_s)
  return _flock(folder / NAME)


def _flock(path: epath.Path) -> IO[str]:
  file = open(path, 'a+')  # noqa: SIM115  Closing it would release the lock.
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    raise InUse(_message(path, file.read())) from None
  if not path.exists() or not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
    return _flock(path)  # Its owner ended meanwhile, and removed it.
  file.truncate(0)
  file.write(_owner())
  file.flush()
  atexit.register(_remove, path)
  return file


def _remove(path: epath.Path) -> None:
  with contextlib.suppress(OSError):
    os.unlink(path)


class Heartbeat:
  """A file in a bucket that shows that its writer is alive."""

  def __init__(self, path: epath.Path, beat_s: float):
    """Takes the file, or waits until its owner is known to be gone.

    Args:
      path: the file.
      beat_s: seconds between two signs of life.

    Raises:
      InUse: its owner is alive.
    """
    self._path, self._beat_s = path, beat_s
    self._owner, self._count = _owner(), 0
    before = self._read()
    if before:
      print(f'{path} is there: waiting {3 * beat_s:.0f} s to see whether its run lives')
      self._refuse_if_changed(before, 3 * beat_s)
    self._write()
    # Of two that began at once, the first sees the second's name.
    time.sleep(0 if not before else beat_s)
    if not self._mine():
      raise InUse(_message(path, self._read()))
    self._stopped = threading.Event()
    threading.Thread(target=self._beat, daemon=True).start()
    atexit.register(self.release)

  def release(self) -> None:
    """Gives the folder back."""
    if not self._stopped.is_set():
      self._stopped.set()
      if self._mine():
        self._path.unlink()

  def _refuse_if_changed(self, before: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      time.sleep(self._beat_s / 5)
      now = self._read()
      if now and now != before:
        raise InUse(_message(self._path, now))

  def _beat(self) -> None:
    while not self._stopped.wait(self._beat_s):
      self._write()

  def _write(self) -> None:
    self._count += 1
    self._path.write_text(f'{self._owner}\n{self._count}')

  def _mine(self) -> bool:
    return self._read().partition('\n')[0] == self._owner

  def _read(self) -> str:
    try:
      return self._path.read_text()
    except FileNotFoundError:
      return ''


def _owner() -> str:
  return json.dumps(
    {
      'host': socket.gethostname(),
      'process': os.getpid(),
      'since': time.strftime('%Y-%m-%d %H:%M:%S'),
      'id': uuid.uuid4().hex[:8],
    }
  )


def _message(path: epath.Path, text: str) -> str:
  try:
    owner = json.loads(text.partition('\n')[0])
    by = f'process {owner["process"]} on {owner["host"]} since {owner["since"]}'
  except (ValueError, KeyError, TypeError):
    by = 'another process'
  return (
    f'{path.parent} is in use by {by}. Wait for it or end it, or give this run another'
    ' MODEL_DIR.'
  )
