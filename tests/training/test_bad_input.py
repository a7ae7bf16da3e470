"""Bad input to a run: one clear message before the first step, nothing left behind.

`python -m gqa_t5x.convert` has its own (test_conversion_cli.py).
"""

import gc
import pathlib
import re
import shutil
import time

import numpy as np
import pytest
from flax import serialization
from t5x import eval as eval_lib
from t5x import train as train_lib

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
def root(tmp_path_factory):
  """Has checkpoints of step 0: MHA, GQA (2 heads), MHA in T5X's old layout."""
  folder = tmp_path_factory.mktemp('bad_input')
  commands.write_gin(folder)
  for name, num_kv_heads in (('mha', None), ('gqa', 2)):
    train(folder, f'made/{name}', 'pretrain', NUM_KV_HEADS=num_kv_heads, TRAIN_STEPS=0)
    wait_for(folder / 'made' / name / 'checkpoint_0')
  made = folder / 'made'
  flags = [f'--input={made / "mha"}', f'--output={made / "old"}', '--num_kv_heads=8']
  assert convert.main(['convert', *flags]) == 0
  return folder


def parse(folder, run_file: str, **macros):
  """The tiny model and task with a file of gin/runs."""
  files = [folder / 'tiny.gin', f'gin/runs/{run_file}.gin', folder / 'task.gin']
  if run_file not in ('eval', 'infer'):
    files.append(folder / 'train.gin')
  bindings = [f'{name} = {value!r}' for name, value in macros.items()]
  return commands.gin_config(map(str, files), bindings)


def train(folder, model_dir: str, run_file: str = 'uptrain', **macros) -> None:
  """What `python -m t5x.train` does, in this process."""
  macros = {'MODEL_DIR': str(folder / model_dir), **macros}
  with parse(folder, run_file, **macros) as arguments_of:
    train_lib.train(**arguments_of('train'))


def wait_for(checkpoint: pathlib.Path, seconds: float = 60) -> None:
  """Waits for a checkpoint: without a step to train, T5X returns while it saves."""
  end = time.monotonic() + seconds
  while not checkpoint.exists():
    assert time.monotonic() < end, f'{checkpoint} is not there after {seconds} s'
    time.sleep(0.1)


def left_behind(folder) -> list[str]:
  """What a run wrote, apart from its model's description and this process's lock."""
  files = {path.name for path in folder.glob('*')}
  return sorted(files - {'model-info.txt', run_lock.NAME})


def assert_refused(root, tmp_path, *messages: str, **macros) -> None:
  """Fails unless training stops with all messages in its error, and leaves nothing."""
  macros = {'TRAIN_STEPS': 2, **macros}
  with pytest.raises(ValueError) as caught:
    train(root, str(tmp_path / 'run'), **macros)
  for message in messages:
    assert re.search(message, str(caught.value)), str(caught.value)
  assert left_behind(tmp_path / 'run') == []


def at(root, name: str) -> str:
  return str(root / 'made' / name / 'checkpoint_0')


def test_heads_that_do_not_divide(root, tmp_path):
  message = (
    r'num_heads=8 is not divisible by num_kv_heads=5; choose one of 1, 2, 4, 8\.'
  )
  assert_refused(root, tmp_path, message, run_file='pretrain', NUM_KV_HEADS=5)


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
  assert_refused(root, tmp_path, re.escape(path), shapes, mend, **macros)


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
  assert_refused(root, tmp_path, re.escape(at(root, name)), message, mend, **macros)


def test_resuming_with_other_heads(root, tmp_path):
  """The checkpoint in MODEL_DIR goes first, and is checked as well."""
  shutil.copytree(root / 'made' / 'mha', tmp_path / 'run')
  with pytest.raises(ValueError, match=re.escape(str(tmp_path / 'run/checkpoint_0'))):
    train(
      root,
      str(tmp_path / 'run'),
      INITIAL_CHECKPOINT_PATH=at(root, 'gqa'),
      NUM_KV_HEADS=2,
      TRAIN_STEPS=2,
    )
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
  assert_refused(root, tmp_path, message, INITIAL_CHECKPOINT_PATH=path)


