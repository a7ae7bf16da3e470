"""The study of conversion methods: which of them loses least, measured.

Pre-train (MHA), calibrate, convert by every method to every number of key/value heads,
uptrain each for 10% of the pre-training steps (mini: 5%) with evaluations on the way,
and report. MHA itself is trained on as long: what uptraining is held to. All numbers of
the runs are in the gin files. The study `quick` is one of the local experiments; `tiny`
has all methods and more seeds, `mini` a larger model.
"""

import dataclasses
import pathlib
import sys

from gqa_t5x.model import sizes
from gqa_t5x.reproduce.experiments import commands
from gqa_t5x.reproduce.experiments.arms import (
  FOUR_METHODS,
  MAIN_METHODS,
  METHODS,
  SEEDED,
  Arm,
)
from gqa_t5x.reproduce.experiments.gin_macros import macro
from gqa_t5x.reproduce.report import conversion_report
from gqa_t5x.reproduce.results import conversion_rows, events
from gqa_t5x.reproduce.runner.stages import Stage


@dataclasses.dataclass(frozen=True)
class Study:
  """One study.

  Attributes:
    size: of its models, a key of sizes.SIZES.
    pretrain: gin file of pre-training.
    uptrain: gin file of uptraining.
    seeds: K -> seeds, of the data's order in uptraining and of the method random.
    methods: as arms.METHODS.
  """

  size: str
  pretrain: str
  uptrain: str
  seeds: dict[int, tuple[int, ...]]
  methods: tuple[tuple[str, str, str], ...]


STUDIES = {
  'quick': Study(
    'tiny',
    'gin/local/study_pretrain.gin',
    'gin/local/study_uptrain.gin',
    {2: (1,), 1: (1,)},
    FOUR_METHODS,
  ),
  'tiny': Study(
    'tiny',
    'gin/local/study_pretrain.gin',
    'gin/local/study_uptrain.gin',
    {4: (1,), 2: (1, 2, 3), 1: (1,)},
    METHODS,
  ),
  'mini': Study(
    'mini',
    'gin/local/study_mini_pretrain.gin',
    'gin/local/study_mini_uptrain.gin',
    {4: (1,), 2: (1,), 1: (1,)},
    MAIN_METHODS,
  ),
}


def arms(name: str) -> list[Arm]:
  """Lists the models that are uptrained, MHA first, with every seed of the others."""
  study = STUDIES[name]
  num_heads = sizes.SIZES[study.size]['num_heads']
  seeds = sorted(set().union(*study.seeds.values()))
  result = [Arm('none', 'none', 'contiguous', num_heads, seed) for seed in seeds]
  for num_kv_heads, seeds in study.seeds.items():
    for method, statistics, grouping in study.methods:
      if grouping == 'similarity' and num_kv_heads == 1:
        continue
      for seed in seeds:
        result.append(Arm(method, statistics, grouping, num_kv_heads, seed))
  return result


@dataclasses.dataclass(frozen=True)
class Paths:
  """Where the results of the study are.

  Attributes:
    output_dir: of all experiments.
    name: a key of STUDIES.
  """

  output_dir: pathlib.Path
  name: str

  @property
  def folder(self) -> pathlib.Path:
    """All results of the study are below it."""
    return self.output_dir / 'local' / 'conversion' / self.name

  @property
  def study(self) -> Study:
    return STUDIES[self.name]

  @property
  def pretrain_steps(self) -> int:
    return macro(self.study.pretrain, 'TRAIN_STEPS')

  @property
  def last_step(self) -> int:
    return macro(self.study.uptrain, 'TRAIN_STEPS')

  @property
  def evaluated_steps(self) -> list[int]:
    """Steps with an evaluation, from that right after conversion on."""
    period = macro(self.study.uptrain, 'EVAL_PERIOD')
    return [*range(self.pretrain_steps, self.last_step, period), self.last_step]

  @property
  def mha(self) -> pathlib.Path:
    return self.folder / 'mha' / f'checkpoint_{self.pretrain_steps}'

  @property
  def statistics(self) -> pathlib.Path:
    return self.folder / 'statistics.npz'

  @property
  def rows(self) -> pathlib.Path:
    return self.folder / 'rows.json'

  def converted(self, arm: Arm) -> pathlib.Path:
    """The checkpoint right after conversion; for MHA, the one pre-trained."""
    if arm.method == 'none':
      return self.mha
    return self.folder / 'converted' / arm.conversion / self.mha.name

  def uptrained(self, arm: Arm) -> pathlib.Path:
    return self.folder / 'uptrained' / arm.name / f'checkpoint_{self.last_step}'


