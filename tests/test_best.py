"""The best checkpoint by dev score: from the lines that seqio's JSONLogger writes."""

import json
import math
import re

import pytest
import seqio
from absl import logging

from gqa_t5x import best
from gqa_t5x.training import best_checkpoint

NAN = math.nan


@pytest.fixture
def run(tmp_path):
  """Makes a run's folder: scores of a task in lines, and checkpoints of some steps."""

  def make(lines, steps=(), task='news'):
    folder = tmp_path / 'run'
    (folder / 'inference_eval').mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file = folder / 'inference_eval' / f'{task}-metrics.jsonl'
    file.write_text('\n'.join([*texts, '']))
    for step in steps:
      (folder / f'checkpoint_{step}').mkdir(exist_ok=True)
    return str(folder)

  return make


def rows(*pairs, metric='bleu'):
  return [{'step': step, metric: score} for step, score in pairs]


@pytest.mark.parametrize(
  ('scores', 'step'),
  [
    ({10: 1.0, 20: 3.0, 30: 2.0}, 20),
    ({30: 3.0, 20: 3.0, 10: 1.0}, 20),  # the earliest of equal ones
    ({10: NAN, 20: -5.0, 30: NAN}, 20),
    ({10: -math.inf, 20: NAN}, 10),
    ({0: 0.0}, 0),
  ],
)
def test_the_highest_score_wins(scores, step):
  assert best_checkpoint.select(scores) == step


@pytest.mark.parametrize('scores', [{}, {10: NAN}])
def test_no_score_wins(scores):
  with pytest.raises(ValueError, match=r'^no score is a number\.$'):
    best_checkpoint.select(scores)


def test_what_seqio_writes(tmp_path):
  logger = seqio.JSONLogger(str(tmp_path / 'inference_eval'), write_n_results=0)
  (tmp_path / 'inference_eval').mkdir()
  for step, score in ((1_001_000, 27.5), (1_002_000, 28.25), (1_003_000, NAN)):
    metrics = {
      'bleu': seqio.metrics.Scalar(score),
      'bleu_signature': seqio.metrics.Text('nrefs:1|case:mixed'),
    }
    logger('news', step, metrics, None, None, None)
  (tmp_path / 'checkpoint_1002000').mkdir()
  scores = best_checkpoint.scores(str(tmp_path))
  assert list(scores) == [1_001_000, 1_002_000, 1_003_000]
  assert list(scores.values()) == pytest.approx([27.5, 28.25, NAN], nan_ok=True)
  assert best_checkpoint.checkpoint(str(tmp_path)) == f'{tmp_path}/checkpoint_1002000'


def test_after_a_restart_the_later_line_counts(run):
  folder = run(rows((10, 1.0), (20, 9.0), (10, 2.0), (20, 3.0), (30, 2.5)), [20])
  assert best_checkpoint.scores(folder) == {10: 2.0, 20: 3.0, 30: 2.5}
  assert best_checkpoint.checkpoint(folder) == f'{folder}/checkpoint_20'


def test_a_metric_or_a_task_of_several(run):
  lines = [{'step': 10, 'rouge1': 3.0, 'rouge2': 1}, {'step': 20, 'rouge1': 2.0}]
  folder = run(lines)
  assert best_checkpoint.scores(folder, 'rouge1') == {10: 3.0, 20: 2.0}
  assert best_checkpoint.scores(folder, 'rouge2') == {10: 1}
  run(rows((10, 7.0)), task='wmt')
  assert best_checkpoint.scores(folder, None, 'wmt') == {10: 7.0}
  assert best_checkpoint.scores(folder, 'rouge1', 'news') == {10: 3.0, 20: 2.0}
  with pytest.raises(ValueError, match='a task is needed; choose one of news, wmt'):
    best_checkpoint.scores(folder)


@pytest.mark.parametrize(
  'damaged',
  [
    '{"step": 20, "bl',
    '',
    '[20, 9.0]',
    '"step"',
    '{"bleu": 9.0}',
    '{"step": null, "bleu": 9.0}',
    '\x00\x00',
    '{"step": 1e400, "bleu": 9.0}',
    '{"step": NaN, "bleu": 9.0}',
    '{"step": 20, "bleu": 1%s}' % (400 * '0'),
  ],
)
def test_damaged_lines_are_named_and_skipped(run, damaged, monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'warning', lambda text, *args: said.append(text % args))
  folder = run([*rows((10, 1.0)), damaged, *rows((30, 2.0))])
  assert best_checkpoint.scores(folder) == {10: 1.0, 30: 2.0}
  file = f'{folder}/inference_eval/news-metrics.jsonl'
  assert said == [f'{file}, line 2 is damaged, and skipped.']


@pytest.mark.parametrize(
  ('lines', 'metric', 'task', 'message'),
  [
    (rows((10, 1.0)), 'f1', None, 'there is no f1; choose one of bleu.'),
    (
      [{'step': 10, 'f1': 1.0, 'em': 1.0, 'signature': 'text', 'flag': True}],
      None,
      None,
      'a metric is needed; choose one of em, f1.',
    ),
    (rows((10, 1.0)), None, 'wmt', 'there is no wmt; choose one of news.'),
    ([], None, None, 'has no scores; evaluate again.'),
    (['{'], None, None, 'has no scores; evaluate again.'),
  ],
)
def test_what_is_not_there_is_named(run, lines, metric, task, message):
  folder = run(lines)
  with pytest.raises(ValueError, match=re.escape(message)):
    best_checkpoint.scores(folder, metric, task)


@pytest.mark.parametrize(
  ('steps', 'rest'),
  [
    ((10, 30, 40), r'the best that is there is \S+/checkpoint_30 \(2.5\)'),
    ((40,), 'none that was evaluated is there'),
    ((50,), 'none that was evaluated is there'),
  ],
)
def test_a_removed_checkpoint_is_not_replaced(run, steps, rest):
  folder = run(rows((10, 1.0), (20, 3.0), (30, 2.5), (50, NAN)), steps)
  with pytest.raises(
    ValueError, match=rf'step, 20 \(3\), was removed; {rest}'
  ) as error:
    best_checkpoint.checkpoint(folder)
  assert 'KEEP_CHECKPOINTS = None' in str(error.value)


def test_the_command(run, tmp_path, monkeypatch, capsys):
  run(
    [{'step': 10, 'f1': 60.5, 'em': 50.0}, {'step': 20, 'f1': 60.0, 'em': 52.0}], [20]
  )
  monkeypatch.chdir(tmp_path)
  assert best.main(['best', '--model_dir=run', '--metric=em', '--task=news']) == 0
  said = capsys.readouterr().out
  assert said == f'step 20  score 52.0000  {tmp_path}/run/checkpoint_20\n'


@pytest.mark.parametrize(
  ('flags', 'code', 'text'),
  [
    (['--help'], 0, '--metric: Such as rouge1, bleu, f1'),
    ([], 1, 'error: --model_dir is missing; see --help.'),
    (['--model_dir=x', 'y'], 1, "error: unexpected argument 'y'; see --help"),
    (['--model=x', '--size=1'], 1, 'error: Unknown command line flag'),
    (['--model_dir=nowhere'], 1, 'nowhere/inference_eval has no scores: '),
  ],
)
def test_flags(flags, code, text, capsys):
  assert best.main(['best', *flags]) == code
  said = capsys.readouterr()
  assert text in said.out + said.err
