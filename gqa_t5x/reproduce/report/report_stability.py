"""Appendix A: is MQA stable, from scratch and uptrained?"""

from gqa_t5x.reproduce.experiments import paper
from gqa_t5x.reproduce.experiments.lab import Lab
from gqa_t5x.reproduce.experiments.models import SCRATCH, Model
from gqa_t5x.reproduce.report import report_scores
from gqa_t5x.reproduce.report.document import NOT_RUN, Document
from gqa_t5x.reproduce.results.events import DIVERGENCES, SPIKES
from gqa_t5x.reproduce.results.results import Measured, Results
from gqa_t5x.reproduce.runner.stages import Stage


def write(doc: Document, found: Results, lab: Lab) -> None:
  """Adds scores with their spread, and the spikes and divergences of all runs.

  Args:
    doc: the report.
    found: reads results.
    lab: of a scale.
  """
  if lab.scale.public:
    doc.text(f'The paper: {paper.APPENDIX_A}')
  rows, wanted = [], Lab(lab.scale, str(lab.output_dir))
  beside = () if lab.scale.public else lab.scale.models[1:]
  for model in (*lab.scale.scratch, *beside):
    origin = 'from scratch' if model.method == SCRATCH else 'uptrained'
    first = stage_before(wanted, model)
    cells = [f'{model.label}, {origin}', *_events(doc, found, [first])]
    runs: list[Stage] = []
    for task in lab.scale.ablation_tasks:
      cells.append(doc.number(found.score(lab, model, task), 1))
      for seed in lab.scale.seeds_of(model):
        runs.append(wanted.stage(wanted.finetuned(model, task, seed)))
    rows.append([*cells, *_events(doc, found, runs)])
  tasks = report_scores.titles(lab.scale.ablation_tasks)
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
  doc.commands([str(s) for s in wanted.stages if not s.result.exists()])


def stage_before(lab: Lab, model: Model) -> Stage:
  """Returns the stage that a model is fine-tuned after."""
  return lab.stage(lab.checkpoint(model))


def _events(doc: Document, found: Results, stages: list[Stage]) -> list[str]:
  """Two cells: spikes and divergences of runs together; not run unless all were."""
  counts = [found.events(stage) for stage in stages]
  if not counts or None in counts:
    return [NOT_RUN, NOT_RUN]
  commands = tuple(str(stage) for stage in stages)
  cells = []
  for kind in (SPIKES, DIVERGENCES):
    number = sum(count.get(kind, 0) for count in counts)
    cells.append(doc.number(Measured((number,), 'measured', commands), 0))
  return cells
