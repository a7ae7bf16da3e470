"""The scripts of launch/: the commands that they print, and the loop that they run."""

import importlib.util
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / 'launch'
SETTING = {
  'PROJECT': 'a-project',
  'ZONE': 'us-central2-b',
  'NAME': 'gqa',
  'ACCELERATOR_TYPE': 'v4-16',
  'DEVICES': '8',
  'PROVISIONING': 'spot',
  'BUCKET': 'gs://bucket',
  'REPOSITORY': 'https://host/gqa_t5x.git',
  'COMMIT': '0123abc',
}
WHERE = '--project=a-project --zone=us-central2-b'
QUEUED = 'gcloud compute tpus queued-resources'
SSH = f'gcloud compute tpus tpu-vm ssh gqa {WHERE}'.split()
IN_REPOSITORY = '--command=cd /opt/gqa_t5x && source .venv/bin/activate && '


def tpu(*args, folder=None, env_file='env.example.sh', **changes):
  """Runs launch/tpu.sh in an environment of its own."""
  setting = {name: v for name, v in (SETTING | changes).items() if v is not None}
  path = f'{folder}:{os.environ["PATH"]}' if folder else os.environ['PATH']
  return subprocess.run(
    ['bash', str(LAUNCH / 'tpu.sh'), *args],
    env={'PATH': path, 'ENV_FILE': str(LAUNCH / env_file), **setting},
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )


def printed(*args, **changes):
  """The commands of a dry run, as words; what is a comment is left out."""
  done = tpu('--dry_run', *args, **changes)
  assert done.returncode == 0, done.stderr
  lines = (line for line in done.stdout.splitlines() if not line.startswith('#'))
  return [shlex.split(line) for line in lines]


@pytest.mark.parametrize(
  ('accelerator', 'version', 'provisioning', 'tier'),
  [
    ('v4-16', 'tpu-ubuntu2204-base', 'spot', '--spot '),
    ('v3-32', 'tpu-ubuntu2204-base', 'reserved', '--reserved '),
    ('v5litepod-8', 'v2-alpha-tpuv5-lite', 'on-demand', ''),
    ('v5p-8', 'v2-alpha-tpuv5', 'spot', '--spot '),
    ('v6e-4', 'v2-alpha-tpuv6e', 'spot', '--spot '),
  ],
)
def test_create(accelerator, version, provisioning, tier):
  changes = {'ACCELERATOR_TYPE': accelerator, 'PROVISIONING': provisioning}
  ((*words, script, metadata),) = printed('create', TRAIN='a b, c', **changes)
  assert ' '.join(words) == (
    f'{QUEUED} create gqa {WHERE} --node-id=gqa --accelerator-type={accelerator}'
    f' --runtime-version={version} {tier}--scopes=cloud-platform'
  )
  assert script == f'--metadata-from-file=startup-script={LAUNCH}/startup.sh'
  assert metadata == (
    '--metadata=^|^bucket=gs://bucket|name=gqa|repository=https://host/gqa_t5x.git'
    '|commit=0123abc|devices=8|train=a b, c'
  )


@pytest.mark.parametrize(
  ('args', 'expected'),
  [
    (['status'], f'{QUEUED} describe gqa {WHERE} --format=value(state.state)'),
    (['delete'], f'{QUEUED} delete gqa {WHERE} --force --quiet'),
    (['logs'], 'gcloud storage cat gs://bucket/logs/gqa/worker-0.log'),
    (['logs', '3'], 'gcloud storage cat gs://bucket/logs/gqa/worker-3.log'),
  ],
)
def test_commands(args, expected):
  assert printed(*args) == [expected.split()]


