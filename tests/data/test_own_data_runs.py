"""Own texts and pairs by command: train, stop, fine-tune, evaluate, infer."""

import json
import re
import shutil
import signal
import time

import pytest
from etils import epath

from gqa_t5x.checkpoints import folders
from gqa_t5x.errors import BadInput
from helpers import commands, tiny_task, trees

pytestmark = pytest.mark.slow

VOCABULARY = {'tiny_task.vocabulary.extra_ids': 100}
PRETRAIN = [
  'tiny.gin',
  'gin/tasks/text_files.gin',
  'gin/runs/pretrain.gin',
  'train.gin',
]
TEXT = VOCABULARY | {
  'TEXT_FILES': 'texts/*.txt',
  'VALIDATION_SHARE': 0.1,
  'TASK_FEATURE_LENGTHS': {'inputs': 24, 'targets': 12},
  'BATCH_SIZE': 8,
}
STEPS = {'CHECKPOINT_PERIOD': 2, 'EVAL_PERIOD': 2, 'STATS_PERIOD': 1}
PAIRS = VOCABULARY | {
  'TRAIN_FILES': 'train.jsonl',
  'TEST_FILES': 'test.tsv',
  'INPUT_PREFIX': 'last: ',
  'VALIDATION_SHARE': 0.2,
  'TASK_FEATURE_LENGTHS': {'inputs': 24, 'targets': 8},
  'BATCH_SIZE': 8,
}
WORDS = tiny_task.WORDS


