"""gin/tasks/text_files.gin and pairs.gin, and the commands that docs/data.md shows."""

import json
import pathlib
import re
import shlex

import pytest
import seqio
from etils import epath
from t5x import utils

import gin
from gqa_t5x.checkpoints import folders
from gqa_t5x.data.own import own_tasks
from gqa_t5x.training import best_checkpoint
from helpers import commands, gin_cases

TEXT, PAIRS = (f'gin/tasks/{name}.gin' for name in ('text_files', 'pairs'))
LENGTHS = {'inputs': 64, 'targets': 32}
GIVEN = {
  TEXT: {'TEXT_FILES': 'texts/*.txt'},
  PAIRS: {'TRAIN_FILES': 'train.jsonl', 'TASK_FEATURE_LENGTHS': LENGTHS},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """Has the files that docs/data.md names."""
  monkeypatch.setenv('GQA_T5X_CACHE', str(tmp_path / 'cache'))
  monkeypatch.chdir(tmp_path)
  pair = {'inputs': 'a', 'targets': 'b', 'question': 'a', 'answer': 'b', 'text': 'c'}
  names = ['texts/a.txt', 'train.jsonl', 'dev.jsonl', 'test.jsonl']
  names += [f'c4/en/c4-{s}-of-00001.json' for s in ('train.00000', 'validation.00000')]
  for name in names:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (pair | {'text': f'c {i}', 'inputs': f'a {i}'} for i in range(900))
    text = ''.join(json.dumps(row) + '\n\n' * ('txt' in name) for row in rows)
    path.write_text(text if 'txt' in name else text.replace('}{', '}\n{'))
  return tmp_path


@pytest.mark.parametrize('task', GIVEN)
@pytest.mark.parametrize('run', ['uptrain', 'finetune', 'eval', 'infer', 'calibrate'])
def test_a_run_has_the_models_vocabulary(task, run):
  """The name is the same wherever gin asks for it."""
  name, _, required = gin_cases.RUNS[run]
  files = gin_cases.files('t5_1_1_tiny', task, run)
  with gin_cases.parsed(files, required | GIVEN[task]) as arguments_of:
    arguments = arguments_of(name)
    keys = [k for k in arguments if k.endswith('dataset_cfg') and arguments[k]]
    for data in (arguments[k] for k in keys):
      assert data.mixture_or_task_name.startswith(pathlib.Path(task).stem)
      assert data.split in seqio.get_mixture_or_task(data.mixture_or_task_name).splits
      utils.verify_matching_vocabs(data, arguments['model'])
    assert len({arguments[k].mixture_or_task_name for k in keys}) == 1


@pytest.mark.parametrize(
  ('task', 'missing'), [(task, name) for task in GIVEN for name in GIVEN[task]]
)
def test_what_is_required_is_named(task, missing):
  given = {k: v for k, v in GIVEN[task].items() if k != missing}
  files = gin_cases.files('t5_1_1_tiny', task, 'finetune')
  with pytest.raises(ValueError, match=rf'^{missing}/macro.value set to .*REQUIRED'):
    with gin_cases.parsed(files, gin_cases.TRAIN | gin_cases.START | given):
      pass


def test_the_choices_in_the_files():
  text = commands.gin_files()
  for file, line, known in (
    (TEXT, 'OBJECTIVE', own_tasks.OBJECTIVES),
    (PAIRS, 'METRIC', own_tasks.METRICS),
  ):
    (shown,) = re.findall(rf'^{line} = (.*)$', text[file], flags=re.MULTILINE)
    assert set(known) <= set(re.findall(r'\w+', shown))


def shown() -> list[list[str]]:
  """The words of each command of docs/data.md with a task on own files."""
  text = (commands.ROOT / 'docs' / 'data.md').read_text().replace('\\\n', ' ')
  lines = re.findall(r'^    (python -m t5x\..*)$', text, flags=re.MULTILINE)
  found = [shlex.split(line)[2:] for line in lines]
  return [words for words in found if {f'--gin_file={t}' for t in GIVEN} & set(words)]


def test_the_documentation_shows_both():
  assert len(shown()) >= 5
  assert {t for t in GIVEN for words in shown() if f'--gin_file={t}' in words} == {
    *GIVEN
  }


@pytest.mark.parametrize('words', shown(), ids=lambda words: words[0])
def test_commands_of_the_documentation(words, monkeypatch):
  engine, *flags = words
  files = [f.removeprefix('--gin_file=') for f in flags if f.startswith('--gin_file=')]
  bindings = [f.removeprefix('--gin.').split('=', 1) for f in flags if '--gin.' in f]
  assert len(files) + len(bindings) == len(flags)
  # Scores and checkpoints of a fine-tuning.
  monkeypatch.setattr(best_checkpoint, 'scores', lambda *run: {7: 0.5})
  path = epath.Path('gs://bucket/checkpoint_7')
  monkeypatch.setattr(folders, 'list_checkpoints', lambda folder: [path])
  given = {name: gin.config.parse_value(value) for name, value in bindings}
  with gin_cases.parsed(files, given) as arguments_of:
    arguments = arguments_of(commands.FUNCTIONS[engine])
    data = arguments.get('dataset_cfg') or arguments['train_dataset_cfg']
    task = seqio.get_mixture_or_task(data.mixture_or_task_name)
    assert {'train', 'validation'} <= set(task.splits)
    utils.verify_matching_vocabs(data, arguments['model'])
