"""One short pre-training for all files of this folder."""

import os
import time

import pytest

from gqa_t5x import files
from helpers import commands


@pytest.fixture(scope='session')
def pretrained(tmp_path_factory):
  """A folder whose run `mha` kept the checkpoints of steps 0, 4 and 6; to be copied.

  Processes of pytest-xdist share it: the first trains, the others wait.
  """
  base = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    base = base.parent
  folder = base / 'pretrained'
  folder.mkdir(exist_ok=True)
  while (lock := files.lock(folder)) is None:
    time.sleep(0.5)
  if not (folder / 'mha' / 'checkpoint_6').exists():
    commands.engine_here(folder, 't5x.train', 'pretrain', **commands.PRETRAINING)
  os.close(lock)
  return folder
