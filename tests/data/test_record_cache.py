"""What was read is kept: once, whatever is stopped, whoever else reads it."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from gqa_t5x import files
from gqa_t5x.data.own import record_cache
from helpers import commands
from helpers.own_files import TEXTS, raw, text_task, write_texts


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """Each test has a cache of its own."""
  monkeypatch.setenv('GQA_T5X_CACHE', str(tmp_path / 'cache'))
  monkeypatch.chdir(tmp_path)
  return tmp_path


def cached(folder) -> dict[str, int]:
  found = (folder / 'cache').rglob('*.tfrecord')
  return {path.name: path.stat().st_mtime_ns for path in found}


def test_files_are_read_once(folder):
  write_texts()
  name = text_task()
  before = cached(folder)
  assert len(before) == 2
  record_cache.prepare.cache_clear()  # As in another process.
  assert text_task() == name
  assert cached(folder) == before
  # Of the same size, and changed.
  write_texts(texts=[text.replace('not', 'now') for text in TEXTS])
  assert text_task() != name
  assert len(list((folder / 'cache').rglob('*.tfrecord'))) == 4
  text_task(cache_dir='elsewhere')
  assert len(list((folder / 'elsewhere' / 'records').iterdir())) == 1


def test_what_was_interrupted_goes_on(folder, monkeypatch):
  for i in range(3):
    write_texts(f'{i}.jsonl', TEXTS[i::3])
  write = record_cache._write

  def killed(request, folder, i, bar):
    if i == 1:
      (folder / f'.tmp-train-0000{i}-of-00003.tfrecord').write_bytes(b'half')
      raise KeyboardInterrupt
    return write(request, folder, i, bar)

  with monkeypatch.context() as patch:
    patch.setattr(record_cache, '_write', killed)
    with pytest.raises(KeyboardInterrupt):
      text_task()
  before = cached(folder)
  name = text_task()
  after = cached(folder)
  assert {file: after[file] for file in before if 'tmp' not in file}.items() <= (
    before.items()
  )
  assert not list((folder / 'cache').rglob('.tmp-*'))
  assert sorted(raw(name, 'train') + raw(name, 'validation')) == sorted(
    (text,) for text in TEXTS
  )


PROCESS = """
import sys
from helpers import own_files
print('ready', flush=True)
print(own_files.text_task())
"""


def process():
  environment = commands.environment() | {'TF_CPP_MIN_LOG_LEVEL': '3'}
  return subprocess.Popen(
    [sys.executable, '-c', PROCESS],
    stdout=subprocess.PIPE, text=True, env=environment,
  )  # fmt: skip


@pytest.mark.slow
def test_two_processes_and_one_that_is_killed(folder):
  """All have one result; a lock goes with the process that held it."""
  for i in range(40):
    write_texts(f'{i}.jsonl', [f'{i} {text}' for text in TEXTS])
  runs = [process() for _ in range(2)]
  assert [run.stdout.readline() for run in runs] == ['ready\n'] * 2
  while not cached(folder):
    time.sleep(0.01)
  runs[0].send_signal(signal.SIGKILL)
  assert runs[1].communicate()[0].split() == [text_task()]
  assert len(cached(folder)) == 80


def test_hosts_share_the_work_in_a_bucket(folder, monkeypatch):
  """Each writes every other file; what both have written is what one would have."""
  for i in range(5):
    write_texts(f'{i}.jsonl', TEXTS[i::5])
  alone, written = text_task(), []
  write = record_cache._write

  def writes(request, folder, i, bar):
    written[-1].append(i)
    write(request, folder, i, bar)

  monkeypatch.setattr(record_cache, '_write', writes)
  for host in range(2):
    share = contextlib.nullcontext((host, 2))
    monkeypatch.setattr(record_cache, '_alone', lambda folder, share=share: share)
    monkeypatch.setattr(record_cache, '_prepared', lambda *request: None)
    written.append([])
    record_cache.prepare.cache_clear()
    with contextlib.suppress(AttributeError):  # Not all files are there yet.
      text_task(cache_dir='shared')
  assert written == [[0, 2, 4], [1, 3]]
  monkeypatch.undo()
  monkeypatch.chdir(folder)
  record_cache.prepare.cache_clear()
  assert text_task(cache_dir='shared') == alone


def test_a_cache_in_use_is_waited_for(folder, monkeypatch):
  """The lock is looked at until it is free."""
  write_texts()
  locks = []

  def lock(path):
    locks.append(path)
    return None if len(locks) < 3 else os.open(path, os.O_RDONLY)

  monkeypatch.setattr(files, 'lock', lock)
  monkeypatch.setattr(record_cache, '_WAIT_S', 0)
  text_task()
  assert len(locks) == 3
