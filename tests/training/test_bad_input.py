"""Bad input to a run: one clear message before the first step, nothing left behind.

What is wrong with a checkpoint has tests of its own (checkpoints/test_t5x_layouts.py),
and so has `python -m gqa_t5x.convert` (test_convert.py).
"""

import gc
import re
import shutil
import sys

import pytest

from gqa_t5x import best
from gqa_t5x.errors import BadInput
from gqa_t5x.reproduce import __main__ as reproduce
from gqa_t5x.training import gin_command, restore, run_lock
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
  """What a run wrote, apart from what describes its model, and this process's lock."""
  files = {path.name for path in folder.glob('*')}
  return sorted(files - {'model-info.txt', 'tokenizer_config.json', run_lock.NAME})


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
    (
      'gqa/checkpoint_0',
      {'NUM_KV_HEADS': 1, 'KV_HEAD_DIM': 32},
      [r'key_up/kernel: missing in the .*, \(32, 128\) in', 'KV_HEAD_DIM to None'],
    ),
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


# --- Before anything runs -------------------------------------------------------

PRETRAIN = ['tiny.gin', 'gin/runs/pretrain.gin', 'task.gin', 'train.gin']


def parse(folder, monkeypatch, *words, **macros) -> None:
  """Parses a training's gin files, with words of the command line."""
  commands.write_gin(folder)
  monkeypatch.setattr(sys, 'argv', ['train', *words])
  bindings = [re.sub(r'^--gin(\.|_bindings=)', '', word) for word in words]
  bindings = [word for word in bindings if not word.startswith('--')]
  macros = {'MODEL_DIR': 'run', **macros}
  bindings += [f'{name} = {value!r}' for name, value in macros.items()]
  with commands.gin_config(PRETRAIN, bindings, f'{commands.ROOT},{folder}'):
    pass


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['--gin.NUM_KV_HEAD=2'], 'NUM_KV_HEAD: .*; do you mean NUM_KV_HEADS?'),
    (['--gin_bindings=TRAIN_STEP = 2'], 'TRAIN_STEP: .* mean TRAIN_STEPS?'),
    (['--gin_bindings', 'BATCHSIZE=2'], 'BATCHSIZE: .* mean BATCH_SIZE?'),
    (['--gin.train/RANDOM_SEED=2'], 'train/RANDOM_SEED: .* mean RANDOM_SEED?'),
    (['--gin.XYZ=2'], 'no gin file of this run uses XYZ$'),
    # Of other runs.
    (['--gin.NUM_SEQUENCES=2'], 'no gin file of this run uses NUM_SEQUENCES'),
  ],
)
def test_a_macro_that_nothing_uses(words, message, tmp_path, monkeypatch):
  parse(tmp_path, monkeypatch, '--gin.NUM_KV_HEADS=2', "--gin.MODEL_DIR='x'")
  with pytest.raises(BadInput, match=message.replace('?', '[?]')):
    parse(tmp_path, monkeypatch, *words)


def check(name, value) -> None:
  gin_command.check_macros({(name, 'gin.macro'): {'value': value}})


# 0 has a meaning.
NO_COUNTS = {'RANDOM_SEED', 'TOP_K', 'LOSS_NORMALIZING_FACTOR'}


