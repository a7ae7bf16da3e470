"""Two processes that work together do what one does: losses, decodes, checkpoints.

Both run the command that a user types, on two CPU devices each: data 2 x model 2. The
one process is that of the tests, on one device. An engine gives every process every
other example, so that shuffled or packed batches of two processes are not those of one.
Here each batch is the whole split in its order.
"""

import json
import os
import pathlib
import re
import signal
import socket
import time

import numpy as np
import pytest

from helpers import commands, tiny_task, trees

pytestmark = pytest.mark.slow

DATA_GIN = """
from __gin__ import dynamic_registration

import __main__ as train_script
from gqa_t5x.model import network
from t5x import utils

SAVE_DATASET = False

network.config.num_decoder_layers = 1
train_script.train.train_eval_dataset_cfg = None
train/utils.DatasetConfig:
  pack = False
  shuffle = False
infer_eval/utils.DatasetConfig.batch_size = 8
"""
FILES = [
  'tiny.gin',
  'gin/runs/pretrain.gin',
  'gin/runs/decoded_eval.gin',
  'task.gin',
  'train.gin',
  'data.gin',
]
MACROS = {
  'NUM_KV_HEADS': 1,
  'BATCH_SIZE': tiny_task.SIZES['train'],
  'STATS_PERIOD': 1,
  'EVAL_PERIOD': 2,
  'CHECKPOINT_PERIOD': 2,
}


def wait(*processes: commands.Started) -> None:
  """Waits for processes, and stops all of them if one fails."""
  try:
    for one in processes:
      said = one.end()
      assert not one.process.returncode, said[-6000:]
  finally:
    for one in processes:
      one.process.kill()


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


def start_pair(folder, **macros) -> list[commands.Started]:
  """Starts two processes of `python -m t5x.train` on two CPU devices each."""
  macros = MACROS | {'MODEL_PARTITIONS': 2, 'SAVE_DATASET': True, **macros}
  flags = ['--multiprocess_gpu', f'--coordinator_address=localhost:{free_port()}']
  args = [*commands.engine_args('t5x.train', FILES, **macros), *flags]
  return [
    commands.Started(
      folder,
      *args,
      '--process_count=2',
      f'--process_index={index}',
      JAX_NUM_CPU_DEVICES='2',
    )
    for index in range(2)
  ]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Four steps by one process; two by two processes, and two more by one."""
  folder = tmp_path_factory.mktemp('runs')
  commands.write_gin(folder)
  (folder / 'data.gin').write_text(DATA_GIN)
  wait(*start_pair(folder, MODEL_DIR='pair', TRAIN_STEPS=2))
  files = {path.relative_to(folder / 'pair') for path in (folder / 'pair').rglob('*')}
  for name in ('one', 'pair'):
    macros = MACROS | {'MODEL_DIR': name, 'TRAIN_STEPS': 4}
    commands.files_here(folder, 't5x.train', FILES, **macros)
  return folder, files


def test_metrics_are_those_of_one_process(runs):
  folder, _ = runs
  one, pair = (commands.scalars(folder / name / 'train') for name in ('one', 'pair'))
  assert sorted(step for name, step in one if name == 'loss') == [1, 2, 3, 4]
  for step in (1, 2, 3, 4):
    for tag in ('loss', 'accuracy', 'learning_rate'):
      assert pair[tag, step] == pytest.approx(one[tag, step], rel=1e-5)
  assert np.ptp([one['loss', step] for step in (1, 2, 3, 4)]) > 1  # They differ.


def test_decodes_are_those_of_one_process(runs):
  folder, _ = runs
  for step in (2, 4):
    name = f'inference_eval/{tiny_task.NAME}-{step:06}.jsonl'
    one, pair = ((folder / run / name).read_text() for run in ('one', 'pair'))
    rows = [json.loads(line) for line in one.splitlines()]
    assert len([row['prediction'] for row in rows if row['prediction']]) == 8
    assert [json.loads(line) for line in pair.splitlines()] == rows


def test_both_write_the_checkpoint(runs):
  """Each its own devices' part and its own position in the data."""
  folder, files = runs
  saved = pathlib.Path('checkpoint_2')
  for index in range(2):
    assert saved / 'state' / f'ocdbt.process_{index}' in files
    data = f'process_{index}-of-2/train_ds-00{index}-of-002.index'
    assert saved / 'dataset' / data in files
  assert commands.steps(folder / 'pair') == [0, 2, 4]
  one, pair = (trees.read(folder / name / 'checkpoint_2') for name in ('one', 'pair'))
  assert one.keys() == pair.keys()
  assert len(one) > 100
  for name, tensor in one.items():
    np.testing.assert_allclose(pair[name], tensor, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_first_alone_writes_the_rest(runs):
  _, files = runs
  for pattern in ('train/events*', 'config.gin', 'model-info.txt'):
    assert len([path for path in files if path.match(pattern)]) == 1, pattern
  assert not [path for path in files if os.fspath(path).endswith('.tmp')]


@pytest.mark.restarts
def test_a_notice_to_one_process_stops_both_at_one_step(tmp_path):
  """JAX's pre-emption service tells the other process, and both save together."""
  commands.write_gin(tmp_path)
  (tmp_path / 'data.gin').write_text(DATA_GIN)
  pair = start_pair(tmp_path, MODEL_DIR='run', TRAIN_STEPS=10_000, KEEP_CHECKPOINTS=2)
  try:
    while not (tmp_path / 'run' / 'checkpoint_4').exists():
      assert all(one.process.poll() is None for one in pair)
      time.sleep(0.1)
    said = [pair[1].end(signal.SIGTERM), pair[0].end()]
  finally:
    for one in pair:
      one.process.kill()
  steps = {int(re.search(r'SIGTERM at step (\d+)', text)[1]) for text in said}
  assert len(steps) == 1
  assert steps == {max(commands.steps(tmp_path / 'run'))}
  assert min(steps) >= 4
