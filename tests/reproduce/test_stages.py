"""The runner of stages: order, side by side, failure, Ctrl-C, resuming, the lock."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from gqa_t5x import files
from gqa_t5x.reproduce.runner import process, progress, stages
from gqa_t5x.reproduce.runner.stages import Stage
from helpers import commands

# Waits until a file is there, as long as a slow machine may take to start Python.
WAIT = """
import os, sys, time
def wait(path):
  end = time.monotonic() + 30
  while not os.path.exists(path):
    assert time.monotonic() < end, path
    time.sleep(0.02)
"""
# Notes its cores and its turn, makes its result.
WRITE = (
  WAIT
  + """
result, *others = sys.argv[1:]
open(result + '.begun', 'w').close()
for other in others:
  wait(other)
with open(result + '.tmp', 'w') as file:
  print(*sorted(os.sched_getaffinity(0)), file=file)
os.rename(result + '.tmp', result)
"""
)
# Notes its process and sleeps longer than a test may take.
SLEEP = """
import os, sys, time
with open(sys.argv[1] + '.tmp', 'w') as file:
  file.write(str(os.getpid()))
os.rename(sys.argv[1] + '.tmp', sys.argv[1] + '.pid')
time.sleep(300)
"""


def write(folder, name, needs=(), wait_for=()) -> Stage:
  result = folder / name
  others = [str(folder / other) for other in wait_for]
  return Stage(name, result, ('-c', WRITE, str(result), *others), tuple(needs))


def sleep(folder, name) -> Stage:
  return Stage(name, folder / name, ('-c', SLEEP, str(folder / name)))


def before(folder, name, other) -> Stage:
  """Takes half a second, and fails if the other begins meanwhile."""
  code = (
    'import os, sys, time; time.sleep(0.5);'
    'assert not os.path.exists(sys.argv[2]); open(sys.argv[1], "w")'
  )
  paths = str(folder / name), str(folder / f'{other}.begun')
  return Stage(name, folder / name, ('-c', code, *paths))


def is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def cores(path) -> list[int]:
  return [int(core) for core in path.read_text().split()]


def test_needs_decide_and_the_rest_runs_side_by_side(tmp_path, capsys):
  first = write(tmp_path, 'first')
  # Each of the two ends only when the other has begun.
  left = write(tmp_path, 'left', [first], ['right.begun'])
  right = write(tmp_path, 'right', [first], ['left.begun'])
  plan = [first, left, right, write(tmp_path, 'last', [left, right])]
  assert stages.run(plan, tmp_path, jobs=2) == 0
  made = [(tmp_path / s.title).stat().st_mtime_ns for s in plan]
  assert made[0] <= min(made[1:3]) <= max(made[1:3]) <= made[3]
  everything = process.available_cores()
  assert cores(tmp_path / 'first') == cores(tmp_path / 'last') == everything
  pair = [cores(tmp_path / 'left'), cores(tmp_path / 'right')]
  assert sorted(pair) == sorted(stages.share_cores(everything, 2))
  out = capsys.readouterr().out
  for line in ('[1/4] first: ', '[2/4] left: ', '[3/4] right: ', '[4/4] last: '):
    assert line in out
  assert process.available_cores() == everything


@pytest.mark.parametrize(
  ('cores', 'jobs', 'expected'),
  [
    ([0, 1], 2, [[0], [1]]),
    ([4, 5, 6, 7, 8], 2, [[4, 6, 8], [5, 7]]),
    ([3], 2, [[3], [3]]),
    ([0, 1], 3, [[0], [1], [0]]),
  ],
)
def test_share_cores(cores, jobs, expected):
  assert stages.share_cores(cores, jobs) == expected


def test_one_job_takes_one_stage_after_the_other(tmp_path):
  plan = [write(tmp_path, 'a'), before(tmp_path, 'b', 'c'), write(tmp_path, 'c')]
  assert stages.run(plan, tmp_path, jobs=1) == 0
  assert (tmp_path / 'c').exists()


def test_long_stages_go_first(tmp_path):
  short, long = write(tmp_path, 'short'), write(tmp_path, 'long')
  plan = [short, dataclasses.replace(long, work=stages.SHORT + 1)]
  assert stages.run(plan, tmp_path, jobs=1) == 0
  made = [(tmp_path / name).stat().st_mtime_ns for name in ('long', 'short')]
  assert made == sorted(made)


def test_what_measures_time_runs_alone(tmp_path):
  """It waits for what has begun, though there is a free place."""
  timed = dataclasses.replace(write(tmp_path, 'timed'), alone=True)
  plan = [timed, before(tmp_path, 'slow', 'timed'), write(tmp_path, 'fast')]
  assert stages.run(plan, tmp_path, jobs=2) == 0
  assert cores(tmp_path / 'timed') == process.available_cores()


def test_what_exists_is_done(tmp_path, capsys):
  (tmp_path / 'a').write_text('made elsewhere')
  plan = [a := write(tmp_path, 'a'), write(tmp_path, 'b', [a])]
  assert stages.run(plan, tmp_path, jobs=2) == 0
  assert (tmp_path / 'a').read_text() == 'made elsewhere'
  assert not (tmp_path / 'a.begun').exists()
  assert (tmp_path / 'b').exists()
  assert '[1/2] a: done' in capsys.readouterr().out


MAKE_BOTH = """
import os, sys, time
os.makedirs(sys.argv[1], exist_ok=True)
open(os.path.join(sys.argv[1], 'whole'), 'w').close()
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


