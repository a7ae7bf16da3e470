"""Finds the checkpoint with the best dev score of a fine-tuning run.

  python -m gqa_t5x.best --model_dir=runs/finetuned --metric=rouge1

prints step, score and path. The scores are those that decoding the validation split
gave while training (gin/runs/finetune.gin), in MODEL_DIR/inference_eval; the highest
wins, the earliest of equal ones. To evaluate that checkpoint, or to decode with it, add
gin/runs/best_checkpoint.gin to the other gin files. If its checkpoint was removed, that
is an error: train with KEEP_CHECKPOINTS = None.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags, logging
from etils import epath

from gqa_t5x import paths
from gqa_t5x.conversion import checkpoint as checkpoints

_FOLDER, _SUFFIX = 'inference_eval', '-metrics.jsonl'


def scores(
  model_dir: str, metric: str | None = None, task: str | None = None
) -> dict[int, float]:
  """Reads the scores that a run's evaluations left.

  Args:
    model_dir: of the run, or of an evaluation (EVAL_OUTPUT_DIR), local or gs://.
    metric: e.g. 'rouge1'; None if there is only one.
    task: name of the seqio task; None if there is only one.

  Returns:
    Step -> score. Of a step that was evaluated twice, as after a restart, the later
    score counts.

  Raises:
    ValueError: there are no scores, or not of that metric or task.
  """
  file = _metrics_file(epath.Path(model_dir) / _FOLDER, task)
  rows = [row for row in _rows(file) if row.keys() - {'step'}]
  names = sorted({name for row in rows for name in row} - {'step'})
  if not rows:
    raise ValueError(f'{file} has no scores; evaluate again.')
  if metric is None and len(names) == 1:
    metric = names[0]
  if metric not in names:
    asked = 'a metric is needed' if metric is None else f'there is no {metric}'
    raise ValueError(f'{file}: {asked}; choose one of {", ".join(names)}.')
  return {row['step']: row[metric] for row in rows if metric in row}


def damaged_lines(model_dir: str, task: str | None = None) -> list[int]:
  """Returns the numbers of the lines of scores that cannot be read, which are skipped.

  Args:
    model_dir: as in `scores`.
    task: as in `scores`.

  Raises:
    ValueError: there are no scores, or not of that task.
  """
  file = _metrics_file(epath.Path(model_dir) / _FOLDER, task)
  lines = file.read_bytes().splitlines()
  return [number for number, line in enumerate(lines, 1) if _row(line) is None]


def select(scores: Mapping[int, float]) -> int:
  """Returns the step of the highest score, the earliest of equal ones; never of NaN.

  Args:
    scores: step -> score.

  Raises:
    ValueError: no score is a number.
  """
  real = {step: score for step, score in scores.items() if not math.isnan(score)}
  if not real:
    raise ValueError('no score is a number.')
  return min(real, key=lambda step: (-real[step], step))


def checkpoint(
  model_dir: str, metric: str | None = None, task: str | None = None
) -> str:
  """Returns the path of the checkpoint with the best score; no other will do.

  Args:
    model_dir: of the run.
    metric: as in `scores`.
    task: as in `scores`.

  Raises:
    ValueError: there are no scores, or that checkpoint was removed.
  """
  found = scores(model_dir, metric, task)
  try:
    step = select(found)
  except ValueError as error:
    raise ValueError(f'{model_dir}: {error}') from error
  saved = {
    checkpoints.checkpoint_step(path): path
    for path in checkpoints.list_checkpoints(epath.Path(model_dir))
  }
  if step in saved:
    return str(saved[step])
  kept = {s: score for s, score in found.items() if s in saved}
  rest = 'none that was evaluated is there'
  if any(not math.isnan(score) for score in kept.values()):
    second = select(kept)
    rest = f'the best that is there is {saved[second]} ({kept[second]:.4g})'
  raise ValueError(
    f'{model_dir}: the checkpoint of the best step, {step} ({found[step]:.4g}), was'
    f' removed; {rest}. Give it as CHECKPOINT_PATH, or train with KEEP_CHECKPOINTS ='
    ' None.'
  )


def _metrics_file(folder: epath.Path, task: str | None) -> epath.Path:
  """The file of a task, or the only one."""
  files = {path.name.removesuffix(_SUFFIX): path for path in folder.glob(f'*{_SUFFIX}')}
  if not files:
    raise ValueError(
      f'{folder} has no scores: the run has not decoded its validation split yet, or'
      ' this is not its MODEL_DIR.'
    )
  if task is None and len(files) == 1:
    return next(iter(files.values()))
  if task not in files:
    asked = 'a task is needed' if task is None else f'there is no {task}'
    raise ValueError(f'{folder}: {asked}; choose one of {", ".join(sorted(files))}.')
  return files[task]


def _rows(file: epath.Path) -> Iterator[dict[str, Any]]:
  """Steps and numbers of each line; skips, with a warning, what is damaged."""
  for number, line in enumerate(file.read_bytes().splitlines(), 1):
    row = _row(line)
    if row is None:
      logging.warning('%s, line %d is damaged, and skipped.', file, number)
    else:
      yield row


def _row(line: bytes) -> dict[str, Any] | None:
  """Step and numbers of a line; None if it is damaged."""
  try:
    row = json.loads(line)
    row['step'] = int(row['step'])
  except (ValueError, TypeError, KeyError):
    return None
  return {
    name: value
    for name, value in row.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
  }


def define_flags() -> flags.FlagValues:
  """The command's flags, apart from absl's global ones."""
  values = flags.FlagValues()
  define = {'flag_values': values, 'module_name': 'gqa_t5x.best'}
  flags.DEFINE_string('model_dir', None, 'MODEL_DIR of the run.', **define)
  flags.DEFINE_string(
    'metric',
    None,
    'Such as rouge1, bleu, f1; not needed if there is only one.',
    **define,
  )
  flags.DEFINE_string(
    'task', None, 'The seqio task; not needed if there is only one.', **define
  )
  flags.DEFINE_bool('help', False, 'Show this text.', short_name='h', **define)
  return values


def main(argv: Sequence[str]) -> int:
  """The command.

  Args:
    argv: program name and flags.

  Returns:
    Exit code: 0, or 1 for bad input.
  """
  args = define_flags()
  try:
    rest = args(list(argv))[1:]
    if args.help:
      print(f'{__doc__}\nFlags:{args.module_help("gqa_t5x.best")}')
      return 0
    if rest:
      raise ValueError(f'unexpected argument {rest[0]!r}; see --help.')
    if not args.model_dir:
      raise ValueError('--model_dir is missing; see --help.')
    model_dir = paths.absolute(args.model_dir)
    found = scores(model_dir, args.metric, args.task)
    path = checkpoint(model_dir, args.metric, args.task)
    step = checkpoints.checkpoint_step(epath.Path(path))
    print(f'step {step}  score {found[step]:.4f}  {path}')
    return 0
  except (ValueError, OSError, flags.Error) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 1


if __name__ == '__main__':
  sys.exit(main(sys.argv))
