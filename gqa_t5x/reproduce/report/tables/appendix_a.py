"""Appendix A: is MQA stable, from scratch and uptrained?"""

from gqa_t5x.reproduce.experiments import paper
from gqa_t5x.reproduce.experiments.models import SCRATCH
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.report.tables import table1
from gqa_t5x.reproduce.results.events import DIVERGENCES, SPIKES
from gqa_t5x.reproduce.results.reader import Measured
from gqa_t5x.reproduce.runner.stages import Stage


def write(part: Part) -> None:
  """Adds scores with their spread, and the spikes and divergences of all runs."""
  plan, scale = part.plan, part.scale
  if scale.public:
    part.doc.text(f'The paper: {paper.APPENDIX_A}')
  rows = []
  for model in scale.scratch if scale.public else (*scale.scratch, *scale.models[1:]):
    origin = 'from scratch' if model.method == SCRATCH else 'uptrained'
    cells = [f'{model.label}, {origin}', *_events(part, [plan.checkpoint(model)])]
    runs: list[Stage] = []
    for task in scale.ablation_tasks:
      cells.append(part.doc.number(part.found.score(plan, model, task), 1))
      runs += [plan.finetuning(model, task, seed) for seed in scale.seeds_of(model)]
    rows.append([*cells, *_events(part, runs)])
  tasks = table1.titles(scale.ablation_tasks)
  before, after = ['spikes before', 'diverged'], ['spikes fine-tuning', 'diverged']
  part.doc.table(['model', *before, *tasks, *after], rows)
  part.doc.text(
    'Spikes and divergences of the training loss by the rule of'
    ' `gqa_t5x/training/loss_watch.py`: before, in pre-training from scratch or in'
    ' uptraining; and in all runs of fine-tuning together.'
  )


def _events(part: Part, stages: list[Stage]) -> list[str]:
  """Two cells: spikes and divergences of runs together; not run unless all were."""
  counts = [part.found.events(stage) for stage in stages]
  if not counts or None in counts:
    return [part.doc.not_run(), part.doc.not_run()]
  commands = tuple(map(str, stages))
  return [
    part.doc.number(Measured((sum(c[kind] for c in counts),), 'measured', commands), 0)
    for kind in (SPIKES, DIVERGENCES)
  ]