def test_leftovers_go_before_a_stage_starts(tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()
  (folder / 'half').write_text('')
  command = ('-c', MAKE_BOTH, str(folder), '0', '0')
  stage = Stage('a', folder / 'whole', command, leftover=folder)
  assert stages.run([stage], tmp_path, jobs=2) == 0
  assert [path.name for path in folder.iterdir()] == ['whole']


def test_leftovers_of_a_failure_go_even_if_the_result_is_there(tmp_path):
  """T5X saves its last checkpoint, then evaluates: that may still fail."""
  folder = tmp_path / 'run'
  command = ('-c', MAKE_BOTH, str(folder), '0', '1')
  stage = Stage('a', folder / 'whole', command, leftover=folder)
  assert stages.run([stage], tmp_path, jobs=2) == 1
  assert not folder.exists()


def test_a_need_is_met_when_its_stage_has_ended(tmp_path):
  """Not as soon as the result is there."""
  folder = tmp_path / 'run'
  slow = ('-c', MAKE_BOTH, str(folder), '1', '0')
  plan = [
    first := Stage('slow', folder / 'whole', slow),
    # Keeps the second place busy, so that both end at different times.
    write(tmp_path, 'other'),
    write(tmp_path, 'after', [first]),
  ]
  tick = time.monotonic()
  assert stages.run(plan, tmp_path, jobs=2) == 0
  assert time.monotonic() - tick > 1
  begun = (tmp_path / 'after.begun').stat().st_mtime_ns
  assert begun - (folder / 'whole').stat().st_mtime_ns > 0.9e9


def test_a_failure_stops_the_rest(tmp_path, capsys):
  pid_file = tmp_path / 'sleeper.pid'
  fail = WAIT + 'wait(sys.argv[1]); print("the reason"); sys.exit(3)'
  plan = [
    sleep(tmp_path, 'sleeper'),
    bad := Stage('bad', tmp_path / 'bad', ('-c', fail, str(pid_file))),
    write(tmp_path, 'after', [bad]),
  ]
  start = time.monotonic()
  assert stages.run(plan, tmp_path, jobs=2) == 1
  assert time.monotonic() - start < 60
  assert not is_alive(int(pid_file.read_text()))
  assert not (tmp_path / 'after.begun').exists()
  err = capsys.readouterr().err
  assert 'the reason' in err
  assert f'exit code 3; its whole log is {tmp_path}/logs/02.log' in err


def test_a_stage_must_leave_its_result(tmp_path, capsys):
  stage = Stage('a', tmp_path / 'a', ('-c', 'pass'))
  assert stages.run([stage], tmp_path, jobs=1) == 1
  assert f'python -c pass ended well, but left no {tmp_path}/a.' in (
    capsys.readouterr().err
  )


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_process_and_goes_on(tmp_path, number):
  code = (
    'import pathlib, signal, sys\n'
    # Shells let background jobs ignore Ctrl-C, and children inherit that.
    'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
    'from gqa_t5x.command_line import Command\n'
    'from gqa_t5x.reproduce.runner import stages\n'
    'folder, write, sleep = pathlib.Path(sys.argv[1]), *sys.argv[2:]\n'
    'plan = [stages.Stage(n, folder / n, ("-c", c, str(folder / n)))\n'
    '        for n, c in zip("abc", (write, sleep, sleep))]\n'
    'run = lambda args: stages.run(plan, folder, jobs=2)\n'
    'sys.exit(Command("t", "").run(sys.argv[:1], run))\n'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path), WRITE, SLEEP],
    env=commands.environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  pid_files = [tmp_path / 'b.pid', tmp_path / 'c.pid']
  end = time.monotonic() + 60
  while not all(path.exists() for path in pid_files):
    assert time.monotonic() < end
    time.sleep(0.05)
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130
  assert 'Stopped. Run the same command again to go on from here.' in err
  assert not any(is_alive(int(path.read_text())) for path in pid_files)
  before = (tmp_path / 'a').stat().st_mtime_ns
  plan = [write(tmp_path, name) for name in 'abc']
  assert stages.run(plan, tmp_path, jobs=2) == 0
  assert (tmp_path / 'a').stat().st_mtime_ns == before
  assert (tmp_path / 'b').exists()
  assert (tmp_path / 'c').exists()


