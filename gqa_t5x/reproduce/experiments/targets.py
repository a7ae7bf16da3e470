"""What each table and figure of the papers needs, as stages of a plan."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from gqa_t5x.reproduce.experiments import commands, compiled, paper, studies
from gqa_t5x.reproduce.experiments.experiment import Timing
from gqa_t5x.reproduce.experiments.models import Model
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.scales import LOCAL, SCALES
from gqa_t5x.reproduce.runner.stages import Stage, check_plan


def table1(plan: Planner) -> None:
  """Scores of all models on all tasks, and their time per sample."""
  scale = plan.experiment
  _finetune(plan, scale.models, scale.tasks)
  for timing in scale.timings:
    plan.require(plan.timing(timing_name(timing), timing))


def _finetune(plan: Planner, models, tasks, seeds=None) -> None:
  """Fine-tunes models on tasks; by default with the seeds of the scale."""
  for model in models:
    for task in tasks:
      for seed in seeds or plan.experiment.seeds_of(model):
        plan.require(plan.finetuning(model, task, seed))


def timing_name(timing: Timing) -> str:
  """Returns the name of the rows of one timing of table 1."""
  latent = f'_latent{timing.kv_head_dim}' if timing.kv_head_dim else ''
  return f'{timing.size}_{timing.input_length}_{timing.output_length}{latent}'


def figure4(plan: Planner) -> None:
  """Methods of conversion to MQA."""
  scale = plan.experiment
  if scale is LOCAL:
    study(plan)
  _finetune(plan, scale.ablation, scale.ablation_tasks, seeds=(1,))


def figure5(plan: Planner) -> None:
  """Scores against the share of uptraining."""
  scale = plan.experiment
  if scale is LOCAL:
    study(plan)
  for model, alphas in scale.alphas.items():
    # One run, which passes all of them.
    plan.require(plan.checkpoint(at(model, max(alphas))))
    models = [at(model, alpha) for alpha in alphas]
    _finetune(plan, models, scale.ablation_tasks, seeds=(1,))


def at(model: Model, alpha: float) -> Model:
  """Returns the model at another share of uptraining."""
  return dataclasses.replace(model, alpha=alpha)


def figure6(plan: Planner) -> None:
  """Time per sample against key/value heads."""
  plan.require(plan.timing('figure6', plan.experiment.heads))
  plan.require(plan.timing('figure6_latent', plan.experiment.latent))


def appendix_a(plan: Planner) -> None:
  """MQA from scratch and uptrained models: several seeds of what is unstable."""
  _finetune(plan, plan.experiment.scratch, plan.experiment.ablation_tasks)


def shazeer(plan: Planner) -> None:
  """Shazeer's translation models: trained, where there is WMT14, and timed."""
  for name, facts in paper.SHAZEER.items():
    if plan.experiment is not LOCAL:
      plan.require(*(plan.translation_scores(facts['size'], n) for n in (1, 4)))
    plan.require(shazeer_timing(plan, name))


def shazeer_timing(plan: Planner, name: str) -> Stage:
  """Returns the stage that times a model of Shazeer's, a key of paper.SHAZEER."""
  size = paper.SHAZEER[name]['size']
  timing = dataclasses.replace(plan.experiment.shazeer, size=size)
  return plan.timing(f'shazeer_{name.lower()}', timing)


def study(plan: Planner) -> None:
  """The study of conversion methods; at the papers' scale, its models alone."""
  if plan.experiment is LOCAL:
    plan.require(*studies.make_plan(studies.QUICK, str(plan.output_dir)).stages)
    return
  for model in plan.experiment.ablation:
    for heads in (8, 1):
      chosen = dataclasses.replace(model, num_kv_heads=heads)
      plan.require(plan.checkpoint(chosen))


def intensity(plan: Planner) -> None:
  """Arithmetic intensity by Shazeer's formulas."""
  result = intensity_file(plan.output_dir)
  plan.require(_evaluation('compute arithmetic intensity', 'intensity', result, plan))


def _evaluation(title: str, name: str, result: Any, plan: Planner) -> Stage:
  """The stage of `python -m gqa_t5x.reproduce evaluate NAME`."""
  folder = plan.output_dir
  command = commands.module('gqa_t5x.reproduce', 'evaluate', name, output_dir=folder)
  return Stage(title, result, command)


def intensity_file(output_dir: Any) -> Any:
  """Returns where the rows of arithmetic intensity are."""
  return output_dir / 'intensity.json'


def heads(plan: Planner) -> None:
  """Methods of conversion on the heads of a public model that was trained for long."""
  result = heads_file(plan.output_dir)
  plan.require(_evaluation('convert long-trained heads', 'heads', result, plan))


def heads_file(output_dir: Any) -> Any:
  """Returns where the rows of the long-trained heads are."""
  return output_dir / 'heads.json'


def training(plan: Planner) -> None:
  """Methods of conversion on small T5s that were trained in several ways."""
  result = training_file(plan.output_dir)
  plan.require(_evaluation('convert models of trainings', 'training', result, plan))


def training_file(output_dir: Any) -> Any:
  """Returns where the rows of the study against training are."""
  return output_dir / 'training.json'


TARGETS: dict[str, Callable[[Planner], None]] = {
  'table1': table1,
  'figure3': table1,
  'figure4': figure4,
  'figure5': figure5,
  'figure6': figure6,
  'appendix_a': appendix_a,
  'shazeer': shazeer,
  'conversion': study,
  'heads': heads,
  'training': training,
  'intensity': intensity,
  'compiled': lambda plan: plan.require(*compiled.stages(plan.output_dir)),
}
ALL = 'all'
# (target, scale) that run by themselves alone: they take hours, or what they need is
# installed apart.
APART = (('compiled', 'local'), *itertools.product(('heads', 'training'), SCALES))


def make_plan(
  target: str, scale: str, output_dir: str, tfds_data_dir: str | None = None
) -> Planner:
  """Collects the stages of a target.

  Args:
    target: a key of TARGETS, or ALL, without what is APART.
    scale: a key of SCALES.
    output_dir: folder of all results.
    tfds_data_dir: of TensorFlow Datasets.
  """
  plan = Planner(SCALES[scale], output_dir, tfds_data_dir)
  for name, add in TARGETS.items():
    if target == name or (target == ALL and (name, scale) not in APART):
      add(plan)
  check_plan(plan.stages)
  return plan
