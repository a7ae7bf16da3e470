"""What a checkpoint's file of the configuration says is kept by runs, and held to."""

import dataclasses
import shutil

import numpy as np
import pytest
from etils import epath

from gqa_t5x.checkpoints import config, folders
from gqa_t5x.errors import BadInput
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


@pytest.mark.parametrize(
  ('module', 'run_file', 'macros'),
  [
    ('t5x.eval', 'eval', {'EVAL_OUTPUT_DIR': 'out'}),
    ('t5x.infer', 'infer', {'INFER_OUTPUT_DIR': 'out', 'NUM_KV_HEADS': None}),
    (
      't5x.infer',
      'infer',
      {'INFER_OUTPUT_DIR': 'out', 'infer_script.infer.mode': 'score'},
    ),
  ],
)
@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_a_checkpoint_of_a_run_that_diverged(
  module, run_file, macros, value, pretrained, tmp_path
):
  """One value of one kernel; the start of training: test_resume.py."""
  name, folder = 'target/encoder/layers_0/mlp/wo/kernel', tmp_path / 'checkpoint_6'
  arrays = trees.read(pretrained / 'mha' / 'checkpoint_6')
  arrays[name][3, 5] = value
  trees.write_orbax(folder, trees.nest(arrays))
  with pytest.raises(BadInput, match=f'{folder} has .* not finite, in {name[7:]}: it'):
    commands.engine_here(
      tmp_path, module, run_file, CHECKPOINT_PATH=str(folder), **macros
    )
