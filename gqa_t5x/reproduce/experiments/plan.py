"""Prints what a target takes: commands in order, files, chip-hours, what is done."""

import json
import sys
from typing import Any

from gqa_t5x import command_line
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.targets import make_plan
from gqa_t5x.reproduce.runner.stages import Stage

CHIPS = {'v4': 'TPUv4 chip-hours', 'core': 'core-hours'}


def print_plan(
  target: str, scale: str, output_dir: str, tfds_data_dir: str | None, as_json: bool
) -> None:
  """Prints the plan of a target; the first four arguments are those of `make_plan`."""
  plan = make_plan(target, scale, output_dir, tfds_data_dir)
  missing = _missing(plan)
  rows = [_row(stage, plan.experiment.chip, missing) for stage in plan.stages]
  print(json.dumps(rows, indent=1) if as_json else _text(rows, plan))


def _missing(plan: Planner) -> set[str] | None:
  """Results that are not there yet; None where the folder cannot be read."""
  try:
    return {str(stage.result) for stage in plan.missing()}
  except Exception as error:
    if not command_line.is_of_file_system(error):
      raise
    print(f'# {plan.folder} cannot be read: {type(error).__name__}.', file=sys.stderr)
    return None


def _row(stage: Stage, chip: str, missing: set[str] | None) -> dict[str, Any]:
  """A stage for machines; `hours` of one chip, None where it takes minutes."""
  result = str(stage.result)
  return {
    'kind': 'plan',
    'source': 'analytic',
    'title': stage.title,
    'command': str(stage),
    'reads': [*stage.reads, *(str(need.result) for need in stage.needs)],
    'writes': result,
    'hours': stage.hours,
    'chip': chip,
    'done': None if missing is None else result not in missing,
  }


def _text(rows: list[dict[str, Any]], plan: Planner) -> str:
  """The plan for a reader, and for a shell: what is no command is a comment."""
  lines, unit = _preparation(rows, plan), CHIPS[plan.experiment.chip]
  for i, row in enumerate(rows, start=1):
    lines.append(f'# [{i}/{len(rows)}] {row["title"]}{", done" * bool(row["done"])}')
    if row['hours'] is not None:
      lines.append(f'#   takes  {_hours(row["hours"])} {unit}')
    lines += [f'#   reads  {what}' for what in row['reads']]
    lines += [f'#   writes {row["writes"]}', row['command'], '']
  left = [row for row in rows if not row['done']]
  hours = _hours(sum(row['hours'] or 0 for row in left))
  lines.append(
    f'# {len(rows)} commands, {len(rows) - len(left)} done; left: about {hours} {unit}'
    ' (analytic: gqa_t5x/reproduce/experiments/estimates.py).'
  )
  return '\n'.join(lines)


def _preparation(rows: list[dict[str, Any]], plan: Planner) -> list[str]:
  """The command that downloads the data, where there is any."""
  read = {what for row in rows for what in row['reads']}
  tasks = [task for task in plan.experiment.tasks if task in read]
  if not (tasks and plan.experiment.public):
    return []
  words = ['python -m gqa_t5x.data.prepare', *tasks, *plan.data_flags]
  return ['# Data, once (docs/data.md; C4 apart):', ' '.join(words), '']


def _hours(hours: float) -> str:
  return f'{hours:,.0f}' if hours >= 10 else f'{hours:.2g}'