def pair(i: int) -> dict[str, str]:
  words = [WORDS[i % 8], WORDS[i // 8 % 8], WORDS[i * 3 % 8]]
  return {'inputs': ' '.join(words), 'targets': words[-1]}


def write_data(folder) -> None:
  commands.write_gin(folder)
  (folder / 'texts').mkdir()
  for name in 'ab':
    text = '\n\n'.join(f'{name} {i}\n{pair(i)["inputs"]}' for i in range(60))
    (folder / 'texts' / f'{name}.txt').write_text(text)
  lines = [json.dumps(pair(i)) + '\n' for i in range(64)]
  (folder / 'train.jsonl').write_text(''.join(lines))
  lines = [f'{pair(i)["inputs"]}\t{pair(i)["targets"]}\n' for i in range(64, 75)]
  (folder / 'test.tsv').write_text(''.join(['inputs\ttargets\n', *lines]))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    root = tmp_path_factory.mktemp('own_data')
    patch.setenv('GQA_T5X_CACHE', str(root / 'cache'))
    write_data(root)
    yield root


def losses(model_dir) -> dict[tuple[str, int], float]:
  found = {}
  for part in ('train', 'training_eval/*'):
    for folder in model_dir.glob(part):
      scalars = commands.scalars(folder)
      found |= {(folder.name, *key): scalars[key] for key in scalars if 'loss' in key}
  return found


@pytest.fixture(scope='module')
def pretrained(root):
  """A command that is killed after its first checkpoints, and the last of these."""
  args = commands.engine_args(
    't5x.train', PRETRAIN, MODEL_DIR='run', TRAIN_STEPS=10_000, **TEXT, **STEPS
  )
  run = commands.Started(root, *args)
  while not (root / 'run' / 'checkpoint_2').exists():
    assert run.process.poll() is None, run.said()[-3000:]
    time.sleep(0.05)
  run.end(signal.SIGKILL)
  paths = folders.list_checkpoints(epath.Path(root / 'run'))
  return root, max(map(folders.checkpoint_step, paths))


def test_killed_and_started_again(pretrained, tmp_path):
  """As one that nobody stopped, on a copy of the files at another place."""
  folder, last = pretrained
  write_data(tmp_path)
  for place in (folder, tmp_path):
    macros = {'MODEL_DIR': 'run', 'TRAIN_STEPS': last + 2} | TEXT | STEPS
    commands.files_here(place, 't5x.train', PRETRAIN, **macros)
  found, expected = losses(folder / 'run'), losses(tmp_path / 'run')
  found = {key: loss for key, loss in found.items() if key[-1] <= last + 2}
  assert found == {key: expected[key] for key in found}
  assert len({step for *_, step in found}) > 2
  checkpoints = [p / 'run' / f'checkpoint_{last + 2}' for p in (folder, tmp_path)]
  arrays = [trees.read(path) for path in checkpoints]
  # T5X's step may have another width after a restart.
  assert arrays[0].pop('state/step') == arrays[1].pop('state/step') == last + 2
  trees.assert_same(*arrays)


def test_other_files_are_not_gone_on_with(pretrained):
  folder, last = pretrained
  shutil.copytree(folder / 'run', folder / 'other')
  (folder / 'more.txt').write_text('More.\n')
  macros = {'MODEL_DIR': 'other', 'TRAIN_STEPS': last + 4} | TEXT
  macros['TEXT_FILES'] = ['texts/*.txt', 'more.txt']
  message = r'MIXTURE_OR_TASK_NAME was text_files_\w+, is text_files_'
  with pytest.raises(BadInput, match=message):
    commands.files_here(folder, 't5x.train', PRETRAIN, **macros)


def rows(path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_fine_tuning_evaluation_and_inference(pretrained):
  folder, last = pretrained
  files = ['tiny.gin', 'gin/tasks/pairs.gin', 'gin/runs/finetune.gin', 'train.gin']
  start = {'INITIAL_CHECKPOINT_PATH': f'run/checkpoint_{last}', 'FINETUNE_STEPS': 2}
  macros = PAIRS | {'METRIC': 'exact_match', 'MODEL_DIR': 'tuned'}
  commands.files_here(folder, 't5x.train', files, **macros, **start)
  (file,) = (folder / 'tuned' / 'inference_eval').glob('pairs_*-metrics.jsonl')
  (validation,) = rows(file)
  assert validation['step'] == last + 2

  files[2:] = ['gin/runs/eval.gin', 'gin/runs/best_checkpoint.gin']
  for split in ('validation', 'test'):
    given = macros | {'EVAL_OUTPUT_DIR': split, 'SPLIT': split}
    commands.files_here(folder, 't5x.eval', files, **given)
    out = folder / split / 'inference_eval'
    (scores,) = rows(out / file.name)
    name = file.name.removesuffix('-metrics.jsonl')
    predictions = rows(out / f'{name}-{last + 2:06d}.jsonl')
    hits = [row['prediction'].split() == [row['target']] for row in predictions]
    assert scores['exact_match'] == pytest.approx(100 * sum(hits) / len(hits))
    assert len(hits) == 11 if split == 'test' else scores == validation

  files[2:] = ['gin/runs/infer.gin']
  given = {'CHECKPOINT_PATH': f'tuned/checkpoint_{last + 2}', 'SPLIT': 'test'}
  given |= {'INFER_OUTPUT_DIR': 'inferred'} | PAIRS
  args = commands.engine_args('t5x.infer', files, **given)
  done = commands.run(folder, *args)
  assert done.returncode == 0, done.stdout[-3000:]
  (path,) = (folder / 'inferred').glob('pairs_*-predict.jsonl*-00000-of-00001')
  inputs = [row['inputs']['inputs_pretokenized'] for row in rows(path)]
  assert inputs == ['last: ' + pair(i)['inputs'] for i in range(64, 75)]


@pytest.mark.parametrize(
  ('task', 'changes', 'message'),
  [
    # Some of 120 texts are more tokens than a batch, and one is fewer.
    (
      TEXT,
      {'BATCH_SIZE': 200},
      r'^text_files_\w+: the split train .*BATCH_SIZE=200, so',
    ),
    (PAIRS, {'BATCH_SIZE': 64}, r'^pairs_\w+: the split train .*BATCH_SIZE=64, so'),
    (TEXT, {'TEXT_KEY': 3, 'TEXT_FILES': 'no'}, r'^TEXT_FILES=/\S+/no: there is no'),
    (PAIRS, {'TARGET_KEY': 'answer'}, r'train.jsonl has unreadable lines: 1 .no text'),
    (PAIRS, {'METRIC': 'best'}, r"^METRIC='best'; choose one of rouge1"),
  ],
)
def test_bad_input_leaves_nothing(root, task, changes, message, tmp_path):
  files = [*PRETRAIN]
  files[1] = f'gin/tasks/{"text_files" if task is TEXT else "pairs"}.gin'
  macros = {'MODEL_DIR': str(tmp_path / 'new'), 'TRAIN_STEPS': 2} | task | changes
  with pytest.raises(ValueError) as caught:
    commands.files_here(root, 't5x.train', files, **macros)
  assert re.search(message, str(caught.value)), str(caught.value)
  assert not list((tmp_path / 'new').glob('checkpoint_*'))
