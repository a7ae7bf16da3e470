"""Bad input to a run: one clear message before the first step, nothing left behind.

`python -m gqa_t5x.convert` has its own (test_convert.py).
"""

import gc
import pathlib
import re
import shutil

import numpy as np
import pytest
from flax import serialization

from gqa_t5x import convert
from gqa_t5x.training import run_lock
from helpers import commands

# What the reading threads of a damaged checkpoint raise besides.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)

KV = 'decoder/layers_0/encoder_decoder_attention/key/kernel'
CONFIG = 'network.config'


@pytest.fixture(scope='module')
def root(pretrained, tmp_path_factory):
  """Has checkpoints of step 0: MHA, GQA (2 heads), MHA in T5X's old layout."""
  made = tmp_path_factory.mktemp('bad_input') / 'made'
  source = pretrained / 'mha' / 'checkpoint_0'
  shutil.copytree(source, made / 'mha' / 'checkpoint_0')
  for name, num_kv_heads in (('gqa', 2), ('old', 8)):
    flags = [f'--input={source}', f'--output={made}/{name}']
    assert convert.main(['convert', *flags, f'--num_kv_heads={num_kv_heads}']) == 0
  return made.parent


def train(model_dir, run_file: str = 'uptrain', **macros) -> None:
  """What `python -m t5x.train` does, in this process, in the folder of `model_dir`."""
  macros = {'MODEL_DIR': str(model_dir), 'TRAIN_STEPS': 2, **macros}
  commands.engine_here(model_dir.parent, 't5x.train', run_file, **macros)


def left_behind(folder) -> list[str]:
  """What a run wrote, apart from its model's description and this process's lock."""
  files = {path.name for path in folder.glob('*')}
  return sorted(files - {'model-info.txt', run_lock.NAME})


def assert_refused(tmp_path, *messages: str, **macros) -> None:
  """Fails unless training stops with all messages in its error, and leaves nothing."""
  with pytest.raises(ValueError) as caught:
    train(tmp_path / 'run', **macros)
  for message in messages:
    assert re.search(message, str(caught.value)), str(caught.value)
  assert left_behind(tmp_path / 'run') == []


def at(root, name: str) -> str:
  return str(root / 'made' / name / 'checkpoint_0')


def test_heads_that_do_not_divide(tmp_path):
  message = (
    r'num_heads=8 is not divisible by num_kv_heads=5; choose one of 1, 2, 4, 8\.'
  )
  assert_refused(tmp_path, message, run_file='pretrain', NUM_KV_HEADS=5)


@pytest.mark.parametrize(
  ('name', 'heads', 'found', 'wanted'),
  [
    ('mha', 2, 128, 32),
    ('old', 2, 128, 32),
    ('gqa', None, 32, 128),
    ('gqa', 1, 32, 16),
  ],
)
def test_checkpoint_of_other_heads(root, tmp_path, name, heads, found, wanted):
  path = at(root, name)
  shapes = rf'{KV}: \(128, {found}\) in the checkpoint, \(128, {wanted}\) in the model'
  mend = 'set NUM_KV_HEADS .*or convert it: python -m gqa_t5x.convert'
  macros = {'INITIAL_CHECKPOINT_PATH': path, 'NUM_KV_HEADS': heads}
  assert_refused(tmp_path, re.escape(path), shapes, mend, **macros)


@pytest.mark.parametrize('name', ['mha', 'old'])
@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('mlp_dim', 320, r'wi_0/kernel: \(128, 256\) in the checkpoint, \(128, 320\)'),
    ('num_decoder_layers', 3, r'decoder/layers_2/.*: missing in the checkpoint'),
    # T5X restores this one without a word.
    ('num_decoder_layers', 1, r'decoder/layers_1/.*\(128, 128\).*unknown in the model'),
  ],
)
def test_checkpoint_of_another_size(root, tmp_path, name, field, value, message):
  macros = {'INITIAL_CHECKPOINT_PATH': at(root, name), f'{CONFIG}.{field}': value}
  mend = 'checkpoint of another model size'
  assert_refused(tmp_path, re.escape(at(root, name)), message, mend, **macros)


def test_resuming_with_other_heads(root, tmp_path):
  """The checkpoint in MODEL_DIR goes first, and is checked as well."""
  shutil.copytree(root / 'made' / 'mha', tmp_path / 'run')
  with pytest.raises(ValueError, match=re.escape(str(tmp_path / 'run/checkpoint_0'))):
    train(tmp_path / 'run', INITIAL_CHECKPOINT_PATH=at(root, 'gqa'), NUM_KV_HEADS=2)
  assert commands.steps(tmp_path / 'run') == [0]


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('made/nowhere/checkpoint_0', 'there is no checkpoint at {path}'),
    ('made', 'there is no T5X checkpoint in {path}'),
    ('made/mha', '{path} is a folder of checkpoints; give one of them: {path}/checkp'),
  ],
)
def test_missing_checkpoint(root, tmp_path, path, message):
  path = str(root / path)
  message = re.escape(message.format(path=path))
  assert_refused(tmp_path, message, INITIAL_CHECKPOINT_PATH=path)


