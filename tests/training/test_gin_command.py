"""Gin on the command line: bindings that cannot be read, splits that are not there."""

import re

import pytest
import seqio

from gqa_t5x.data import splits
from gqa_t5x.errors import BadInput
from gqa_t5x.training import gin_command
from helpers import commands, tiny_task


@pytest.mark.parametrize(
  ('binding', 'said'),
  [
    ('MODEL_DIR = runs/x', '--gin.MODEL_DIR=runs/x: gin cannot read this value. Text'),
    ('A = gs://a/b=c', '--gin.A=gs://a/b=c: '),
    ('a/b.c = true', '--gin.a/b.c=true: '),
    ('Z = ', '--gin.Z=: '),
    ('L = [1', '--gin.L=[1: '),
    ('T = "a', '--gin.T="a: '),
    ('N = 1 0', '--gin.N=1 0: '),
  ],
)
def test_a_value_that_gin_cannot_read_is_named(binding, said):
  readable = ['X = "a=b"', 'Y = @nosuch.thing()', 'Z = %other', 'from a import b']
  gin_command.check_bindings([*readable, 'V = {\n1: 2}'])
  with pytest.raises(BadInput, match=f'^{re.escape(said)}'):
    gin_command.check_bindings([*readable, binding])


def test_the_last_line_names_the_binding(tmp_path):
  """The stand-in's commands, too (tests/t5x_lite); T5X's have T5X's own message."""
  words = ['--gin_file=no.gin', '--gin.SPLIT=test', '--gin.B=1']
  done = commands.run(tmp_path, '-m', 'gqa_t5x.calibrate', *words)
  assert done.returncode == 1
  *_, last = done.stdout.splitlines()
  assert '--gin.SPLIT=test: gin cannot read this value. Text needs quotes' in last


NAMES = "has no split 'dev'; choose one of "


def test_splits_of_a_mixture():
  source = seqio.FunctionDataSource(lambda split, shuffle_files: None, ('test',))
  features = seqio.TaskRegistry.get(tiny_task.NAME).output_features
  seqio.TaskRegistry.add('more', source, output_features=features)
  assert splits.known(tiny_task.NAME, 'train') == 'train'
  seqio.MixtureRegistry.add('both', [(tiny_task.NAME, 1), ('more', 1)])
  try:
    assert splits.known('both', 'test', 'helpers.tiny_task') == 'test'
    with pytest.raises(BadInput, match='both ' + NAMES + 'test, train, validation'):
      splits.known('both', 'dev')
  finally:
    seqio.MixtureRegistry.remove('both')
    seqio.TaskRegistry.remove('more')


@pytest.mark.parametrize(
  ('module', 'folder'),
  [('t5x.eval', 'EVAL_OUTPUT_DIR'), ('t5x.infer', 'INFER_OUTPUT_DIR')],
)
def test_engines_name_the_splits(module, folder, tmp_path):
  macros = {'CHECKPOINT_PATH': 'lost', folder: str(tmp_path / 'out'), 'SPLIT': 'dev'}
  with pytest.raises(BadInput, match=f'tiny_words {NAMES}train, validation'):
    commands.engine_here(tmp_path, module, module.removeprefix('t5x.'), **macros)


def test_training_names_the_splits_that_it_decodes(tmp_path):
  macros = {'MODEL_DIR': str(tmp_path / 'run'), 'SPLIT': 'dev', 'TRAIN_STEPS': 2}
  with pytest.raises(BadInput, match=f'tiny_words {NAMES}train, validation'):
    commands.engine_here(
      tmp_path, 't5x.train', 'pretrain', ['gin/runs/decoded_eval.gin'], **macros
    )
