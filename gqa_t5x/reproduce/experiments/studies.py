"""Experiments that compare methods of conversion on one machine: studies, miniature.

A study pre-trains (MHA), calibrates, converts by every method to every number of
key/value heads, uptrains each for 10% of the pre-training steps (mini: 5%) with
evaluations on the way, and reports. MHA itself is trained on as long: what uptraining
is held to. `quick` is one of the local experiments; `tiny` has all methods and more
seeds, `mini` a larger model.

The miniature is the paper's recipe through the commands that a user types: convert by
mean, first and random as in the paper, and by svd; uptrain mean and svd.

All numbers of the runs are in the gin files; alphas agree with them.
"""

from collections.abc import Mapping

from gqa_t5x.reproduce.experiments import commands
from gqa_t5x.reproduce.experiments.experiment import Conclusion, Experiment, Names
from gqa_t5x.reproduce.experiments.models import (
  MEAN,
  METHODS,
  PAPER_METHODS,
  SVD,
  SVD_BY_WEIGHTS,
  Method,
  Model,
  mha,
)
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.runner.stages import Stage


def _study(
  name: str,
  size: str,
  prefix: str,
  alpha: float,
  seeds: Mapping[int, tuple[int, ...]],
  methods: tuple[Method, ...],
) -> Experiment:
  """Makes a study.

  Args:
    name: of the study.
    size: of its models, a key of sizes.SIZES.
    prefix: what its gin files' names begin with.
    alpha: of uptraining.
    seeds: K -> seeds, of the data's order in uptraining and of the method random.
    methods: of conversion; K = 1 has one group, so similarity groups nothing there.
  """
  models = [mha(size, alpha, seed) for seed in sorted(set().union(*seeds.values()))]
  models += [
    Model(size, num_kv_heads, method, alpha, seed)
    for num_kv_heads, several in seeds.items()
    for method in methods
    if num_kv_heads > 1 or method.grouping != 'similarity'
    for seed in several
  ]
  return Experiment(
    name=name,
    folder=f'local/conversion/{name}',
    models=tuple(models),
    names=Names(
      pretrained='mha/checkpoint_{step}',
      statistics='statistics.npz',
      converted='converted/{model.conversion_name}/checkpoint_{step}',
      uptrained='uptrained/{model.run_name}/checkpoint_{step}',
      uptrain_title=Names.uptrain_title + ', seed {model.seed}',
    ),
    gin_files={
      'pretrain': (f'gin/local/{prefix}_pretrain.gin',),
      'calibrate': ('gin/local/calibrate.gin',),
      'uptrain': (f'gin/local/{prefix}_uptrain.gin',),
    },
    macros={'calibrate': {'MODEL_SIZE': size}},
    given=('MODEL_DIR', 'INITIAL_CHECKPOINT_PATH', 'NUM_KV_HEADS', 'RANDOM_SEED'),
    flags=(commands.QUIET,),
    begin_anew=('uptrain',),
    conclusion=Conclusion(
      'conversion',
      {'study': name},
      'gather rows, compute spectra',
      'conversion.md',
      'report on conversion',
    ),
  )


# The paper's three, and the best; the paper's three, and svd without statistics, too.
_FOUR = (*PAPER_METHODS, SVD)
_MAIN = (*PAPER_METHODS, SVD_BY_WEIGHTS, SVD)
STUDIES = {
  study.name: study
  for study in (
    _study('quick', 'tiny', 'study', 0.1, {2: (1,), 1: (1,)}, _FOUR),
    _study('tiny', 'tiny', 'study', 0.1, {4: (1,), 2: (1, 2, 3), 1: (1,)}, METHODS),
    _study('mini', 'mini', 'study_mini', 0.05, {4: (1,), 2: (1,), 1: (1,)}, _MAIN),
  )
}
QUICK = STUDIES['quick']


def _converted(methods: tuple[Method, ...], alpha: float) -> list[Model]:
  return [Model('tiny', heads, m, alpha) for m in methods for heads in (2, 1)]


MINIATURE = Experiment(
  name='uptrain',
  folder='',
  models=(
    mha('tiny'),
    *_converted(_FOUR, 0.0),
    mha('tiny', 0.05),
    *_converted((MEAN, SVD), 0.05),
  ),
  names=Names(
    pretrained='mha/checkpoint_{step}',
    statistics='mha/checkpoint_{step}.statistics.npz',
    converted='converted/{model.method.name}_{model.num_kv_heads}/checkpoint_{step}',
    uptrained='uptrain_{model.heads}{model.method_suffix}/checkpoint_{step}',
  ),
  gin_files={
    'pretrain': ('gin/local/pretrain_mha.gin',),
    'calibrate': ('gin/local/calibrate.gin',),
    'uptrain': ('gin/local/uptrain_{model.heads}.gin',),
  },
  macros={},
  given=('MODEL_DIR', 'INITIAL_CHECKPOINT_PATH'),
  flags=(commands.QUIET,),
  conclusion=Conclusion(
    'uptrain',
    {},
    'evaluate on the validation split, time decoding',
    'report.md',
    'report',
  ),
)


def make_plan(experiment: Experiment, output_dir: str) -> Planner:
  """Collects the stages that make, evaluate and report on an experiment's models."""
  plan, end = Planner(experiment, output_dir), experiment.conclusion
  statistics = plan.statistics(experiment.models[0].size)
  checkpoints = [plan.checkpoint(model) for model in experiment.models]
  flags = {'output_dir': plan.output_dir, **end.flags}
  evaluation = Stage(
    end.evaluate_title,
    plan.rows,
    commands.module('gqa_t5x.reproduce', 'evaluate', end.experiment, **flags),
    needs=(statistics, *checkpoints),
  )
  report = Stage(
    end.report_title,
    plan.folder / end.report,
    commands.module('gqa_t5x.reproduce', 'report', end.experiment, **flags),
    needs=(evaluation,),
  )
  conversions = [plan.conversion(model) for model in experiment.models]
  plan.require(statistics, *conversions, *checkpoints, evaluation, report)
  return plan
