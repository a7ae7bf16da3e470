"""The Python API and T5X's commands on one model: each takes what the other wrote."""

import json

import numpy as np
import pytest

import gqa_t5x
from helpers import commands
from helpers import tokenizers_made as made

pytestmark = pytest.mark.slow

FROM_CHECKPOINT = 'gin/models/from_checkpoint.gin'
SMALL = {'LOSS_NORMALIZING_FACTOR': 100, 'RANDOM_SEED': 0, 'EVAL_STEPS': 1}
SMALL |= {'ACTIVATION_DTYPE': 'float32', 'STATS_PERIOD': 1, 'BATCH_SIZE': 4}
TEXTS = [f'{text} {i}' for i, text in enumerate(made.TEXTS)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A model of 4 heads made from one of 8, uptrained on texts for two steps."""
  folder = tmp_path_factory.mktemp('engine')
  made.write_flan(folder / 'flan', num_heads=8)
  (folder / 'texts.txt').write_text('\n\n'.join(TEXTS))
  (folder / 'lines.txt').write_text('\n'.join(TEXTS[:5]))
  gqa_t5x.load(folder / 'flan').convert(4, texts=TEXTS).save(folder / 'gqa4')
  commands.files_here(
    folder,
    't5x.train',
    [FROM_CHECKPOINT, 'gin/tasks/text_files.gin', 'gin/runs/uptrain.gin'],
    MODEL_CHECKPOINT='gqa4/checkpoint_0',
    INITIAL_CHECKPOINT_PATH='gqa4/checkpoint_0',
    MODEL_DIR='run',
    TEXT_FILES='texts.txt',
    VALIDATION_SHARE=0.3,
    CACHE_DIR='cache',
    TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8},
    TRAIN_STEPS=2,
    CHECKPOINT_PERIOD=2,
    EVAL_PERIOD=2,
    **SMALL,
  )
  return folder


def test_training_goes_on_from_what_was_saved(folder):
  before, after = gqa_t5x.load(folder / 'gqa4'), gqa_t5x.load(folder / 'run')
  assert after.config == before.config
  assert (after.config.self_kv, after.config.cross_kv) == (4, 4)
  old, new = (m.params['decoder']['decoder_norm']['scale'] for m in (before, after))
  assert 0 < np.abs(new - old).max() < 0.5
  assert after.tokenizer.encode(TEXTS[0]) == before.tokenizer.encode(TEXTS[0])


def test_inference_by_command_is_generate(folder):
  commands.files_here(
    folder,
    't5x.infer',
    [FROM_CHECKPOINT, 'gin/infer_text.gin'],
    MODEL_CHECKPOINT='run/checkpoint_2',
    CHECKPOINT_PATH='run/checkpoint_2',
    INPUT_FILE='lines.txt',
    INFER_OUTPUT_DIR='predictions',
    TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8},
    ACTIVATION_DTYPE='float32',
    BATCH_SIZE=4,
    **{'utils.RestoreCheckpointConfig.dtype': 'float32'},  # T5X's way is 16 bits.
  )
  (file,) = (folder / 'predictions').glob('*predict_with_aux.jsonl-00000-of-00001')
  found = [json.loads(line) for line in file.read_text().splitlines()]
  model = gqa_t5x.load(folder / 'run')
  texts, scores = model.generate(TEXTS[:5], max_length=8, return_scores=True)
  assert [row['prediction'] for row in found] == texts
  np.testing.assert_allclose([row['score'] for row in found], scores, rtol=1e-3)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'NUM_KV_HEADS': 2}, 'NUM_KV_HEADS=2, and .* has 4 key/value heads in self-'),
    ({'KV_HEAD_DIM': 99}, 'KV_HEAD_DIM=99, and .* has key/value heads of size '),
    ({'MODEL_CHECKPOINT': 'texts.txt'}, 'texts.txt'),
  ],
)
def test_bad_input(given, message, folder):
  macros = {'MODEL_CHECKPOINT': 'gqa4/checkpoint_0', 'INPUT_FILE': 'lines.txt'}
  macros |= {'CHECKPOINT_PATH': 'gqa4/checkpoint_0', 'INFER_OUTPUT_DIR': 'other'}
  files = [FROM_CHECKPOINT, 'gin/infer_text.gin']
  with pytest.raises(Exception, match=message):
    commands.files_here(folder, 't5x.infer', files, **macros | given)