def pretrain_stage(paths: Paths) -> Stage:
  """The stage that all others begin from, those of other experiments, too."""
  return Stage(
    f'pre-train MHA, {paths.pretrain_steps:,} steps',
    paths.mha,
    commands.train(paths.study.pretrain, MODEL_DIR=paths.mha.parent),
    work=paths.pretrain_steps,
  )


def plan(output_dir: pathlib.Path, name: str) -> list[Stage]:
  """Lists the stages of a study.

  Args:
    output_dir: of all experiments.
    name: a key of STUDIES.
  """
  paths, all_arms = Paths(output_dir, name), arms(name)
  result = [
    pretrain_stage(paths),
    Stage(
      'collect statistics',
      paths.statistics,
      commands.calibrate(paths.mha, paths.statistics, MODEL_SIZE=paths.study.size),
      needs=(paths.mha,),
    ),
  ]
  # Seeds may share a converted checkpoint.
  converted = {paths.converted(arm): arm for arm in all_arms if arm.method != 'none'}
  result += [_convert_stage(paths, arm) for arm in converted.values()]
  uptrained = [_uptrain_stage(paths, arm) for arm in all_arms]
  result += uptrained
  command = {'output_dir': output_dir, 'study': name}
  result.append(
    Stage(
      'gather rows, compute spectra',
      paths.rows,
      commands.reproduce('evaluate', 'conversion', **command),
      needs=(paths.statistics, *(stage.result for stage in uptrained)),
    )
  )
  result.append(
    Stage(
      'report on conversion',
      paths.folder / 'conversion.md',
      commands.reproduce('report', 'conversion', **command),
      needs=(paths.rows,),
    )
  )
  return result


def _convert_stage(paths: Paths, arm: Arm) -> Stage:
  result = paths.converted(arm)
  calibrated = arm.statistics == 'calibrated'
  return Stage(
    f'convert to {arm.num_kv_heads} K/V heads by {arm.title}',
    result,
    commands.convert(
      paths.mha,
      result,
      arm.num_kv_heads,
      method=arm.method,
      statistics=paths.statistics if calibrated else None,
      grouping=arm.grouping if arm.grouping != 'contiguous' else None,
      seed=arm.seed if arm.method in SEEDED else None,
    ),
    needs=(paths.mha, paths.statistics) if calibrated else (paths.mha,),
  )


def _uptrain_stage(paths: Paths, arm: Arm) -> Stage:
  source, result = paths.converted(arm), paths.uptrained(arm)
  return Stage(
    f'uptrain with {arm.num_kv_heads} K/V heads, {arm.title}, seed {arm.seed}',
    result,
    commands.train(
      paths.study.uptrain,
      MODEL_DIR=result.parent,
      INITIAL_CHECKPOINT_PATH=source,
      NUM_KV_HEADS=arm.num_kv_heads,
      RANDOM_SEED=arm.seed,
    ),
    needs=(source,),
    # It has no checkpoint to go on from, and its evaluations would stand twice.
    leftover=result.parent,
    work=paths.last_step - paths.pretrain_steps,
  )


def evaluate(output_dir: str, study: str) -> int:
  """Writes `rows.json` from what the runs left; returns the exit code.

  Args:
    output_dir: of all experiments.
    study: a key of STUDIES.
  """
  paths = Paths(pathlib.Path(output_dir), study)
  uptrain = paths.study.uptrain
  evaluation = conversion_rows.Evaluation(
    study=study,
    size=paths.study.size,
    task=macro(uptrain, 'MIXTURE_OR_TASK_NAME'),
    lengths=macro(uptrain, 'TASK_FEATURE_LENGTHS'),
    batch_size=macro(uptrain, 'BATCH_SIZE'),
    num_batches=macro(uptrain, 'EVAL_STEPS'),
    steps=paths.evaluated_steps,
  )
  try:
    rows = conversion_rows.loss_rows(
      {arm: paths.uptrained(arm).parent for arm in arms(study)}, evaluation
    )
  except events.BadEvents as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  rows.append(conversion_rows.unigram_row(evaluation))
  rows += conversion_rows.spectrum_rows(
    paths.mha, paths.statistics, tuple(paths.study.seeds), evaluation
  )
  conversion_rows.write(rows, paths.rows)
  return 0


def report(output_dir: str, study: str) -> int:
  """Writes `conversion.md` and its figures from `rows.json`; returns the exit code.

  Args:
    output_dir: of all experiments.
    study: a key of STUDIES.
  """
  paths = Paths(pathlib.Path(output_dir), study)
  conversion_report.write(paths.rows, paths.folder)
  return 0
