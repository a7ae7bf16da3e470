"""What a run does before its checkpoints are opened: folder, damage, data."""

import os
import pathlib
import shutil

import clu.data
import numpy as np
import pytest
import tensorflow as tf
from etils import epath

from gqa_t5x.errors import BadInput
from gqa_t5x.training import resume
from helpers import commands, trees

# --- The folder --------------------------------------------------------------


def test_a_run_makes_its_folder(tmp_path):
  resume.claim(epath.Path(tmp_path / 'a' / 'b'))
  assert (tmp_path / 'a' / 'b').is_dir()


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'MODEL_DIR=.*run cannot be written .Not a'):
    resume.claim(epath.Path(tmp_path / 'file' / 'run'))


# --- Damaged checkpoints --------------------------------------------------------


@pytest.fixture
def run(pretrained, tmp_path):
  """The folder of a run that kept steps 0, 4 and 6."""
  shutil.copytree(pretrained / 'mha', tmp_path / 'run')
  return epath.Path(tmp_path / 'run')


def largest(folder) -> str:
  files = [p for p in pathlib.Path(folder).rglob('*') if p.is_file()]
  return str(max(files, key=lambda p: p.stat().st_size))


def truncate(path):
  os.truncate(path, os.path.getsize(path) // 2)


def overwrite_with_nan(folder):
  """The same checkpoint, but for one value of one tensor."""
  arrays = trees.read(folder)
  name = 'target/decoder/logits_dense/kernel'
  arrays[name] = arrays[name].copy()
  arrays[name][3, 5] = np.nan
  shutil.rmtree(folder / 'state')
  trees.write_orbax(pathlib.Path(folder), trees.nest(arrays))


DAMAGE = {
  'not finite': overwrite_with_nan,
  'values cut': lambda c: truncate(largest(c / 'state')),
  'no state': lambda c: shutil.rmtree(c / 'state'),
  'position cut': lambda c: truncate(largest(c / 'dataset')),
}


def test_a_good_checkpoint_is_left_alone(run):
  """And the run has kept its last two, and those of every fourth step."""
  assert resume.latest_readable(run) == run / 'checkpoint_6'
  assert commands.steps(run) == [0, 4, 6]
  assert resume.latest_readable(run / 'nowhere') is None


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_checkpoint_is_set_aside(run, kind, caplog):
  DAMAGE[kind](run / 'checkpoint_6')
  assert resume.latest_readable(run) == run / 'checkpoint_4'
  assert commands.steps(run) == [0, 4]
  assert (run / 'damaged_checkpoint_6').is_dir()
  # Nor do they hide where one was set aside before.
  shutil.copytree(run / 'damaged_checkpoint_6', run / 'checkpoint_6')
  assert resume.latest_readable(run) == run / 'checkpoint_4'
  assert (run / 'damaged_checkpoint_6_').is_dir()


def test_nothing_is_renamed_where_all_are_damaged(run):
  for step in (0, 4, 6):
    truncate(largest(run / f'checkpoint_{step}' / 'state'))
  message = r'No checkpoint in .*checkpoint_6: .*checkpoint_4: .*checkpoint_0: .*remove'
  with pytest.raises(ValueError, match=message):
    resume.latest_readable(run)
  assert commands.steps(run) == [0, 4, 6]


@pytest.mark.slow
def test_training_goes_on_from_the_one_before(pretrained, run, tmp_path, caplog):
  truncate(largest(run / 'checkpoint_6' / 'state'))
  macros = commands.PRETRAINING | {'MODEL_DIR': str(run)}
  commands.engine_here(tmp_path, 't5x.train', 'pretrain', **macros)
  assert 'checkpoint_6 cannot be read: it is now damaged_checkpoint_6' in caplog.text
  assert 'training goes on from checkpoint_4' in caplog.text
  assert commands.steps(run) == [0, 4, 6]
  # The data, too, goes on where it was: the same steps give the same state.
  before, after = (
    trees.read(folder / 'checkpoint_6') for folder in (pretrained / 'mha', run)
  )
  # T5X's step may have another width after a restart.
  assert after.pop('state/step') == before.pop('state/step') == 6
  trees.assert_same(after, before)


@pytest.mark.slow
def test_what_is_not_finite_is_not_saved(run, tmp_path):
  """A run that diverges; and one that begins from what another has left."""
  rate = {'utils.create_learning_rate_scheduler.base_learning_rate': 1e38}
  macros = commands.PRETRAINING | {'MODEL_DIR': str(run), 'TRAIN_STEPS': 12}
  with pytest.raises(BadInput, match=r'^At step 8, .* target/.* has diverged'):
    commands.engine_here(tmp_path, 't5x.train', 'pretrain', **macros, **rate)
  assert commands.steps(run) == [0, 4, 6]
  overwrite_with_nan(run / 'checkpoint_6')
  macros = {'MODEL_DIR': 'new', 'INITIAL_CHECKPOINT_PATH': str(run / 'checkpoint_6')}
  message = r'checkpoint_6 has .* not finite, in target/decoder/logits_dense/kernel: it'
  with pytest.raises(BadInput, match=message):
    commands.engine_here(tmp_path, 't5x.train', 'uptrain', TRAIN_STEPS=8, **macros)
  assert commands.steps(tmp_path / 'new') == []


@pytest.mark.slow
def test_other_data_than_the_position_is_of(run, tmp_path):
  lengths = {'inputs': 20, 'targets': 8}
  macros = commands.PRETRAINING | {'MODEL_DIR': str(run), 'TRAIN_STEPS': 8}
  for change, message in (
    ({'TASK_FEATURE_LENGTHS': lengths}, r"TASK_\w+ was .*'inputs': 24.*, is .* 20"),
    ({'BATCH_SIZE': 4}, r'BATCH_SIZE was 8, is 4\. .* Or --gin\.SAVE_DATASET=False: '),
  ):
    with pytest.raises(BadInput, match=message):
      commands.engine_here(tmp_path, 't5x.train', 'pretrain', **macros | change)
  assert commands.steps(run) == [0, 4, 6]
  macros |= {'BATCH_SIZE': 4, 'SAVE_DATASET': False}
  commands.engine_here(tmp_path, 't5x.train', 'pretrain', **macros)
  assert commands.steps(run)[-1] == 8


# --- The position in the data ---------------------------------------------------


def batches(folder):
  dataset = tf.data.Dataset.range(1000).shuffle(50, seed=3).batch(2)
  dataset = dataset.map(lambda x: {'x': x})
  return resume.Batches(dataset, epath.Path(folder))


def draw(iterator, n):
  return [next(iterator)['x'].tolist() for _ in range(n)]


def position(folder, step):
  path = epath.Path(folder / f'checkpoint_{step}' / 'dataset')
  path.mkdir(parents=True, exist_ok=True)
  return path / 'train_ds-000-of-001'


def test_the_first_save_is_of_the_beginning(tmp_path):
  """An engine draws a batch ahead before it saves, and trains on it after."""
  first = clu.data.PeekableDatasetIterator(batches(tmp_path))
  first.peek_async().result()
  first.save(position(tmp_path, 0))
  all_drawn = draw(first, 3)
  first.save(position(tmp_path, 3))
  all_drawn += draw(first, 4)
  for step in (0, 3):
    again = batches(tmp_path)
    again.restore(position(tmp_path, step))
    next_drawn = draw(again, 1)
    # A resumed run saves where it is.
    again.save(position(tmp_path, step + 1))
    third = batches(tmp_path)
    third.restore(position(tmp_path, step + 1))
    assert next_drawn + draw(third, 6 - step) == all_drawn[step:]


def test_the_position_of_another_run_is_not_taken(tmp_path):
  other = batches(tmp_path / 'other')
  draw(other, 3)
  other.save(position(tmp_path / 'other', 3))
  own = batches(tmp_path / 'own')
  own.restore(position(tmp_path / 'other', 3))
  own.restore(tmp_path / 'nowhere' / 'train_ds-000-of-001')
  assert draw(own, 2) == draw(batches(tmp_path), 2)


def test_an_own_checkpoint_without_a_position(tmp_path):
  with pytest.raises(ValueError, match=r'train_ds.* is missing: .*SAVE_DATASET=False'):
    batches(tmp_path).restore(tmp_path / 'checkpoint_3' / 'train_ds-000-of-001')
