"""Rows: what tools and runs measured, one JSON object each."""

import json
from typing import Any

from gqa_t5x.analysis.benchmarks import workload
from gqa_t5x.errors import BadInput
from gqa_t5x.reproduce.experiments.planner import Planner

Row = dict[str, Any]
SOURCES = ('measured', 'compiled', 'analytic')


def measured(kind: str, command: str) -> Row:
  """Returns the keys of every row measured here: kind, source, device, versions, ..."""
  return workload.common_keys(kind, command, {'dtype': 'float32'})


def common(plan: Planner, kind: str, command: str) -> Row:
  """Returns what every row says of the runs of an experiment on this machine."""
  lengths = plan.value('pretrain', 'TASK_FEATURE_LENGTHS')
  return measured(kind, command) | {
    'size': plan.experiment.models[0].size,
    'pretrain_steps': plan.pretrain_steps,
    'batch_size': plan.value('pretrain', 'BATCH_SIZE'),
    'input_length': lengths['inputs'],
    'output_length': lengths['targets'],
  }


def versions(row: Row) -> str:
  """Returns the versions of a row as text."""
  return ', '.join(f'{name} {version}' for name, version in row['versions'].items())


def read_rows(path: Any, kind: str, **expected: Any) -> list[Row]:
  """Reads rows that were made together.

  Args:
    path: a JSON list of rows, or one; those of other kinds are passed over.
    kind: of the rows that are wanted.
    **expected: keys that must have these values.

  Raises:
    BadInput: the file is damaged, or its rows are not of one device, version or run.
  """
  try:
    found = json.loads(path.read_bytes())
    found = [found] if isinstance(found, dict) else found
    rows = [row for row in found if row['kind'] == kind]
  except (ValueError, TypeError, KeyError) as error:
    raise BadInput(f'{path} is damaged ({type(error).__name__}).') from error
  if not rows:
    raise BadInput(f'{path} has no row of kind {kind!r}.')
  for row in rows:
    if row.get('source') not in SOURCES:
      raise BadInput(f'{path} has a row whose source is {row.get("source")!r}.')
    for key, value in expected.items():
      if row.get(key) != value:
        raise BadInput(f'{path} has a row with {key}={row.get(key)!r}, not {value!r}.')
  for key in ('source', 'device', 'versions', 'command'):
    different = {json.dumps(row.get(key), sort_keys=True) for row in rows}
    if len(different) > 1:
      raise BadInput(f'{path} is mixed: its rows differ in {key}.')
  return rows
