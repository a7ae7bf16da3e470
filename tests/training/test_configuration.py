"""What a checkpoint's file of the configuration says is kept by runs, and held to."""

import dataclasses
import shutil

import numpy as np
import pytest
from etils import epath

from gqa_t5x.checkpoints import config, folders
from gqa_t5x.errors import BadInput
from gqa_t5x.training import models, restore
from helpers import commands, trees

OTHER = config.ModelConfig(layer_norm_epsilon=0.3, relpos_max_distance=40)
BINDINGS = {f'network.config.{name}': getattr(OTHER, name) for name in
            ('layer_norm_epsilon', 'relpos_max_distance')}  # fmt: skip


@pytest.fixture
def source(pretrained, tmp_path):
  """A checkpoint that says that its model has other numbers."""
  folder = epath.Path(tmp_path / 'source' / 'checkpoint_6')
  shutil.copytree(pretrained / 'mha' / 'checkpoint_6', folder)
  config.write(folder, OTHER)
  return folder


def train(folder, source, **macros):
  macros = {
    'MODEL_DIR': 'run',
    'INITIAL_CHECKPOINT_PATH': str(source),
    'TRAIN_STEPS': 7,
    'NUM_KV_HEADS': None,
    **macros,
  }
  commands.engine_here(folder, 't5x.train', 'uptrain', **macros)


def test_a_run_keeps_it(source, tmp_path):
  train(tmp_path, source, **BINDINGS)
  last = epath.Path(tmp_path / 'run' / 'checkpoint_7')
  assert folders.read_config(last) == OTHER
  # Its next part, and those who read it, are held to it.
  with pytest.raises(BadInput, match=r'checkpoint_7 was made with relpos_max_distance'):
    train(tmp_path, source, TRAIN_STEPS=8)
  macros = {'CHECKPOINT_PATH': str(last), 'EVAL_OUTPUT_DIR': 'eval'}
  with pytest.raises(BadInput, match=r'give --gin\.network\.config\.relpos_max_dist'):
    commands.engine_here(tmp_path, 't5x.eval', 'eval', **macros)
  commands.engine_here(tmp_path, 't5x.eval', 'eval', **macros, **BINDINGS)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({}, r'relpos_max_distance=40, and the model of this run has 128; give --gin\.'),
    ({'decoder_start_token_id': 5}, r'decoder_start_token_id=5, .* can only be conv'),
    ({'eos_token_id': 3}, r"eos_token_id=3, .* choose the checkpoint's VOCABULARY"),
  ],
)
def test_what_a_run_does_not_compute(changes, message, source, tmp_path):
  bindings = BINDINGS if changes else {}
  config.write(source, dataclasses.replace(OTHER, **changes))
  with pytest.raises(BadInput, match=message):
    train(tmp_path, source, **bindings)


@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_a_checkpoint_of_a_run_that_diverged(value, monkeypatch, tmp_path):
  """Whoever opens it: only its layer norms are read."""
  state = trees.tiny_state()
  state['target']['encoder']['encoder_norm']['scale'][1] = value
  folder = trees.write_t5x(tmp_path / 'checkpoint_1000', state)
  monkeypatch.setattr(models, 'check_params', lambda *args: None)
  with pytest.raises(BadInput, match=r'1000 has .* in encoder/encoder_norm/'):
    restore.checked_path(str(folder), model=None)
