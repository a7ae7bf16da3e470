"""Bad input to a run: one clear message before the first step, nothing left behind.

What is wrong with a checkpoint has tests of its own (checkpoints/test_t5x_layouts.py),
and so has `python -m gqa_t5x.convert` (test_convert.py).
"""

import gc
import re
import shutil

import pytest

from gqa_t5x.training import restore, run_lock
from helpers import commands, trees

# What the reading threads of a damaged checkpoint raise besides.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)

KV = 'decoder/layers_0/encoder_decoder_attention/key/kernel'


@pytest.fixture(scope='module')
def root(pretrained, tmp_path_factory):
  """Has the runs `mha` and `gqa` (2 heads, in T5X's old layout), and parts of both."""
  root = tmp_path_factory.mktemp('bad_input')
  shutil.copytree(pretrained / 'mha', root / 'mha')
  flags = [f'--input={root}/mha/checkpoint_0', f'--output={root}/gqa']
  assert trees.run_convert(*flags, '--num_kv_heads=2') == 0
  shutil.copytree(root / 'gqa', root / 'no_msgpack')
  (root / 'no_msgpack' / 'checkpoint_0' / 'checkpoint').unlink()
  shutil.copytree(root / 'mha' / 'checkpoint_0', root / 'no_data' / 'checkpoint_0')
  for folder in (root / 'no_data' / 'checkpoint_0' / 'state').rglob('d'):
    shutil.rmtree(folder)
  return root


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


def shapes(name: str, found: int, wanted: int) -> str:
  return rf'{name}: \(128, {found}\) in the checkpoint, \(128, {wanted}\) in the model'


@pytest.mark.parametrize(
  ('name', 'macros', 'messages'),
  [
    (
      'mha/checkpoint_0',
      {'NUM_KV_HEADS': 2},
      [shapes(KV, 128, 32), 'set NUM_KV_HEADS .*or convert it: python -m gqa_t5x.conv'],
    ),
    ('gqa/checkpoint_0', {}, [shapes(KV, 32, 128)]),
    # T5X restores this one without a word.
    (
      'gqa/checkpoint_0',
      {'NUM_KV_HEADS': 2, 'network.config.num_decoder_layers': 1},
      [r'decoder/layers_1/.*\(128, 128\).*unknown in', 'of another model size'],
    ),
    ('mha', {}, ['is a folder of checkpoints; give one of them: .*/mha/checkpoint_6']),
    ('', {}, ['there is no T5X checkpoint in']),
    ('lost/checkpoint_4', {}, ['there is no checkpoint at']),
    ('no_msgpack/checkpoint_0', {}, ['only partly copied']),
    ('no_data/checkpoint_0', {}, ['only partly written or copied']),
  ],
)
def test_checkpoint_that_cannot_be_restored(root, tmp_path, name, macros, messages):
  path = str(root / name)
  macros = {'INITIAL_CHECKPOINT_PATH': path, **macros}
  assert_refused(tmp_path, re.escape(path), *messages, **macros)


def test_damaged_tensor_of_orbax(root, tmp_path):
  """Found when it is read: the message is the engine's, but nothing is left."""
  broken = tmp_path / 'checkpoint_0'
  shutil.copytree(root / 'mha' / 'checkpoint_0', broken)
  data = max((broken / 'state').rglob('d/*'), key=lambda path: path.stat().st_size)
  data.write_bytes(data.read_bytes()[:1000])
  with pytest.raises(Exception, match=re.escape(str(broken))):
    train(tmp_path / 'run', INITIAL_CHECKPOINT_PATH=str(broken))
  gc.collect()
  assert left_behind(tmp_path / 'run') == []


def test_resuming_with_other_heads(root, tmp_path):
  """The checkpoint in MODEL_DIR goes first, and is checked as well."""
  shutil.copytree(root / 'mha', tmp_path / 'run')
  path = str(root / 'gqa' / 'checkpoint_0')
  with pytest.raises(ValueError, match=re.escape(str(tmp_path / 'run/checkpoint_6'))):
    train(tmp_path / 'run', INITIAL_CHECKPOINT_PATH=path, NUM_KV_HEADS=2)
  assert commands.steps(tmp_path / 'run') == [0, 4, 6]


def test_empty_path(tmp_path):
  assert_refused(tmp_path, 'empty; give', INITIAL_CHECKPOINT_PATH='')


def test_fewer_steps_than_the_checkpoint_has(root, tmp_path):
  path = str(root / 'mha' / 'checkpoint_6')
  message = r'=5 is below the .*\b6\b.*raise it'
  assert_refused(tmp_path, message, TRAIN_STEPS=5, INITIAL_CHECKPOINT_PATH=path)


def test_vocabulary_of_another_task(tmp_path):
  messages = ('(?i)vocabularies', 'task.tiny_words', 'input_vocabulary')
  macros = {'run_file': 'pretrain', 'tiny_task.vocabulary.extra_ids': 5}
  assert_refused(tmp_path, *messages, **macros)


def test_evaluation_of_other_heads(root, tmp_path):
  path, out = str(root / 'mha' / 'checkpoint_0'), tmp_path / 'out'
  macros = {'CHECKPOINT_PATH': path, 'EVAL_OUTPUT_DIR': str(out)}
  with pytest.raises(ValueError, match=re.escape(path)):
    commands.engine_here(tmp_path, 't5x.eval', 'eval', NUM_KV_HEADS=2, **macros)
  assert not out.exists()


@pytest.mark.parametrize(
  ('path', 'num_steps', 'message'),
  [
    ('checkpoint_7', 0, 'FINETUNE_STEPS=0 must be at least 1.'),
    *(
      (
        path,
        100,
        f'INITIAL_CHECKPOINT_PATH={path!r} does not end with checkpoint_<step>, so its'
        ' step is unknown; give the last step of the run: --gin.TRAIN_STEPS=...',
      )
      for path in ('gs://bucket/xxl', 'checkpoint_5/state', 'checkpoint_', '', [], None)
    ),
  ],
)
def test_last_step_that_is_unknown(path, num_steps, message):
  """Of a known one, the last step is in gin_files/test_gin_papers.py."""
  with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
    restore.step_after(path, num_steps)