def test_commands_on_the_hosts():
  """`run` sees first that all hosts are there."""
  check, run = printed('run', 'python', '-m', 't5x.train', "--gin.X='a b'")
  command = f'{IN_REPOSITORY}timeout 300 python launch/check_devices.py 8'
  assert check == [*SSH, '--worker=all', command]
  assert printed('check') == [check]
  assert run[:-1] == [*SSH, '--worker=all']
  command = run[-1].removeprefix(IN_REPOSITORY)
  assert shlex.split(command) == ['python', '-m', 't5x.train', "--gin.X='a b'"]
  (benchmark,) = printed('benchmark', '--size=xxl', '--num_kv_heads=8,1')
  command = 'python launch/trace.py gs://bucket/traces/gqa decode --size=xxl'
  command = f'{IN_REPOSITORY}{command} --num_kv_heads=8\\,1 '
  assert benchmark == [*SSH, '--worker=0', command]


def test_watch_prints_what_it_would_do():
  commands = printed('watch')
  assert commands[0] == ['gcloud', 'storage', 'ls', 'gs://bucket/done/gqa']
  assert [words[4] for words in commands[1:]] == ['describe', 'delete', 'create']


GCLOUD = """#!/usr/bin/env bash
echo "$*" >> {folder}/calls
case "$*" in
  *'storage ls'*) (( $(grep -c 'storage ls' {folder}/calls) > 4 )) ;;
  *describe*)
    n=$(grep -c describe {folder}/calls)
    states=(x '' WAITING_FOR_RESOURCES ACTIVE SUSPENDED)
    [[ -n "${{states[$n]}}" ]] && echo "${{states[$n]}}"
    ;;
esac
"""


def test_watch_creates_what_was_taken_away(tmp_path):
  """With a gcloud that has no TPU, then one that waits, works, and is taken away."""
  fake = tmp_path / 'gcloud'
  fake.write_text(GCLOUD.format(folder=tmp_path))
  fake.chmod(0o755)
  done = tpu('watch', folder=tmp_path, WATCH_S='0')
  assert done.returncode == 0, done.stderr
  calls = (tmp_path / 'calls').read_text().splitlines()
  verbs = [next(w for w in c.split() if w in VERBS) for c in calls]
  wait = ['ls', 'describe']
  assert verbs == [
    *wait, 'create', *wait, *wait, *wait, 'delete', 'create', 'ls', 'delete',
  ]  # fmt: skip
  assert 'has done its work' in done.stdout


VERBS = ('ls', 'describe', 'create', 'delete')


@pytest.mark.parametrize(
  ('args', 'changes', 'message'),
  [
    (['create'], {'ZONE': None, 'BUCKET': None}, 'error: not set: ZONE BUCKET. Copy'),
    (['create'], {'DEVICES': None, 'COMMIT': ''}, 'error: not set: DEVICES COMMIT.'),
    (['status'], {'PROJECT': None}, 'error: not set: PROJECT.'),
    (['create'], {'PROVISIONING': 'cheap'}, 'choose spot, reserved or on-demand'),
    (['create'], {'ACCELERATOR_TYPE': 'h100-8'}, 'h100-8 is none of v3-*, v4-*'),
    (['status'], {'BUCKET': 'bucket'}, 'BUCKET=bucket is no bucket; write gs://NAME'),
    (['start'], {}, 'start is no command; see launch/tpu.sh --help'),
    (['run'], {}, 'run what?'),
    (['create', '--dry_run'], {}, 'create takes nothing more, not: --dry_run'),
    (['delete', 'other'], {}, 'delete takes nothing more, not: other'),
    (['logs', 'x'], {}, "logs takes a host's number, not: x"),
    (['watch'], {'TRAIN': ' ', 'NAME': None, 'PROJECT': None}, 'not set: PROJECT.'),
  ],
)
def test_bad_input(args, changes, message):
  done = tpu('--dry_run', *args, **changes)
  assert done.returncode == 1
  assert done.stdout == ''
  assert message in done.stderr
  assert done.stderr.count('\n') == 1


def test_help():
  done = tpu('--help', PROJECT=None)
  assert done.returncode == 0
  assert done.stdout.startswith('Usage: launch/tpu.sh [--dry_run] COMMAND')


