"""The command as a process: killed at any moment, in little memory."""

import contextlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest

from gqa_t5x.checkpoints import writer
from helpers import commands, huggingface_folders
from helpers.trees import (
  convert,
  nest,
  tiny_shapes,
  tiny_state,
  write_msgpack,
  write_t5x,
)
from helpers.trees import run_convert as run

WIDTH, MLP, VOCABULARY, HEADS, HEAD_DIM = 320, 1024, 1000, 8, 40


def write_wide(folder, num_layers):
  """An uncompressed checkpoint of 7 MB a layer."""
  sizes = {6: WIDTH, 5: MLP, 11: VOCABULARY, 4: HEADS, 8: WIDTH, 32: 32}
  noise = np.random.default_rng(0).standard_normal(MLP * WIDTH, np.float32)
  tree = {
    f'target/{path}': np.resize(noise, [sizes[n] for n in shape])  # N * H = 8 there
    for path, shape in tiny_shapes(decoder_layers=num_layers).items()
  }
  tree['state/step'] = np.asarray(1000, np.int32)
  write_t5x(folder, nest(tree), compression='none')


# --- Stopped and killed ---------------------------------------------------------


def convert_and_exit(args, seconds_per_tensor=0.0, errors=os.devnull):
  """The command, in a process that is going to be stopped; errors go to a file."""
  # What runs in the background of a shell ignores it.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  write = writer._TensorWriter.__call__

  def slow(*args):
    time.sleep(seconds_per_tensor)
    return write(*args)

  writer._TensorWriter.__call__ = slow
  with open(errors, 'w') as file, contextlib.redirect_stderr(file):
    sys.exit(run(*args))


def start(source, output, *more):
  """Starts a conversion; returns its process once it has begun to write."""
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload([__name__, 'flax.serialization', 'tensorstore'])
  flags = (f'--input={source}', f'--output={output}', '--num_kv_heads=2')
  process = context.Process(target=convert_and_exit, args=(flags, *more))
  process.start()
  while process.is_alive() and not output.exists():
    time.sleep(0.001)
  return process


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp('mha') / 'checkpoint_1000'
  return write_msgpack(folder, tiny_state(decoder_layers=3))


@pytest.mark.parametrize(
  ('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_signal_in_the_middle_leaves_nothing(number, code, source, tmp_path):
  output, errors = tmp_path / 'gqa', tmp_path / 'errors'
  process = start(source, output, 0.1, errors)
  temporary = output / 'checkpoint_1000.tmp-convert'
  while process.is_alive() and not list(temporary.glob('target.*')):
    time.sleep(0.01)
  os.kill(process.pid, number)
  process.join(30)
  assert process.exitcode == code
  assert not output.exists()
  assert errors.read_text() == 'stopped; nothing was written\n'


def test_kill_at_any_moment_leaves_nothing_or_a_whole_checkpoint(source, tmp_path):
  process, begin = start(source, tmp_path / 'first'), time.monotonic()
  process.join(30)
  assert process.exitcode == 0
  whole = time.monotonic() - begin
  rng, outcomes = random.Random(0), []
  for i in range(10):
    output = tmp_path / f'out{i}'
    process = start(source, output)
    time.sleep(whole * (i + rng.random()) / 6)
    process.kill()
    process.join(30)
    names = os.listdir(output) if output.exists() else []
    outcomes.append(names)
    assert set(names) <= {'checkpoint_1000', 'checkpoint_1000.tmp-convert'}
    if 'checkpoint_1000' not in names:
      # Whoever runs the command again gets the checkpoint, and no remains.
      convert(source, output)
    assert os.listdir(output) == ['checkpoint_1000']
    assert run(f'--verify={output}') == 0
  assert ['checkpoint_1000.tmp-convert'] in outcomes  # some came in the middle


# --- Memory -------------------------------------------------------------------

# getrusage's ru_maxrss would begin with the memory of the process that starts this one.
PEAK = """
import re, sys
from gqa_t5x import convert
assert convert.main(sys.argv) == 0
status = open('/proc/self/status').read()
print('peak', int(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1]) * 1024)
"""


def test_peak_memory_does_not_grow_with_the_layers(tmp_path):
  peaks = {}
  for num_layers in (2, 24):
    source = tmp_path / f'{num_layers}' / 'checkpoint_1000'
    write_wide(source, num_layers)
    flags = (f'--input={source}', f'--output={tmp_path / "out"}', '--num_kv_heads=2')
    done = commands.run(tmp_path, '-c', PEAK, *flags, '--compression=none')
    peaks[num_layers] = int(re.search(r'peak (\d+)', done.stdout)[1])
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / 'out')
  # An attention module; no tensor is larger.
  largest = 4 * 4 * WIDTH * HEADS * HEAD_DIM
  # The checkpoint of 24 layers has 160 MB more than that of 2.
  assert peaks[24] - peaks[2] < largest + 32 * 2**20, peaks
  assert max(peaks.values()) < 2**30 + 3 * largest, peaks


# --- The locale ---------------------------------------------------------------


def test_a_locale_that_is_not_utf8(tmp_path, monkeypatch):
  """JSON is UTF-8 all the same; TensorStore would take a name for another."""
  source = huggingface_folders.write(tmp_path / 'größe')
  text = (source / 'config.json').read_text()
  text = text.replace('{', '{"_name_or_path": "größe", ', 1)
  (source / 'config.json').write_text(text, 'utf-8')
  ascii_only = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
  for name, value in ascii_only.items():
    monkeypatch.setenv(name, value)
  args = '-m', 'gqa_t5x.convert', f'--input={source}', '--num_kv_heads=2'
  done = commands.run(tmp_path, *args, f'--output={tmp_path}/out')
  assert done.returncode == 0, done.stdout
  done = commands.run(tmp_path, *args, f'--output={tmp_path}/größer')
  assert done.returncode == 1
  assert done.stdout.endswith('set PYTHONUTF8=1, or choose another name.\n')
  assert sorted(os.listdir(tmp_path)) == ['größe', 'out']