def test_empty_path(tmp_path):
  assert_refused(tmp_path, 'empty; give', INITIAL_CHECKPOINT_PATH='')


@pytest.mark.parametrize('damage', ['truncated', 'no msgpack', 'no tensor'])
def test_partial_checkpoint_in_the_old_layout(root, tmp_path, damage):
  broken = tmp_path / 'checkpoint_0'
  shutil.copytree(at(root, 'old'), broken)
  msgpack = broken / 'checkpoint'
  if damage == 'truncated':
    msgpack.write_bytes(msgpack.read_bytes()[:1000])
    message = 'truncated or damaged .1000 bytes.'
  elif damage == 'no msgpack':
    msgpack.unlink()
    message = 'only partly copied'
  else:
    shutil.rmtree(broken / f'target.{KV.replace("/", ".")}')
    message = f'only partly written or copied: cannot open 1 of .* target/{KV}'
  path = re.escape(str(broken))
  assert_refused(tmp_path, path, message, INITIAL_CHECKPOINT_PATH=str(broken))


def test_partial_checkpoint_of_orbax(root, tmp_path):
  broken = tmp_path / 'checkpoint_0'
  shutil.copytree(at(root, 'mha'), broken)
  for folder in (broken / 'state').rglob('d'):
    shutil.rmtree(folder)
  path = re.escape(str(broken))
  message = 'only partly written or copied'
  assert_refused(tmp_path, path, message, INITIAL_CHECKPOINT_PATH=str(broken))


def test_damaged_tensor_of_orbax(root, tmp_path):
  """Found when it is read: the message is the engine's, but nothing is left."""
  broken = tmp_path / 'checkpoint_0'
  shutil.copytree(at(root, 'mha'), broken)
  data = max((broken / 'state').rglob('d/*'), key=lambda path: path.stat().st_size)
  data.write_bytes(data.read_bytes()[:1000])
  with pytest.raises(Exception, match=re.escape(str(broken))):
    train(tmp_path / 'run', INITIAL_CHECKPOINT_PATH=str(broken))
  gc.collect()
  assert left_behind(tmp_path / 'run') == []


def test_fewer_steps_than_the_checkpoint_has(root, tmp_path):
  ahead = tmp_path / 'checkpoint_7'
  shutil.copytree(at(root, 'old'), ahead)
  tree = serialization.msgpack_restore((ahead / 'checkpoint').read_bytes())
  tree['optimizer']['state']['step'] = np.int32(7)
  (ahead / 'checkpoint').write_bytes(serialization.msgpack_serialize(tree))
  message = r'=6 is below the .*\b7\b.*raise it'
  path = str(ahead)
  assert_refused(tmp_path, message, TRAIN_STEPS=6, INITIAL_CHECKPOINT_PATH=path)


def test_vocabulary_of_another_task(tmp_path):
  messages = ('(?i)vocabularies', 'task.tiny_words', 'input_vocabulary')
  macros = {'run_file': 'pretrain', 'tiny_task.vocabulary.extra_ids': 5}
  assert_refused(tmp_path, *messages, **macros)


def test_unknown_task(tmp_path):
  macros = {'run_file': 'pretrain', 'MIXTURE_OR_TASK_NAME': 'nothing'}
  assert_refused(tmp_path, 'nothing', **macros)


def test_evaluation_of_other_heads(root, tmp_path):
  out = str(tmp_path / 'out')
  macros = {'CHECKPOINT_PATH': at(root, 'mha'), 'EVAL_OUTPUT_DIR': out}
  with pytest.raises(ValueError, match=re.escape(at(root, 'mha'))):
    commands.engine_here(tmp_path, 't5x.eval', 'eval', NUM_KV_HEADS=2, **macros)
  assert not pathlib.Path(out).exists()


# --- Configurations -------------------------------------------------------------


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    (['tiny.gin', 'gin/runs/pretrain.gin', 'task.gin'], r'\bMODEL_DIR\b'),
    (['gin/runs/nothing.gin'], r'gin/runs/nothing\.gin'),
  ],
)
def test_configuration_that_is_not_whole(tmp_path, files, message):
  commands.write_gin(tmp_path)
  with pytest.raises(Exception, match=message):
    commands.files_here(tmp_path, 't5x.train', files, TRAIN_STEPS=2)
  assert {path.suffix for path in tmp_path.iterdir()} == {'.gin'}


@pytest.mark.slow
def test_command_fails(tmp_path):
  commands.write_gin(tmp_path)
  files = ['tiny.gin', 'gin/runs/uptrain.gin', 'task.gin']
  macros = {'MODEL_DIR': 'run', 'INITIAL_CHECKPOINT_PATH': 'lost/checkpoint_4'}
  args = commands.engine_args('t5x.train', files, TRAIN_STEPS=2, **macros)
  done = commands.run(tmp_path, *args)
  assert done.returncode != 0
  error = done.stdout[done.stdout.rindex('Traceback') :]
  assert re.search('there is no checkpoint at .*/lost/checkpoint_4', error), error
  assert {path.suffix for path in tmp_path.iterdir()} == {'.gin'}
