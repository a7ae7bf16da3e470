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
  target: str,
  scale: str,
  output_dir: str,
  tfds_data_dir: str | None,
  as_json: bool,
) -> int:
  """Prints the plan of a target; returns the exit code.

  Args:
    target: a key of targets.TARGETS, or targets.ALL.
    scale: a key of SCALES.
    output_dir: folder of all results.
    tfds_data_dir: of TensorFlow Datasets.
    as_json: for machines.
  """
  plan = make_plan(target, scale, output_dir, tfds_data_dir)
  rows = [row(stage, plan.experiment.chip) for stage in plan.stages]
  look_for_results(rows, plan)
  print(json.dumps(rows, indent=1) if as_json else text(rows, plan))
  return 0


def look_for_results(rows: list[dict[str, Any]], plan: Planner) -> None:
  """Says of every row whether it is done; of none, where the folder cannot be read.

  Args:
    rows: of `row`; gain the key done: True, False or None.
    plan: whose rows they are.
  """
  try:
    missing = {str(stage.result) for stage in plan.missing()}
  except Exception as error:
    if not command_line.is_of_file_system(error):
      raise
    print(f'# {plan.folder} cannot be read: {type(error).__name__}.', file=sys.stderr)
    missing = None
  for one in rows:
    one['done'] = None if missing is None else one['writes'] not in missing


def row(stage: Stage, chip: str) -> dict[str, Any]:
  """Returns a stage as a row.

  Returns:
    Keys kind ('plan'), source ('analytic'), title, command, reads, writes, hours (of
    one chip; None where it takes minutes) and chip.
  """
  return {
    'kind': 'plan',
    'source': 'analytic',
    'title': stage.title,
    'command': str(stage),
    'reads': [*stage.reads, *(str(need.result) for need in stage.needs)],
    'writes': str(stage.result),
    'hours': stage.hours,
    'chip': chip,
  }


def text(rows: list[dict[str, Any]], plan: Planner) -> str:
  """Returns the plan for a reader, and for a shell: what is no command is a comment."""
  lines = _preparation(rows, plan)
  for i, stage in enumerate(rows, start=1):
    state = ', done' if stage['done'] else ''
    lines.append(f'# [{i}/{len(rows)}] {stage["title"]}{state}')
    if stage['hours'] is not None:
      lines.append(f'#   takes  {_hours(stage["hours"])} {CHIPS[plan.experiment.chip]}')
    lines += [f'#   reads  {what}' for what in stage['reads']]
    lines += [f'#   writes {stage["writes"]}', stage['command'], '']
  left = [stage for stage in rows if not stage['done']]
  hours = sum(stage['hours'] or 0 for stage in left)
  lines.append(
    f'# {len(rows)} commands, {len(rows) - len(left)} done; left: about {_hours(hours)}'
    f' {CHIPS[plan.experiment.chip]} (analytic: gqa_t5x/reproduce/estimates.py).'
  )
  return '\n'.join(lines)


def _preparation(rows: list[dict[str, Any]], plan: Planner) -> list[str]:
  """The command that downloads the data, where there is any."""
  read = {what for stage in rows for what in stage['reads']}
  scale = plan.experiment
  tasks = [task for task in scale.tasks if task in read and scale.public]
  if not tasks:
    return []
  words = ['python -m gqa_t5x.data.prepare', *tasks, *plan.data_flags]
  return ['# Data, once (docs/data.md; C4 apart):', ' '.join(words), '']


def _hours(hours: float) -> str:
  return f'{hours:,.0f}' if hours >= 10 else f'{hours:.2g}'
