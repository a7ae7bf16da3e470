"""Runs that are stopped at random moments, again and again, and lose nothing.

`make test-restarts` runs these. Each start is a process as a user's, which gets a real
signal; GQA_T5X_SEED chooses other moments, and GQA_T5X_MOMENTS fewer.
"""

import os
import random
import re
import signal
import time

import pytest
from etils import epath

from gqa_t5x.checkpoints import folders
from helpers import commands, trees

pytestmark = pytest.mark.restarts

PERIOD = 10  # steps between checkpoints
MACROS = {
  'MODEL_DIR': 'run',
  'CHECKPOINT_PERIOD': PERIOD,
  'EVAL_PERIOD': 2 * PERIOD,
  'STATS_PERIOD': 1,
  'KEEP_CHECKPOINTS': 3,
  'DROPOUT_RATE': 0.1,
}
FILES = ['tiny.gin', 'gin/runs/pretrain.gin', 'task.gin', 'train.gin']
ENDLESS = 100_000


def training(folder, last_step: int = ENDLESS) -> commands.Started:
  """Starts a run; the first one compiles for the others."""
  commands.write_gin(folder)
  args = commands.engine_args('t5x.train', FILES, TRAIN_STEPS=last_step, **MACROS)
  return commands.Started(folder, *args)


def wait_for_training(run: commands.Started) -> None:
  while not re.search(r'train: +\d+%', run.said()):  # the progress bar
    assert run.process.poll() is None, run.said()[-3000:]
    time.sleep(0.05)


def steps(folder) -> list[int]:
  """Of the finished checkpoints."""
  found = folders.list_checkpoints(epath.Path(folder / 'run'))
  return [folders.checkpoint_step(path) for path in found]


def losses(folder) -> dict[int, float]:
  """Training losses by step, of all starts together."""
  found = commands.scalars(folder / 'run' / 'train')
  return {step: value for (tag, step), value in found.items() if tag == 'loss'}


def check_the_same_as_uninterrupted(folder, other) -> None:
  """Goes on for some steps, and compares with one run that nobody stopped."""
  last = max(steps(folder)) + 5
  for where in (folder, other):
    assert training(where, last).end().count('Traceback') == 0
    assert max(steps(where)) == last
  expected, found = losses(other), losses(folder)
  # A run that was killed had gone further than its last checkpoint.
  found = {step: loss for step, loss in found.items() if step <= last}
  assert {step: expected[step] for step in found} == found
  assert len(found) > last / 2
  got, whole = (
    trees.read(where / 'run' / f'checkpoint_{last}') for where in (folder, other)
  )
  trees.assert_same(got, whole)


def moments(number: int) -> list[tuple[bool, float]]:
  """Of each start: whether to wait until it trains, and seconds from then on."""
  draw = random.Random(os.environ.get('GQA_T5X_SEED', '0'))
  number = min(number, int(os.environ.get('GQA_T5X_MOMENTS', number)))
  return [(i % 4 != 3, draw.uniform(0, 4)) for i in range(number)]


@pytest.mark.parametrize(
  ('signum', 'number'), [(signal.SIGTERM, 10), (signal.SIGKILL, 20)]
)
def test_a_signal_loses_nothing(tmp_path, signum, number):
  """SIGTERM saves the step that was reached; SIGKILL damages no checkpoint."""
  folder, reached = tmp_path / 'stopped', 0
  folder.mkdir()
  for trains, seconds in moments(number):
    run = training(folder)
    if trains:
      wait_for_training(run)
    time.sleep(seconds)
    before = max(steps(folder), default=0)
    said = run.end(signum)
    last = max(steps(folder), default=0)
    assert last >= before >= reached
    reached = last
    if 'SIGTERM at step ' in said:
      assert int(re.search(r'SIGTERM at step (\d+)', said)[1]) == last
      assert 'run again, goes on from there' in said
    else:
      assert run.process.returncode == -signum
      # With SIGTERM, it had not begun.
      assert signum == signal.SIGKILL or (not trains and last == before)
    for path in folders.list_checkpoints(epath.Path(folder / 'run')):
      trees.read(path)
  assert reached > 0
  (tmp_path / 'whole').mkdir()
  check_the_same_as_uninterrupted(folder, tmp_path / 'whole')


def test_sigkill_keeps_what_is_inferred(tmp_path):
  commands.engine(tmp_path, 't5x.train', 'pretrain', MODEL_DIR='mha', TRAIN_STEPS=2)
  lines = [f'{n} is a number' for n in range(120)]
  (tmp_path / 'in.txt').write_text('\n'.join(lines) + '\n')

  def start(output):
    macros = {'CHECKPOINT_PATH': 'mha/checkpoint_2', 'INPUT_FILE': 'in.txt'}
    macros |= {'INFER_OUTPUT_DIR': output, 'BATCH_SIZE': 2, 'CHECKPOINT_PERIOD': 1}
    files = ['tiny.gin', 'gin/infer_text.gin']
    args = commands.engine_args('t5x.infer', files, **macros)
    return commands.Started(tmp_path, *args)

  def parts(output):
    return sorted((tmp_path / output).glob('tmp-*/*chunk?????'))

  assert 'Traceback' not in start('whole').end()
  kept = 0
  for _, seconds in moments(5):
    run = start('stopped')
    while run.process.poll() is None and len(parts('stopped')) <= kept:
      time.sleep(0.01)
    time.sleep(seconds / 10)
    run.end(signal.SIGKILL)
    assert run.process.returncode == -signal.SIGKILL
    assert len(parts('stopped')) > kept
    kept = len(parts('stopped'))
  assert 0 < kept < 60
  assert 'Traceback' not in start('stopped').end()
  (whole,) = (tmp_path / 'whole').glob('*-of-00001')
  assert (tmp_path / 'stopped' / whole.name).read_text() == whole.read_text()
  assert len(whole.read_text().splitlines()) == 120
