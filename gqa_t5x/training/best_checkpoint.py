"""The checkpoint with the best dev score of a fine-tuning run; see gqa_t5x/best.py."""

import json
import math
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from gqa_t5x.checkpoints import folders
from gqa_t5x.errors import BadInput

_SUFFIX = '-metrics.jsonl'


def scores(
  model_dir: str, metric: str | None = None, task: str | None = None
) -> dict[int, float]:
  """Returns step -> score, as a run's evaluations left them.

  Of a step that was evaluated twice, as after a restart, the later score counts. Lines
  that are damaged are skipped, with a warning.

  Args:
    model_dir: of the run, or of an evaluation (EVAL_OUTPUT_DIR), local or gs://.
    metric: e.g. 'rouge1'; None if there is only one.
    task: name of the seqio task; None if there is only one.

  Raises:
    BadInput: there are no scores, or not of that metric or task.
  """
  file, lines = _read(model_dir, task)
  for number, row in enumerate(lines, 1):
    if row is None:
      logging.warning('%s, line %d is damaged, and skipped.', file, number)
  rows = [row for row in lines if row and row.keys() - {'step'}]
  names = sorted({name for row in rows for name in row} - {'step'})
  if not rows:
    raise BadInput(f'{file} has no scores; evaluate again.')
  if metric is None and len(names) == 1:
    metric = names[0]
  if metric not in names:
    asked = 'a metric is needed' if metric is None else f'there is no {metric}'
    raise BadInput(f'{file}: {asked}; choose one of {", ".join(names)}.')
  return {row['step']: row[metric] for row in rows if metric in row}


def damaged_lines(model_dir: str, task: str | None = None) -> list[int]:
  """Returns the numbers of the lines that `scores` skips; see there."""
  _, lines = _read(model_dir, task)
  return [number for number, row in enumerate(lines, 1) if row is None]


def select(scores: Mapping[int, float]) -> int:
  """Returns the step of the highest score, the earliest of equal ones; never of NaN.

  Raises:
    BadInput: no score is a number.
  """
  real = {step: score for step, score in scores.items() if not math.isnan(score)}
  if not real:
    raise BadInput('no score is a number.')
  return min(real, key=lambda step: (-real[step], step))


def checkpoint(
  model_dir: str, metric: str | None = None, task: str | None = None
) -> str:
  """Returns the path of the checkpoint with the best score; see `scores`.

  Raises:
    BadInput: there are no scores, or that checkpoint was removed.
  """
  found = scores(model_dir, metric, task)
  try:
    step = select(found)
  except BadInput as error:
    raise BadInput(f'{model_dir}: {error}') from error
  saved = {
    folders.checkpoint_step(path): path
    for path in folders.list_checkpoints(epath.Path(model_dir))
  }
  if step in saved:
    return str(saved[step])
  kept = {s: score for s, score in found.items() if s in saved}
  rest = 'none that was evaluated is there'
  if any(not math.isnan(score) for score in kept.values()):
    second = select(kept)
    rest = f'the best that is there is {saved[second]} ({kept[second]:.4g})'
  raise BadInput(
    f'{model_dir}: the checkpoint of the best step, {step} ({found[step]:.4g}), was'
    f' removed; {rest}. Give it as CHECKPOINT_PATH, or train with KEEP_CHECKPOINTS ='
    ' None.'
  )


def _read(
  model_dir: str, task: str | None
) -> tuple[epath.Path, list[dict[str, Any] | None]]:
  """The file of a task, or the only one, and its rows; None for a damaged line."""
  folder = epath.Path(model_dir) / 'inference_eval'
  files = {path.name.removesuffix(_SUFFIX): path for path in folder.glob(f'*{_SUFFIX}')}
  if not files:
    raise BadInput(
      f'{folder} has no scores: the run has not decoded its validation split yet, or'
      ' this is not its MODEL_DIR.'
    )
  if task is None and len(files) == 1:
    (task,) = files
  if task not in files:
    asked = 'a task is needed' if task is None else f'there is no {task}'
    raise BadInput(f'{folder}: {asked}; choose one of {", ".join(sorted(files))}.')
  return files[task], [_row(line) for line in files[task].read_bytes().splitlines()]


def _row(line: bytes) -> dict[str, Any] | None:
  """Step and numbers of a line; None if it is damaged."""
  try:
    row = json.loads(line)
    row['step'] = int(row['step'])
    return {
      name: value if name == 'step' else float(value)
      for name, value in row.items()
      if isinstance(value, int | float) and not isinstance(value, bool)
    }
  except (ValueError, TypeError, KeyError, OverflowError):  # 1e400 is no step.
    return None
