"""Prints what a target takes: commands in order, files, chip-hours, what is done."""

import json
import sys
from typing import Any

from gqa_t5x.reproduce.experiments.lab import Lab
from gqa_t5x.reproduce.experiments.scales import SCALES
from gqa_t5x.reproduce.experiments.targets import TARGETS, chosen
from gqa_t5x.reproduce.runner.stages import Stage, check_plan

CHIPS = {'v4': 'TPUv4 chip-hours', 'core': 'core-hours'}


def make(
  target: str, scale: str, output_dir: str, tfds_data_dir: str | None = None
) -> Lab:
  """Collects the stages of a target.

  Args:
    target: a key of targets.TARGETS, or targets.ALL.
    scale: a key of SCALES.
    output_dir: folder of all results.
    tfds_data_dir: of TensorFlow Datasets.
  """
  lab = Lab(SCALES[scale], output_dir, tfds_data_dir)
  for name in chosen(target, scale):
    TARGETS[name](lab)
  check_plan(lab.stages)
  return lab


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
  lab = make(target, scale, output_dir, tfds_data_dir)
  rows = [row(stage, lab) for stage in lab.stages]
  look_for_results(rows, lab)
  print(json.dumps(rows, indent=1) if as_json else text(rows, lab))
  return 0


def look_for_results(rows: list[dict[str, Any]], lab: Lab) -> None:
  """Says of every row whether it is done; of none, where the folder cannot be read.

  Args:
    rows: of `row`; gain the key done: True, False or None.
    lab: whose rows they are.
  """
  import tensorflow as tf

  try:
    for one, stage in zip(rows, lab.stages, strict=True):
      one['done'] = stage.result.exists()
  except (OSError, tf.errors.OpError) as error:
    print(f'# {lab.folder} cannot be read: {type(error).__name__}.', file=sys.stderr)
    for one in rows:
      one['done'] = None


def row(stage: Stage, lab: Lab) -> dict[str, Any]:
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
    'reads': [*stage.reads, *map(str, stage.needs)],
    'writes': str(stage.result),
    'hours': stage.hours,
    'chip': lab.scale.chip,
  }


def text(rows: list[dict[str, Any]], lab: Lab) -> str:
  """Returns the plan for a reader, and for a shell: what is no command is a comment."""
  lines = _preparation(rows, lab)
  for i, stage in enumerate(rows, start=1):
    state = ', done' if stage['done'] else ''
    lines.append(f'# [{i}/{len(rows)}] {stage["title"]}{state}')
    if stage['hours'] is not None:
      lines.append(f'#   takes  {_hours(stage["hours"])} {CHIPS[lab.scale.chip]}')
    lines += [f'#   reads  {what}' for what in stage['reads']]
    lines += [f'#   writes {stage["writes"]}', stage['command'], '']
  left = [stage for stage in rows if not stage['done']]
  hours = sum(stage['hours'] or 0 for stage in left)
  lines.append(
    f'# {len(rows)} commands, {len(rows) - len(left)} done; left: about {_hours(hours)}'
    f' {CHIPS[lab.scale.chip]} (analytic: gqa_t5x/reproduce/estimates.py).'
  )
  return '\n'.join(lines)


def _preparation(rows: list[dict[str, Any]], lab: Lab) -> list[str]:
  """The command that downloads the data, where there is any."""
  read = {what for stage in rows for what in stage['reads']}
  tasks = [task for task in lab.scale.tasks if task in read and lab.scale.public]
  if not tasks:
    return []
  words = ['python -m gqa_t5x.data.prepare', *tasks, *lab.data_flags]
  return ['# Data, once (docs/data.md; C4 apart):', ' '.join(words), '']


def _hours(hours: float) -> str:
  return f'{hours:,.0f}' if hours >= 10 else f'{hours:.2g}'