def test_empty_path(root, tmp_path):
  assert_refused(root, tmp_path, 'empty; give', INITIAL_CHECKPOINT_PATH='')


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
  assert_refused(root, tmp_path, path, message, INITIAL_CHECKPOINT_PATH=str(broken))


def test_partial_checkpoint_of_orbax(root, tmp_path):
  broken = tmp_path / 'checkpoint_0'
  shutil.copytree(at(root, 'mha'), broken)
  for folder in (broken / 'state').rglob('d'):
    shutil.rmtree(folder)
  path = re.escape(str(broken))
  message = 'only partly written or copied'
  assert_refused(root, tmp_path, path, message, INITIAL_CHECKPOINT_PATH=str(broken))


def test_damaged_tensor_of_orbax(root, tmp_path):
  """Found when it is read: the message is the engine's, but nothing is left."""
  broken = tmp_path / 'checkpoint_0'
  shutil.copytree(at(root, 'mha'), broken)
  data = max((broken / 'state').rglob('d/*'), key=lambda path: path.stat().st_size)
  data.write_bytes(data.read_bytes()[:1000])
  with pytest.raises(Exception, match=re.escape(str(broken))):
    train(
      root, str(tmp_path / 'run'), INITIAL_CHECKPOINT_PATH=str(broken), TRAIN_STEPS=2
    )
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
  assert_refused(root, tmp_path, message, TRAIN_STEPS=6, INITIAL_CHECKPOINT_PATH=path)


def test_vocabulary_of_another_task(root, tmp_path):
  messages = ('(?i)vocabularies', 'task.tiny_words', 'input_vocabulary')
  macros = {'run_file': 'pretrain', 'tiny_task.vocabulary.extra_ids': 5}
  assert_refused(root, tmp_path, *messages, **macros)


def test_unknown_task(root, tmp_path):
  macros = {'run_file': 'pretrain', 'MIXTURE_OR_TASK_NAME': 'nothing'}
  assert_refused(root, tmp_path, 'nothing', **macros)


def test_evaluation_of_other_heads(root, tmp_path):
  out = str(tmp_path / 'out')
  macros = {'CHECKPOINT_PATH': at(root, 'mha'), 'EVAL_OUTPUT_DIR': out}
  with pytest.raises(ValueError, match=re.escape(at(root, 'mha'))):
    with parse(root, 'eval', NUM_KV_HEADS=2, **macros) as arguments_of:
      eval_lib.evaluate(**arguments_of('evaluate'))
  assert not pathlib.Path(out).exists()


# --- On the command line ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
  ('files', 'macros', 'message'),
  [
    (['tiny.gin', 'gin/runs/pretrain.gin', 'task.gin'], {}, r'\bMODEL_DIR\b'),
    (['gin/runs/nothing.gin'], {}, r'gin/runs/nothing\.gin'),
    (
      ['tiny.gin', 'gin/runs/uptrain.gin', 'task.gin'],
      {'MODEL_DIR': 'run', 'INITIAL_CHECKPOINT_PATH': 'lost/checkpoint_4'},
      r'there is no checkpoint at .*/lost/checkpoint_4',
    ),
  ],
)
def test_command_fails(root, tmp_path, files, macros, message):
  commands.write_gin(tmp_path)
  macros = {'TRAIN_STEPS': 2, **macros}
  done = commands.run(tmp_path, *commands.engine_args('t5x.train', files, **macros))
  assert done.returncode != 0
  error = done.stdout[done.stdout.rindex('Traceback') :]
  assert re.search(message, error), error[-2000:]
  assert {path.suffix for path in tmp_path.iterdir()} == {'.gin'}
