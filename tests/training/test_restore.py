"""The last step of a run, by the name of its checkpoint."""

import re

import pytest

from gqa_t5x.training import restore


@pytest.mark.parametrize(
  ('path', 'expected'),
  [
    ('gs://bucket/xxl/checkpoint_1050000', 1_050_100),
    ('gs://bucket/xxl/checkpoint_1050000/', 1_050_100),
    ('runs/local/checkpoint_0', 100),
    ('checkpoint_7', 107),
    ('/no/such/folder/checkpoint_7/', 107),
  ],
)
def test_step_after(path, expected):
  assert restore.step_after(path, 100) == expected


@pytest.mark.parametrize(
  'path',
  ['gs://bucket/xxl', 'runs/checkpoint_1050000/state', 'checkpoint_', '', [], None],
)
def test_a_path_without_a_step(path):
  message = (
    f'INITIAL_CHECKPOINT_PATH={path!r} does not end with checkpoint_<step>, so its step'
    ' is unknown; give the last step of the run: --gin.TRAIN_STEPS=...'
  )
  with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
    restore.step_after(path, 100)


@pytest.mark.parametrize('num_steps', [0, -5])
def test_nothing_to_train(num_steps):
  message = rf'^FINETUNE_STEPS={num_steps} must be at least 1\.$'
  with pytest.raises(ValueError, match=message):
    restore.step_after('checkpoint_7', num_steps)