def test_a_file_of_ones_own_and_the_environment_before_it(tmp_path):
  file = tmp_path / 'env.sh'
  file.write_text(': "${PROJECT:=from-file}"\n: "${ZONE:=from-file}"\n')
  done = tpu('--dry_run', 'status', env_file=file, PROJECT=None)
  assert '--project=from-file --zone=us-central2-b' in done.stdout


TRAIN = 'A=1\npython -m t5x.train --gin.X="\'gs://b\'" |\n  tee "log"'


def test_jobset():
  done = tpu('jobset', TRAIN=TRAIN, GKE_HOSTS='4')
  assert done.returncode == 0, done.stderr
  jobset = yaml.safe_load(done.stdout)
  assert (jobset['apiVersion'], jobset['kind']) == (
    'jobset.x-k8s.io/v1alpha2',
    'JobSet',
  )
  assert jobset['metadata']['name'] == 'gqa'
  assert jobset['spec']['failurePolicy']['maxRestarts'] > 0
  (job,) = jobset['spec']['replicatedJobs']
  job = job['template']['spec']
  assert (job['parallelism'], job['completions'], job['backoffLimit']) == (4, 4, 0)
  pod = job['template']['spec']
  assert pod['terminationGracePeriodSeconds'] >= 60
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': '2x4',
  }
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  script = container['args'][0].splitlines()
  assert script[0].startswith('git clone https://host/gqa_t5x.git ')
  assert script[1] == 'git checkout 0123abc'
  # `train` passes SIGTERM on.
  assert script[-2:] == ['source launch/startup.sh', 'train "$TRAIN"']
  assert container['env'] == [{'name': 'TRAIN', 'value': TRAIN}]
  assert '{' not in done.stdout


def test_the_commands_train_as_gin_reads_them():
  """What the hosts run, after two shells: strings with gin's own quotes."""
  (words,) = printed('create')
  train = words[-1].partition('|train=')[2]
  done = subprocess.run(
    ['bash', '-c', f'set -- {train}; printf "%s\\n" "$@"'],
    capture_output=True,
    text=True,
    check=True,
  )
  args = done.stdout.splitlines()
  assert args[:4] == ['python', '-m', 't5x.train', '--multiprocess_gpu']
  assert "--gin.MODEL_DIR='gs://bucket/uptrain_gqa8'" in args
  checkpoint = "'gs://bucket/xxl_gqa8/checkpoint_1000000'"
  assert f'--gin.INITIAL_CHECKPOINT_PATH={checkpoint}' in args


@pytest.mark.parametrize('train', ['a | tee b', 'a || b', 'x && y, z'])
def test_metadata_of_any_command(train):
  (words,) = printed('create', TRAIN=train)
  _, mark, values = words[-1].removeprefix('--metadata=').split('^')
  assert values.split(mark)[-1] == f'train={train}'
  assert len(values.split(mark)) == 6


# --- The loop of the hosts ------------------------------------------------------


