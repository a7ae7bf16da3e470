"""Pre-train, resume, convert, uptrain, fine-tune, evaluate, infer: as users do it.

All in one temporary folder, on a tiny model (commands.py) and task (tiny_task.py). Of
each command one run is a process of its own, as users type it; more runs of it are
calls in this process.
"""

import json
import math
import shutil

import numpy as np
import pytest

from helpers import commands, trees

pytestmark = pytest.mark.slow

TASK = 'tiny_words'
D, H = 128, 16
KV = 'target/decoder/layers_1/encoder_decoder_attention/key/kernel'


def eval_losses(model_dir) -> dict[int, float]:
  """The validation loss of each step that was evaluated."""
  found = commands.scalars(model_dir / 'training_eval' / TASK)
  return {step: value for (tag, step), value in found.items() if tag == 'loss'}


def metrics(folder) -> list[dict]:
  """What seqio's evaluator has written, a row for each evaluation."""
  lines = (folder / 'inference_eval' / f'{TASK}-metrics.jsonl').read_text()
  return [json.loads(line) for line in lines.splitlines()]


def file_times(folder) -> dict[str, int]:
  return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob('*'))}


def convert_flags(folder, num_kv_heads: int) -> list[str]:
  """Flags that convert the last checkpoint of the run `mha`."""
  output = folder / 'converted' / str(num_kv_heads)
  return [
    f'--input={folder}/mha',
    f'--output={output}',
    f'--num_kv_heads={num_kv_heads}',
  ]


@pytest.fixture(scope='module')
def mha(pretrained, tmp_path_factory):
  """The command of the pre-training with more steps, in a process of its own."""
  folder = tmp_path_factory.mktemp('end_to_end')
  shutil.copytree(pretrained / 'mha', folder / 'mha')
  before = file_times(folder / 'mha' / 'checkpoint_6')
  macros = commands.PRETRAINING | {'TRAIN_STEPS': 8}
  return folder, before, commands.engine(folder, 't5x.train', 'pretrain', **macros)


@pytest.fixture(scope='module')
def gqa(mha):
  """Converted to 2 heads and uptrained for 2 steps."""
  folder, _, _ = mha
  done = commands.run(folder, '-m', 'gqa_t5x.convert', *convert_flags(folder, 2))
  assert done.returncode == 0, done.stdout[-3000:]
  commands.engine_here(
    folder,
    't5x.train',
    'uptrain',
    MODEL_DIR='gqa2',
    INITIAL_CHECKPOINT_PATH='converted/2/checkpoint_8',
    NUM_KV_HEADS=2,
    TRAIN_STEPS=10,
  )
  return folder, done.stdout


def test_resumes_where_it_stopped(mha):
  folder, before, output = mha
  assert commands.steps(folder / 'mha') == [0, 4, 6, 8]
  assert file_times(folder / 'mha' / 'checkpoint_6') == before
  train = commands.scalars(folder / 'mha' / 'train')
  assert {step for tag, step in train if tag == 'loss'} == {2, 4, 6, 8}
  assert {step for tag, step in train if tag == 'learning_rate'} == {2, 4, 6, 8}
  spikes = {step: n for (tag, step), n in train.items() if tag == 'stability/spikes'}
  assert spikes == {2: 0, 4: 0, 6: 0, 8: 0}
  assert list(eval_losses(folder / 'mha')) == [2, 4, 6, 8]
  # The progress bar starts at the checkpoint, not at 0, and reaches the end.
  assert '8/8' in output
  assert ' 0/8' not in output
  config = (folder / 'mha' / 'config.gin').read_text()
  assert "MIXTURE_OR_TASK_NAME = 'tiny_words'" in config
  info = (folder / 'mha' / 'model-info.txt').read_text()
  assert 'Total number of parameters' in info


def test_uptrains_what_was_converted(gqa):
  folder, output = gqa
  path = folder / 'converted' / '2' / 'checkpoint_8'
  assert f"INITIAL_CHECKPOINT_PATH = '{path}'" in output
  losses = eval_losses(folder / 'gqa2')
  assert list(losses) == [8, 10]  # right after conversion, and after uptraining
  assert all(map(math.isfinite, losses.values()))
  assert losses[8] != pytest.approx(eval_losses(folder / 'mha')[8], rel=1e-6)
  assert commands.steps(folder / 'gqa2') == [8, 10]
  tensors = trees.read(folder / 'gqa2' / 'checkpoint_10')
  assert tensors[KV].shape == (D, 2 * H)
  assert tensors[KV.replace('encoder_decoder', 'self')].shape == (D, 2 * H)
  assert tensors[KV.replace('/key/', '/query/')].shape == (D, 8 * H)
  assert tensors['target/encoder/layers_0/attention/key/kernel'].shape == (D, 8 * H)
  train = commands.scalars(folder / 'gqa2' / 'train')
  assert {step for tag, step in train if tag == 'loss'} == {10}


def test_uptrains_the_latent_form(mha):
  """Three steps from a converted state, of one head that is as wide as four."""
  folder, _, _ = mha
  flags = (f'--input={folder}/mha', f'--output={folder}/converted/latent')
  form = ('--num_kv_heads=1', '--kv_head_dim=64', '--method=svd')
  assert trees.run_convert(*flags, *form) == 0
  commands.engine_here(
    folder,
    't5x.train',
    'uptrain',
    MODEL_DIR='latent',
    INITIAL_CHECKPOINT_PATH='converted/latent/checkpoint_8',
    NUM_KV_HEADS=1,
    KV_HEAD_DIM=64,
    TRAIN_STEPS=11,
  )
  losses = eval_losses(folder / 'latent')
  assert all(map(math.isfinite, losses.values()))
  before, after = (
    trees.read(folder / name)
    for name in ('converted/latent/checkpoint_8', 'latent/checkpoint_11')
  )
  up = KV.replace('/key/', '/key_up/')
  assert after[up].shape == (64, 8 * H)
  assert np.abs(after[up] - before[up]).max() > 0
  moments = f'state/param_states/{up.removeprefix("target/")}'
  assert after[f'{moments}/v'].shape == (64, 8 * H)
  assert after[f'{moments}/v'].any()


@pytest.mark.parametrize('more', [[], ['gin/decoding/int8.gin']])
def test_infers_one_line_for_each_example(gqa, more):
  folder, _ = gqa
  output = f'inferred{len(more)}'
  commands.engine(
    folder,
    't5x.infer',
    'infer',
    ['gin/decoding/beam_search.gin', *more],
    CHECKPOINT_PATH='gqa2/checkpoint_10',
    INFER_OUTPUT_DIR=output,
    NUM_KV_HEADS=2,
  )
  (path,) = (folder / output).glob(f'{TASK}-predict.jsonl*-00000-of-00001')
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(lines) == 8
  for line in lines:
    assert isinstance(line['prediction'], str)
    words = line['inputs']['inputs_pretokenized'].split()
    assert line['inputs']['targets_pretokenized'] == words[-1]


def test_fine_tunes_and_evaluates_the_mqa_model(mha):
  """With dropout, at a constant rate, decoding the validation set."""
  folder, _, _ = mha
  assert trees.run_convert(*convert_flags(folder, 1)) == 0
  commands.engine_here(
    folder,
    't5x.train',
    'finetune',
    MODEL_DIR='finetuned',
    INITIAL_CHECKPOINT_PATH='converted/1/checkpoint_8',
    NUM_KV_HEADS=1,
    FINETUNE_STEPS=1,
  )
  assert trees.read(folder / 'finetuned' / 'checkpoint_9')[KV].shape == (D, H)
  train = commands.scalars(folder / 'finetuned' / 'train')
  assert train['learning_rate', 9] == pytest.approx(0.001)
  assert math.isfinite(train['loss', 9])
  (row,) = metrics(folder / 'finetuned')
  assert (row['step'], row['examples']) == (9, 8)
  assert 0 <= row['exact_match'] <= 1
  commands.engine(
    folder,
    't5x.eval',
    'eval',
    ['gin/runs/best_checkpoint.gin'],
    MODEL_DIR='finetuned',
    METRIC='exact_match',
    EVAL_OUTPUT_DIR='eval_best',
    NUM_KV_HEADS=1,
  )
  assert metrics(folder / 'eval_best') == [row]
