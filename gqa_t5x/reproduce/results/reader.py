"""Reads what runs left, and names what cannot be used instead of using it."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from gqa_t5x.errors import BadInput
from gqa_t5x.reproduce.experiments import gin_files
from gqa_t5x.reproduce.experiments.models import Model
from gqa_t5x.reproduce.experiments.planner import Planner, step_of
from gqa_t5x.reproduce.results import events
from gqa_t5x.reproduce.results.rows import Row, read_rows
from gqa_t5x.reproduce.runner.stages import Stage
from gqa_t5x.training import best_checkpoint

# What every run of a model must agree on with its command, besides its macros.
CHECKED = ('MODEL_SIZE', 'NUM_KV_HEADS', 'KV_HEAD_DIM', 'RANDOM_SEED')
CHECKED += ('MIXTURE_OR_TASK_NAME', 'TASK')


@dataclasses.dataclass(frozen=True)
class Measured:
  """A number of our own.

  Attributes:
    values: one a seed, or one.
    source: one of SOURCES.
    commands: what made them.
  """

  values: tuple[float, ...]
  source: str
  commands: tuple[str, ...]

  @classmethod
  def of(cls, row: Row, value: float) -> 'Measured':
    """Returns a row's value, or what was computed from the row."""
    return cls((value,), row['source'], (row['command'],))

  @property
  def mean(self) -> float:
    """Their mean."""
    return statistics.fmean(self.values)

  @property
  def spread(self) -> float | None:
    """Their standard deviation; None of a single one."""
    return statistics.stdev(self.values) if len(self.values) > 1 else None


def combine(
  function: Callable[[Sequence[float]], float], numbers: Sequence[Measured | None]
) -> Measured | None:
  """Computes a number from others, as their mean; None unless all of them are there."""
  if not numbers or None in numbers:
    return None
  commands = tuple(dict.fromkeys(c for number in numbers for c in number.commands))
  value = function([number.mean for number in numbers])
  return Measured((value,), numbers[0].source, commands)


mean = functools.partial(combine, statistics.fmean)


class Reader:
  """Reads results, and collects what is wrong with them.

  Attributes:
    problems: one sentence for each file or folder that was skipped.
  """

  def __init__(self):
    self.problems: list[str] = []

  def _read(
    self, path: Any, read: Callable[..., Any], *args: Any, **kwargs: Any
  ) -> Any:
    """Reads what a path has; None, and why in `problems`, if it cannot be used."""
    try:
      return read(*args, **kwargs) if path.exists() else None
    except BadInput as error:
      if str(error) not in self.problems:
        self.problems.append(str(error))
    return None

  def score(self, plan: Planner, model: Model, task: str) -> Measured | None:
    """Returns the best dev score of a model on a task, one value a seed.

    None if no seed was run to its end.
    """
    metric = plan.value('finetune', 'METRIC', task)
    values = {}
    for seed in plan.experiment.seeds_of(model):
      stage = plan.finetuning(model, task, seed)
      path, asked = stage.result.parent, (stage, model, task, metric)
      values[str(stage)] = self._read(path, _best_score, *asked)
    values = {command: value for command, value in values.items() if value is not None}
    if not values:
      return None
    return Measured(tuple(values.values()), 'measured', tuple(values))

  def translation(self, plan: Planner, size: str, beams: int) -> Measured | None:
    """Returns BLEU of the test set of one of Shazeer's models; None if not run."""
    stage = plan.translation_scores(size, beams)
    asked = stage.result.parent.parent, 'wmt14_en_de_shazeer', 'bleu'
    scores = self._read(stage.result, _read_scores, *asked)
    if not scores:
      return None
    return Measured((scores[max(scores)],), 'measured', (str(stage),))

  def events(self, stage: Stage) -> dict[str, float] | None:
    """Returns what a run's trainer has found in its loss; None if it was not run."""
    return self._read(stage.result, events.stability, stage.result.parent)

  def rows(self, path: Any, kind: str, **expected: Any) -> list[Row]:
    """Returns the rows of a file, as `read_rows`; none if they cannot be used."""
    return self._read(path, read_rows, path, kind, **expected) or []

  def row(self, path: Any, kind: str, **expected: Any) -> Row | None:
    """Returns the only row of a file, or None if it cannot be used."""
    return next(iter(self.rows(path, kind, **expected)), None)


def _best_score(stage: Stage, model: Model, task: str, metric: str) -> float:
  """The best dev score of one run.

  Raises:
    BadInput: the run is another one, damaged, or did not come to its end.
  """
  folder, last = stage.result.parent, step_of(stage.result)
  _check_config(folder, {'MODEL_SIZE': model.size, **stage.macros})
  found = _read_scores(folder, task, metric)
  if last not in found:
    raise BadInput(f'{folder} is partial: scored to step {max(found)} of {last}.')
  return found[best_checkpoint.select(found)]


def _read_scores(folder: Any, task: str, metric: str) -> dict[int, float]:
  """Step -> score; raises BadInput if a line is damaged, or no score is a number."""
  try:
    damaged = best_checkpoint.damaged_lines(folder, task)
    found = best_checkpoint.scores(folder, metric, task)
    best_checkpoint.select(found)
  except ValueError as error:
    raise BadInput(f'{folder}: {error}') from error
  if damaged:
    raise BadInput(f'{folder}: line {damaged[0]} of the scores of {task} is damaged.')
  return found


def _check_config(folder: Any, expected: Row) -> None:
  """Checks by the `config.gin` that T5X writes that a run was of these macros.

  Raises:
    BadInput: the file is missing or damaged, or a value is another one.
  """
  path = folder / 'config.gin'
  if not path.exists():
    raise BadInput(f'{path} is missing: nothing says what was run there.')
  try:
    macros = gin_files.parse(path.read_text('utf-8'))
  except (SyntaxError, OSError, BadInput) as error:
    raise BadInput(f'{path} is damaged ({type(error).__name__}).') from error
  for name in CHECKED:
    if name in expected and macros.get(name) != expected[name]:
      raise BadInput(
        f'{folder} is of another run: {name} is {macros.get(name)!r}, not'
        f' {expected[name]!r}.'
      )
  given, wanted = (
    str(values.get('INITIAL_CHECKPOINT_PATH')).rstrip('/').split('/')[-2:]
    for values in (macros, expected)
  )
  if 'INITIAL_CHECKPOINT_PATH' in expected and given != wanted:
    raise BadInput(
      f'{folder} is of another run: it began from {"/".join(given)}, not'
      f' {"/".join(wanted)}.'
    )