def hosts_loop(folder, script, command):
  """Starts until_done of startup.sh on a script; it counts its starts in a file."""
  job = folder / 'job.sh'
  job.write_text(f'echo x >> {folder}/starts\nn=$(wc -l < {folder}/starts)\n{script}\n')
  text = f'source {LAUNCH}/startup.sh; {command} "bash {job}; touch {folder}/next"'
  return subprocess.Popen(
    ['bash', '-c', text],
    env={'PATH': os.environ['PATH'], 'PAUSE_S': '0', 'LIMIT': '3', 'QUICK_S': '2'},
    stdout=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize(
  ('commands', 'code', 'written'),
  [
    ('echo a > x && echo b >> x', 0, 'a\nb\n'),
    ('echo a > x\necho b >> x', 0, 'a\nb\n'),
    ("A=1 bash -c 'echo $A > x'", 0, '1\n'),
    ('mkdir d; cd d && echo a > ../x', 0, 'a\n'),
    ('echo a > x\nfalse\necho b >> x', 1, 'a\n'),
    ('echo a > x; false | cat; echo b >> x', 1, 'a\n'),
    ('echo a > x; (exit 7) && echo b >> x', 7, 'a\n'),
  ],
)
def test_commands_are_run_as_a_shell_does(commands, code, written, tmp_path):
  done = subprocess.run(
    ['bash', '-c', f'source {LAUNCH}/startup.sh; train "$1"', '-', commands],
    cwd=tmp_path,
    check=False,
    timeout=30,
  )
  assert done.returncode == code
  assert (tmp_path / 'x').read_text() == written


def starts(folder) -> int:
  return len((folder / 'starts').read_text().splitlines())


def test_a_mistake_is_not_run_for_ever(tmp_path):
  process = hosts_loop(tmp_path, 'exit 1', 'until_done train')
  said, _ = process.communicate(timeout=30)
  assert process.returncode == 1
  assert starts(tmp_path) == 3
  assert 'given up after 3 quick failures in a row' in said


def test_training_is_run_again_and_slow_failures_do_not_count(tmp_path):
  script = '(( n == 3 )) && sleep 2.2 && exit 1; (( n > 5 ))'
  process = hosts_loop(tmp_path, script, 'until_done train')
  said, _ = process.communicate(timeout=30)
  assert said.count('ended badly; again in') == 5
  assert process.returncode == 0  # two quick ones, a slow one, two quick ones, success
  assert starts(tmp_path) == 6


def test_training_gets_the_signal_and_time_to_save(tmp_path):
  script = f'trap "sleep 0.5; echo saved > {tmp_path}/saved; exit 7" TERM\n'
  script += f'echo > {tmp_path}/ready; while true; do sleep 0.1; done'
  process = hosts_loop(tmp_path, script, 'train')
  while not (tmp_path / 'ready').exists():
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 143  # SIGTERM's, whatever it ends with
  assert (tmp_path / 'saved').read_text() == 'saved\n'
  assert not (tmp_path / 'next').exists()


# --- Python, and style ----------------------------------------------------------


def load(name):
  spec = importlib.util.spec_from_file_location(name, LAUNCH / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_a_trace(tmp_path, monkeypatch, capsys):
  trace = load('trace')
  folder = tmp_path / 'trace'

  def measure(argv):
    assert argv == ['benchmark', 'decode', '--size=tiny']
    assert not list(folder.rglob('*.xplane.pb'))
    return 3

  monkeypatch.setattr(trace.benchmark, 'main', measure)
  assert trace.main(['trace.py', str(folder), 'decode', '--size=tiny']) == 3
  assert len(list(folder.rglob('*.xplane.pb'))) == 1
  assert trace.main(['trace.py']) == 2
  assert 'Usage: python launch/trace.py FOLDER' in capsys.readouterr().err


@pytest.mark.parametrize('expected', [8, 4])
def test_devices_are_counted(monkeypatch, capsys, expected):
  check_devices = load('check_devices')
  monkeypatch.setattr(check_devices.jax.distributed, 'initialize', lambda: None)
  assert check_devices.main(expected) == int(expected != 8)
  said = capsys.readouterr().out
  assert 'host 0 of 1: 8 of 8 devices are here' in said
  assert ('error: 4 devices are expected' in said) == (expected == 4)


def test_scripts_are_clean():
  shellcheck = shutil.which('shellcheck', path=f'{pathlib.Path(sys.executable).parent}')
  shellcheck = shellcheck or shutil.which('shellcheck')
  assert shellcheck, 'shellcheck is missing; make setup installs it'
  scripts = sorted(map(str, LAUNCH.glob('*.sh')))
  assert len(scripts) >= 3
  done = subprocess.run(
    [shellcheck, *scripts], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout
