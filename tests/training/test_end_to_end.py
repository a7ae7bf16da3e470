"""Pre-train, resume, convert, uptrain, fine-tune, evaluate, infer: as users type it.

Each stage is a command in a process of its own, in one temporary folder, on a tiny
model (commands.py) and task (tiny_task.py).
"""

import json
import math

import pytest

from gqa_t5x import best
from helpers import commands

pytestmark = pytest.mark.slow

TASK = 'tiny_words'
D, H = 128, 16
KV = 'target/decoder/layers_1/encoder_decoder_attention/key/kernel'
QUERY = KV.replace('/key/', '/query/')


def eval_losses(model_dir) -> dict[int, float]:
  """The validation loss of each step that was evaluated."""
  found = commands.scalars(model_dir / 'training_eval' / TASK)
  return {step: value for (tag, step), value in found.items() if tag == 'loss'}


def file_times(folder) -> dict[str, int]:
  return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob('*'))}


def convert(folder, num_kv_heads: int) -> str:
  """Converts the MHA run's last checkpoint; returns what the command printed."""
  output = f'converted/{num_kv_heads}'
  flags = ['--input=mha', f'--output={output}', f'--num_kv_heads={num_kv_heads}']
  done = commands.run(folder, '-m', 'gqa_t5x.convert', *flags)
  assert done.returncode == 0, done.stdout[-3000:]
  assert commands.steps(folder / output) == [4]
  return done.stdout


def uptrain(folder, num_kv_heads: int, steps: int, **macros) -> None:
  commands.engine(
    folder,
    't5x.train',
    'uptrain',
    MODEL_DIR=f'gqa{num_kv_heads}',
    INITIAL_CHECKPOINT_PATH=f'converted/{num_kv_heads}/checkpoint_4',
    NUM_KV_HEADS=num_kv_heads,
    TRAIN_STEPS=steps,
    **macros,
  )


@pytest.fixture(scope='module')
def first(tmp_path_factory):
  """A run of multi-head attention that stopped after 2 steps."""
  folder = tmp_path_factory.mktemp('end_to_end')
  commands.engine(folder, 't5x.train', 'pretrain', MODEL_DIR='mha', TRAIN_STEPS=2)
  return folder, file_times(folder / 'mha' / 'checkpoint_2')


@pytest.fixture(scope='module')
def mha(first):
  """The same command with more steps resumes."""
  folder, _ = first
  macros = {'MODEL_DIR': 'mha', 'TRAIN_STEPS': 4}
  return folder, commands.engine(folder, 't5x.train', 'pretrain', **macros)


@pytest.fixture(scope='module')
def gqa(mha):
  """Converted to 2 heads and uptrained for 2 steps."""
  folder, _ = mha
  output = convert(folder, 2)
  uptrain(folder, 2, steps=6)
  return folder, output


def test_resumes_where_it_stopped(first, mha):
  _, before = first
  folder, output = mha
  assert commands.steps(folder / 'mha') == [0, 2, 4]
  assert file_times(folder / 'mha' / 'checkpoint_2') == before
  train = commands.scalars(folder / 'mha' / 'train')
  assert {step for tag, step in train if tag == 'loss'} == {2, 4}
  assert {step for tag, step in train if tag == 'learning_rate'} == {2, 4}
  spikes = {step: n for (tag, step), n in train.items() if tag == 'stability/spikes'}
  assert spikes == {2: 0, 4: 0}
  assert list(eval_losses(folder / 'mha')) == [2, 4]
  # The progress bar starts at the checkpoint, not at 0, and reaches the end.
  assert '4/4' in output
  assert ' 0/4' not in output
  config = (folder / 'mha' / 'config.gin').read_text()
  assert "MIXTURE_OR_TASK_NAME = 'tiny_words'" in config
  assert 'Total number of parameters' in (
    (folder / 'mha' / 'model-info.txt').read_text()
  )


def test_uptrains_what_was_converted(gqa):
  folder, output = gqa
  path = folder / 'converted' / '2' / 'checkpoint_4'
  assert f"INITIAL_CHECKPOINT_PATH = '{path}'" in output
  losses = eval_losses(folder / 'gqa2')
  assert list(losses) == [4, 6]  # right after conversion, and after uptraining
  assert all(map(math.isfinite, losses.values()))
  assert losses[4] != pytest.approx(eval_losses(folder / 'mha')[4], rel=1e-6)
  assert commands.steps(folder / 'gqa2') == [4, 6]
  shapes = commands.shapes(folder / 'gqa2' / 'checkpoint_6')
  assert shapes[KV] == (D, 2 * H)
  assert shapes[KV.replace('encoder_decoder', 'self')] == (D, 2 * H)
  assert shapes[QUERY] == (D, 8 * H)
  assert shapes['target/encoder/layers_0/attention/key/kernel'] == (D, 8 * H)
  train = commands.scalars(folder / 'gqa2' / 'train')
  assert {step for tag, step in train if tag == 'loss'} == {6}


def test_all_heads_kept_means_the_same_loss(mha):
  """Uptraining at K = N starts from the loss at which pre-training ended."""
  folder, _ = mha
  convert(folder, 8)
  uptrain(folder, 8, steps=4)
  losses = eval_losses(folder / 'gqa8')
  assert list(losses) == [4]
  assert losses[4] == pytest.approx(eval_losses(folder / 'mha')[4], rel=1e-4)


def test_evaluates_with_the_metrics_of_a_task(gqa):
  folder, _ = gqa
  commands.engine(
    folder,
    't5x.eval',
    'eval',
    CHECKPOINT_PATH='gqa2/checkpoint_6',
    EVAL_OUTPUT_DIR='eval',
    NUM_KV_HEADS=2,
  )
  lines = (folder / 'eval' / 'inference_eval' / f'{TASK}-metrics.jsonl').read_text()
  (metrics,) = map(json.loads, lines.splitlines())
  assert metrics['step'] == 6
  assert metrics['examples'] == 8
  assert 0 <= metrics['exact_match'] <= 1


@pytest.mark.parametrize('decoding', [None, 'beam_search', 'sample'])
def test_infers_one_line_for_each_example(decoding, gqa):
  folder, _ = gqa
  output = f'infer_{decoding}'
  commands.engine(
    folder,
    't5x.infer',
    'infer',
    [f'gin/decoding/{decoding}.gin'] if decoding else [],
    CHECKPOINT_PATH='gqa2/checkpoint_6',
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


def test_fine_tunes_the_mqa_model(mha):
  """With dropout, at a constant rate, decoding the validation set."""
  folder, _ = mha
  convert(folder, 1)
  commands.engine(
    folder,
    't5x.train',
    'finetune',
    MODEL_DIR='finetuned',
    INITIAL_CHECKPOINT_PATH='converted/1/checkpoint_4',
    NUM_KV_HEADS=1,
    FINETUNE_STEPS=1,
  )
  assert commands.shapes(folder / 'finetuned' / 'checkpoint_5')[KV] == (D, H)
  train = commands.scalars(folder / 'finetuned' / 'train')
  assert train['learning_rate', 5] == pytest.approx(0.001)
  assert math.isfinite(train['loss', 5])
  lines = (
    folder / 'finetuned' / 'inference_eval' / f'{TASK}-metrics.jsonl'
  ).read_text()
  rows = [json.loads(line) for line in lines.splitlines()]
  assert [row['step'] for row in rows] == [5]
  finetuned = str(folder / 'finetuned')
  assert best.scores(finetuned, 'exact_match', TASK) == {5: rows[0]['exact_match']}
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
  lines = (
    folder / 'eval_best' / 'inference_eval' / f'{TASK}-metrics.jsonl'
  ).read_text()
  assert json.loads(lines) == rows[0]
