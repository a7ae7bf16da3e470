"""What each table and figure of the papers needs, as stages of a lab."""

import dataclasses
from collections.abc import Callable

from gqa_t5x.reproduce.experiments import commands, compiled, conversion, paper
from gqa_t5x.reproduce.experiments.lab import STUDY, Lab
from gqa_t5x.reproduce.experiments.models import Model
from gqa_t5x.reproduce.experiments.scales import LOCAL, Timing
from gqa_t5x.reproduce.results import intensity as intensity_rows
from gqa_t5x.reproduce.runner.stages import Stage


def table1(lab: Lab) -> None:
  """Scores of all models on all tasks, and their time per sample."""
  for model in lab.scale.models:
    for task in lab.scale.tasks:
      for seed in lab.scale.seeds_of(model):
        lab.finetuned(model, task, seed)
  for name, timing in timings(lab).items():
    lab.timed(name, timing)


def timings(lab: Lab) -> dict[str, Timing]:
  """Returns how the models of table 1 are timed, by name of the rows."""
  return {
    f'{t.size}_{t.input_length}_{t.output_length}': t
    for several in lab.scale.timings.values()
    for t in several
  }


def figure4(lab: Lab) -> None:
  """Methods of conversion to MQA."""
  if lab.scale is LOCAL:
    study(lab)
  for model in lab.scale.ablation:
    for task in lab.scale.ablation_tasks:
      lab.finetuned(model, task, 1)


def figure5(lab: Lab) -> None:
  """Scores against the share of uptraining."""
  if lab.scale is LOCAL:
    study(lab)
  for model, alphas in lab.scale.alphas.items():
    lab.checkpoint(at(model, max(alphas)))  # one run, which passes all of them
    for alpha in alphas:
      for task in lab.scale.ablation_tasks:
        lab.finetuned(at(model, alpha), task, 1)


def at(model: Model, alpha: float) -> Model:
  """Returns the model at another share of uptraining."""
  return Model(model.size, model.num_kv_heads, model.method, alpha)


def figure6(lab: Lab) -> None:
  """Time per sample against key/value heads."""
  lab.timed('figure6', lab.scale.heads)


def appendix_a(lab: Lab) -> None:
  """MQA from scratch, beside uptrained models: several seeds of what is unstable."""
  for model in lab.scale.scratch:
    for task in lab.scale.ablation_tasks:
      for seed in lab.scale.seeds_of(model):
        lab.finetuned(model, task, seed)


def shazeer(lab: Lab) -> None:
  """Shazeer's translation models: trained, where there is WMT14, and timed."""
  for name, facts in paper.SHAZEER.items():
    if lab.scale is not LOCAL:
      lab.translated(facts['size'])
    lab.timed(f'shazeer_{name.lower()}', shazeer_timing(lab, facts['size']))


def shazeer_timing(lab: Lab, size: str) -> Timing:
  """Returns how a model of Shazeer's is timed."""
  return dataclasses.replace(lab.scale.shazeer, size=size)


def study(lab: Lab) -> None:
  """The study of conversion methods; at the papers' scale, its models alone."""
  if lab.scale is LOCAL:
    lab.add(*conversion.plan(lab.output_dir, STUDY))
    return
  for model in lab.scale.ablation:
    for heads in (8, 1):
      lab.uptrained(Model(model.size, heads, model.method, model.alpha))


def intensity(lab: Lab) -> None:
  """Arithmetic intensity by Shazeer's formulas."""
  result = lab.output_dir / intensity_rows.FILE
  command = commands.reproduce('evaluate', 'intensity', output_dir=lab.output_dir)
  lab.add(Stage('compute arithmetic intensity', result, command))


TARGETS: dict[str, Callable[[Lab], None]] = {
  'table1': table1,
  'figure3': table1,
  'figure4': figure4,
  'figure5': figure5,
  'figure6': figure6,
  'appendix_a': appendix_a,
  'shazeer': shazeer,
  'conversion': study,
  'intensity': intensity,
  'compiled': compiled.stages,
}
ALL = 'all'


def chosen(target: str, scale: str) -> tuple[str, ...]:
  """Returns the targets that a word stands for.

  Args:
    target: a key of TARGETS, or ALL.
    scale: a key of SCALES. `compiled` is of the paper's: it takes hours here.
  """
  if target != ALL:
    return (target,)
  return tuple(name for name in TARGETS if (name, scale) != ('compiled', LOCAL.name))
