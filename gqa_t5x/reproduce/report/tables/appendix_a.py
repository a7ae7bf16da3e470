"""Appendix A: is MQA stable, from scratch and uptrained?"""

import pathlib

from gqa_t5x.reproduce.experiments import paper
from gqa_t5x.reproduce.experiments.models import SCRATCH
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.report.tables import table1
from gqa_t5x.reproduce.results.events import DIVERGENCES, SPIKES
from gqa_t5x.reproduce.results.reader import Measured, Reader
from gqa_t5x.reproduce.runner.stages import Stage


def write(doc: Document, found: Reader, plan: Planner, folder: pathlib.Path) -> None:
  """Adds scores with their spread, and the spikes and divergences of all runs.

  Args:
    doc: the report.
    found: reads results.
    plan: of a scale.
    folder: not used: there is no figure.
  """
  del folder
  if plan.experiment.public:
    doc.text(f'The paper: {paper.APPENDIX_A}')
  rows, scale = [], plan.experiment
  for model in scale.scratch if scale.public else (*scale.scratch, *scale.models[1:]):
    origin = 'from scratch' if model.method == SCRATCH else 'uptrained'
    before = plan.checkpoint(model)
    cells = [f'{model.label}, {origin}', *_events(doc, found, [before])]
    runs: list[Stage] = []
    for task in scale.ablation_tasks:
      cells.append(doc.number(found.score(plan, model, task), 1))
      seeds = scale.seeds_of(model)
      runs += [plan.finetuning(model, task, seed) for seed in seeds]
    rows.append([*cells, *_events(doc, found, runs)])
  tasks = table1.titles(plan.experiment.ablation_tasks)
  head = [
    'model',
    'spikes before',
    'diverged',
    *tasks,
    'spikes fine-tuning',
    'diverged',
  ]
  doc.table(head, rows)
  doc.text(
    'Spikes and divergences of the training loss by the rule of'
    ' `gqa_t5x/stability.py`: before, in pre-training from scratch or in uptraining;'
    ' and in all runs of fine-tuning together.'
  )


def _events(doc: Document, found: Reader, stages: list[Stage]) -> list[str]:
  """Two cells: spikes and divergences of runs together; not run unless all were."""
  counts = [found.events(stage) for stage in stages]
  if not counts or None in counts:
    return [doc.not_run(), doc.not_run()]
  commands = tuple(str(stage) for stage in stages)
  cells = []
  for kind in (SPIKES, DIVERGENCES):
    number = sum(count.get(kind, 0) for count in counts)
    cells.append(doc.number(Measured((number,), 'measured', commands), 0))
  return cells