def test_a_locked_folder_is_refused(tmp_path, capsys):
  lock = files.lock(tmp_path / 'lock')
  assert stages.run([write(tmp_path, 'a')], tmp_path, jobs=1) == 1
  os.close(lock)
  err = capsys.readouterr().err
  assert err == (
    f'Another run is at work in {tmp_path}; wait for it, or choose another'
    ' --output_dir.\n'
  )
  assert not (tmp_path / 'a').exists()
  assert stages.run([write(tmp_path, 'a')], tmp_path, jobs=1) == 0


@pytest.mark.parametrize(
  ('jobs', 'names', 'message'),
  [
    (0, 'a', '--jobs=0 must be at least 1.'),
    (1, 'aa', 'as an earlier stage does'),
    (1, 'ba', 'b needs FOLDER/a, which no earlier stage makes'),
  ],
)
def test_faulty_plans_are_refused(tmp_path, capsys, jobs, names, message):
  a = write(tmp_path, 'a')
  known = {'a': a, 'b': write(tmp_path, 'b', [a])}
  plan = [known[name] for name in names]
  assert stages.run(plan, tmp_path, jobs=jobs) == 1
  assert message.replace('FOLDER', str(tmp_path)) in capsys.readouterr().err
  assert not (tmp_path / 'a').exists()


def test_a_bar_that_is_redrawn_is_no_line_of_the_log(tmp_path, capsys):
  code = (
    'import sys; print("to stdout"); '
    'sys.stderr.write("train: 50%|##\\rtrain: 75%|### | 3/4 [00:01<00:00]no backend\\n'
    'train: 100%|####\\nnoise\\n"); open(sys.argv[1], "w")'
  )
  stage = Stage('a', tmp_path / 'a', ('-c', code, str(tmp_path / 'a')))
  assert stages.run([stage], tmp_path, jobs=1) == 0
  err = capsys.readouterr().err
  assert '0 of 1 done, a' in err
  assert 'noise' not in err
  lines = (tmp_path / 'logs' / '01.log').read_text().splitlines()
  assert set(lines[1:]) == {'to stdout', 'noise', 'no backend'}


def test_one_bar_counts_the_work_of_all(tmp_path, capsys):
  plan = [
    Stage(name, tmp_path / name, (), work=work)
    for name, work in (('before', 500), ('a', 30), ('b', 10))
  ]
  shown = progress.Progress(plan, done={plan[0]})
  shown.begin(plan[1])
  shown.begin(plan[2])
  shown.update(plan[1], 'train:  50%|#####     | 15/30')
  shown.end(plan[2], seconds=1.2)
  assert shown._bar.total == 40
  assert shown._bar.n == pytest.approx(15 + 10)
  assert shown._bar.desc == '2 of 3 done, a'
  shown.close()
  out = capsys.readouterr().out
  assert '[1/3] before: done' in out
  assert '[3/3] b: 1 s' in out