def test_every_count_is_checked(tmp_path, monkeypatch):
  """Whole numbers in gin files, and what may be one instead of None."""
  text = '\n'.join(commands.gin_files().values())
  counts = set(re.findall(r'^([A-Z_]+) = \d[\d_]*(?!\S)', text, flags=re.MULTILINE))
  counts |= {'NUM_KV_HEADS', 'NUM_MICROBATCHES', 'KEEP_CHECKPOINTS', 'KEEP_PERIOD'}
  assert len(counts - NO_COUNTS) == 18
  bad = {name: (0, -1) for name in counts - NO_COUNTS}
  bad |= {
    'TRAIN_STEPS': (4e0, '4', True),
    'KEEP_CHECKPOINTS': (0, False),
    'TASK_FEATURE_LENGTHS': ({'inputs': 0},),
  }
  for name, values in bad.items():
    for value in values:
      with pytest.raises(BadInput, match=rf'^{name}.*must be at least 1'):
        check(name, value)
  check('KEEP_CHECKPOINTS', None)
  with pytest.raises(BadInput, match=r'^LOSS_NORMALIZING_FACTOR=0 must be above 0'):
    check('LOSS_NORMALIZING_FACTOR', 0)
  with pytest.raises(BadInput, match=r'^BATCH_SIZE=8 is not divisible by .*=3; choose'):
    parse(tmp_path, monkeypatch, NUM_MICROBATCHES=3)
  # Bound without the macros.
  parts, rows = (
    'trainer.Trainer.num_microbatches',
    'train/utils.DatasetConfig.batch_size',
  )
  with pytest.raises(
    BadInput, match=rf'^BATCH_SIZE=8 is not .* by gqa_t5x.*{parts}=3;'
  ):
    parse(tmp_path, monkeypatch, **{parts: 3})
  with pytest.raises(BadInput, match=r'^train/t5x.utils.DatasetConfig.batch_size=4 is'):
    parse(tmp_path, monkeypatch, **{rows: 4, parts: 8})
  for name in (parts, rows, 'utils.SaveCheckpointConfig.keep'):
    with pytest.raises(BadInput, match=rf'{name[-5:]}=0 must be at least 1'):
      parse(tmp_path, monkeypatch, **{name: 0})
  parse(tmp_path, monkeypatch, **{rows: 6, parts: 3})


@pytest.mark.parametrize(
  ('module', 'run_file', 'macros'),
  [
    ('t5x.train', 'pretrain', {'MODEL_DIR': 'run [v2]', 'TRAIN_STEPS': 2}),
    ('t5x.train', 'uptrain', {'INITIAL_CHECKPOINT_PATH': 'a*/checkpoint_0'}),
    ('t5x.eval', 'eval', {'CHECKPOINT_PATH': 'gs://bucket/what?/checkpoint_0'}),
    ('t5x.eval', 'eval', {'EVAL_OUTPUT_DIR': 'b]'}),
    ('t5x.infer', 'infer', {'INFER_OUTPUT_DIR': 'b['}),
    ('t5x.train', 'pretrain', {'MODEL_DIR': 'below', 'TRAIN_STEPS': 2}),
  ],
)
def test_a_folder_that_orbax_takes_for_a_pattern(
  module, run_file, macros, root, tmp_path
):
  folder = tmp_path / 'a [b]' if 'below' in macros.values() else tmp_path
  folder.mkdir(exist_ok=True)
  given = {
    't5x.train': {'MODEL_DIR': 'run', 'TRAIN_STEPS': 2},
    't5x.eval': {'EVAL_OUTPUT_DIR': 'run'},
    't5x.infer': {'INFER_OUTPUT_DIR': 'run'},
  }[module]
  if module != 't5x.train':
    given['CHECKPOINT_PATH'] = str(root / 'mha' / 'checkpoint_0')
  with pytest.raises(ValueError, match=r'in its name, which .* takes for a pattern'):
    commands.engine_here(folder, module, run_file, **given | macros)
  assert {path.suffix for path in folder.iterdir()} == {'.gin'}


def test_commands_that_write_below_a_pattern(root, tmp_path, capsys):
  source = f'--input={root}/mha/checkpoint_0'
  assert trees.run_convert(source, f'--output={tmp_path}/[x]', '--num_kv_heads=2') == 1
  assert best.main(['best', f'--model_dir={tmp_path}/*']) == 1
  argv = ['reproduce', f'--output_dir={tmp_path}/?']
  assert reproduce.define_command().run(argv, reproduce.act) == 1
  assert capsys.readouterr().err.count('in its name, which') == 3
  assert list(tmp_path.iterdir()) == []
