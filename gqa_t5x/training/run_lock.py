"""Keeps a second run out of a run's folder, local or gs://.

Two runs in one folder would remove each other's unfinished checkpoints. Locally the
operating system holds the lock, and releases it however a process ends. A bucket has
no locks: there, a run rewrites a file with its name every `_BEAT_S` seconds, and
another run that finds such a file watches whether it changes.

In a bucket the folder belongs to the run whose name is in the file. A run reads the
file before it writes it again; if it finds another name, it leaves the file alone, and
`check` ends it before its next step. So of several runs exactly one goes on, provided
that a request to the bucket takes less than `_BEAT_S`.
"""

import atexit
import json
import os
import socket
import sys
import threading
import time
import uuid
from typing import Any

from absl import logging
from etils import epath

from gqa_t5x import files
from gqa_t5x.errors import BadInput

NAME = 'in_use'
_BEAT_S = 15.0  # between two writes of the file in a bucket
_held: dict[str, Any] = {}  # file -> its lock, until this process ends


class InUse(BadInput):
  """Another run is at work in the folder; the message names it."""


def hold(folder: epath.Path, name: str = NAME) -> None:
  """Locks an existing folder until this process ends; again does nothing.

  Args:
    folder: local or gs://.
    name: of the file; locks of other names do not count.

  Raises:
    InUse: another process holds it.
    OSError: the folder cannot be written.
  """
  path = os.fspath(folder / name)
  if path in _held:
    return
  take = Heartbeat if '://' in path else _lock
  _held[path] = take(folder / name)


def check() -> None:
  """Raises InUse if another run has taken the folder, in a bucket; before each step."""
  for lock in _held.values():
    if isinstance(lock, Heartbeat):
      lock.check()


def _lock(path: epath.Path) -> int:
  """Locks a local file, and returns the descriptor that holds the lock."""
  descriptor = files.lock(path)
  if descriptor is None:
    raise InUse(_message(path, path.read_text('utf-8')))
  if not path.exists() or not os.path.samestat(os.stat(path), os.fstat(descriptor)):
    os.close(descriptor)
    return _lock(path)  # Its owner ended meanwhile, and removed it.
  os.truncate(descriptor, 0)
  os.write(descriptor, _owner().encode())
  atexit.register(path.unlink, missing_ok=True)
  return descriptor


class Heartbeat:
  """A file in a bucket, rewritten every `beat_s` seconds while its writer lives."""

  def __init__(self, path: epath.Path, beat_s: float = _BEAT_S):
    """Takes the file, or waits until its owner is known to be gone.

    A file that is there is watched for three beats: its owner writes in each. Then this
    run writes its name, waits for one beat and reads the file again: a run that began
    at the same moment saw no file either, and has written its own name by then. Whose
    name is there goes on.

    Raises:
      InUse: another run is alive.
    """
    self._path, self._beat_s = path, beat_s
    self._owner, self._count, self._taken = _owner(), 0, ''
    if before := self._read():
      print(
        f'{path} is there: waiting {3 * beat_s:.0f} s to see whether its run lives',
        file=sys.stderr,
      )
      self._refuse_if_changed(before)
    self._write()
    time.sleep(beat_s)
    if not self._is_mine(now := self._read()):
      raise InUse(_message(path, now))
    self._stopped = threading.Event()
    threading.Thread(target=self._beat, daemon=True).start()
    atexit.register(self.release)

  def check(self) -> None:
    """Raises `InUse` once another run has taken the file."""
    if self._taken:
      raise InUse(_message(self._path, self._taken))

  def release(self) -> None:
    """Gives the folder back."""
    if not self._stopped.is_set():
      self._stopped.set()
      if self._is_mine(self._read()):
        self._path.unlink()

  def _refuse_if_changed(self, before: str) -> None:
    end = time.monotonic() + 3 * self._beat_s
    while time.monotonic() < end:
      time.sleep(self._beat_s / 5)
      now = self._read()
      if now and now != before:
        raise InUse(_message(self._path, now))

  def _beat(self) -> None:
    while not self._taken:
      try:
        now = self._read()
        if now and not self._is_mine(now):
          self._taken = now
          logging.error('%s', _message(self._path, now))
        else:
          self._write()
      except Exception as error:  # The bucket's; the next beat tries again.
        logging.warning('%s cannot be written: %s', self._path, error)
      if self._stopped.wait(self._beat_s):
        return

  def _write(self) -> None:
    self._count += 1
    self._path.write_text(f'{self._owner}\n{self._count}', 'utf-8')

  def _is_mine(self, text: str) -> bool:
    return text.partition('\n')[0] == self._owner

  def _read(self) -> str:
    try:
      return self._path.read_text('utf-8')
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
    ' folder.'
  )
