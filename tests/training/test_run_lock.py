"""One run a folder: the lock of a local folder, and the signs of life in a bucket.

Here a local folder stands for the bucket: `Heartbeat` asks for no lock.
"""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from gqa_t5x.training import run_lock
from helpers import commands

# --- Local folders --------------------------------------------------------------

HOLD = """
import sys, time
from etils import epath
from gqa_t5x.training import run_lock
run_lock.hold(epath.Path(sys.argv[1]))
print('held', flush=True)
time.sleep(60)
"""


@pytest.fixture
def another(tmp_path):
  """Another process that holds the folder."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(tmp_path)],
    env=commands.environment(),
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.wait()


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path, another):
  message = rf'{tmp_path} is in use by process {another.pid} on .* another folder\.'
  with pytest.raises(run_lock.InUse, match=message):
    run_lock.hold(epath.Path(tmp_path))
  assert json.loads((tmp_path / run_lock.NAME).read_text())['process'] == another.pid
  another.kill()  # SIGKILL: nothing of it can clean up.
  another.wait()
  run_lock.hold(epath.Path(tmp_path))
  run_lock.hold(epath.Path(tmp_path))  # Its own, as often as it likes.
  assert json.loads((tmp_path / run_lock.NAME).read_text())['process'] == os.getpid()


def test_a_run_that_ends_leaves_no_sign(tmp_path):
  code = HOLD.replace('time.sleep(60)', '')
  done = commands.run(tmp_path, '-c', code, tmp_path)
  assert done.stdout.strip() == 'held'
  assert list(tmp_path.iterdir()) == []


# --- Buckets --------------------------------------------------------------------

BEAT_S = 0.2
ANOTHER = '{"host": "far", "process": 7, "since": "noon", "id": "b"}'


@pytest.fixture
def path(tmp_path):
  return epath.Path(tmp_path / run_lock.NAME)


def test_a_bucket_is_held_by_signs_of_life(path):
  first = run_lock.Heartbeat(path, BEAT_S)
  with pytest.raises(run_lock.InUse, match=f'process {os.getpid()} on'):
    run_lock.Heartbeat(path, BEAT_S)
  first.check()
  first.release()
  assert not path.exists()
  start = time.monotonic()
  second = run_lock.Heartbeat(path, BEAT_S)
  # A folder left in order: no waiting but for a run that begins at the same moment.
  assert time.monotonic() - start < 2 * BEAT_S
  second.release()


def test_a_run_that_was_killed_in_a_bucket_is_waited_for(path, capsys):
  path.write_text('{"host": "gone", "process": 1, "since": "yesterday"}\n17')
  start = time.monotonic()
  held = run_lock.Heartbeat(path, BEAT_S)
  assert time.monotonic() - start >= 3 * BEAT_S
  assert 'waiting' in capsys.readouterr().err
  held.release()


def test_of_runs_that_begin_at_once_one_goes_on(path):
  """All see that there is no file, before any of them writes it."""
  number = 3
  all_have_looked = threading.Barrier(number)
  held, refused = [], []

  class Beginning(run_lock.Heartbeat):
    looked = False

    def _write(self):
      """As in a bucket: nobody sees a part of what is written."""
      part = path.with_name(f'part_{threading.get_ident()}')
      part.write_text(self._owner)
      part.replace(path)

    def _read(self):
      text = super()._read()
      if not self.looked:
        self.looked = True
        all_have_looked.wait(timeout=30)
      return text

  def begin():
    try:
      held.append(Beginning(path, BEAT_S))
    except run_lock.InUse as error:
      refused.append(str(error))

  runs = [threading.Thread(target=begin) for _ in range(number)]
  for run in runs:
    run.start()
  for run in runs:
    run.join()
  (winner,) = held
  assert len(refused) == number - 1
  assert all(f'is in use by process {os.getpid()} on' in error for error in refused)
  time.sleep(2 * BEAT_S)
  winner.check()
  winner.release()
  assert not path.exists()


def test_a_run_whose_folder_was_taken_ends_and_leaves_it_alone(path, monkeypatch):
  """As by a run that was slow to write, after it had seen no file."""
  held = run_lock.Heartbeat(path, BEAT_S)
  monkeypatch.setitem(run_lock._held, 'gs://bucket/run', held)
  run_lock.check()
  end = time.monotonic() + 30
  while not held._taken and time.monotonic() < end:
    path.write_text(f'{ANOTHER}\n1')  # Again: a beat on its way may have come after it.
    time.sleep(BEAT_S / 4)
  with pytest.raises(run_lock.InUse, match='is in use by process 7 on far since noon'):
    run_lock.check()
  time.sleep(2 * BEAT_S)
  held.release()
  assert path.read_text().startswith(ANOTHER)


def test_a_beat_that_fails_is_tried_again(path, monkeypatch):
  held = run_lock.Heartbeat(path, BEAT_S)
  write, failed = held._write, threading.Event()

  def fail_once():
    if not failed.is_set():
      failed.set()
      raise OSError('no network')
    write()

  monkeypatch.setattr(held, '_write', fail_once)
  assert failed.wait(timeout=30)
  before, end = path.read_text(), time.monotonic() + 30
  while path.read_text() == before and time.monotonic() < end:
    time.sleep(BEAT_S / 4)
  assert path.read_text() != before
  held.check()
  held.release()
