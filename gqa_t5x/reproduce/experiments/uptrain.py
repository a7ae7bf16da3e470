"""The paper's recipe in miniature, through the commands that a user types.

Pre-train (MHA), convert (mean, first, random as in the paper, and svd), uptrain (mean
and svd), evaluate, report.
"""

import dataclasses
import pathlib

from gqa_t5x.reproduce.experiments import commands
from gqa_t5x.reproduce.experiments.gin_macros import macro
from gqa_t5x.reproduce.report import uptrain_report
from gqa_t5x.reproduce.results import evaluate
from gqa_t5x.reproduce.runner import stages
from gqa_t5x.reproduce.runner.stages import Stage

NUM_HEADS = 8
METHODS = ('mean', 'first', 'random', 'svd')
UPTRAINED = ('mean', 'svd')
CALIBRATED = ('svd',)
CONVERTED = (2, 1)
UPTRAIN = {NUM_HEADS: 'uptrain_mha', 2: 'uptrain_gqa2', 1: 'uptrain_mqa'}


def run(output_dir: str, jobs: int | None = None) -> int:
  """Runs what is not done yet, and prints the report.

  Args:
    output_dir: folder of checkpoints, logs, rows and the report.
    jobs: how many stages run at once; None: one a core.

  Returns:
    The exit code: 0, 1 after an error, 130 after Ctrl-C.
  """
  folder = pathlib.Path(output_dir)
  code = stages.run(plan(folder), folder, jobs)
  if not code:
    print((folder / 'report.md').read_text())
    print(f'Report: {folder}/report.md')
    print(f'TensorBoard: tensorboard --logdir={folder}')
  return code


@dataclasses.dataclass(frozen=True)
class Paths:
  """Where the checkpoints of the recipe are.

  Attributes:
    folder: all of them are below it.
  """

  folder: pathlib.Path

  @property
  def pretrain_steps(self) -> int:
    return macro('gin/local/pretrain_mha.gin', 'TRAIN_STEPS')

  @property
  def last_step(self) -> int:
    return macro('gin/local/uptrain_gqa2.gin', 'TRAIN_STEPS')

  @property
  def mha(self) -> pathlib.Path:
    return self.folder / 'mha' / f'checkpoint_{self.pretrain_steps}'

  @property
  def statistics(self) -> pathlib.Path:
    return self.folder / 'mha' / f'{self.mha.name}.statistics.npz'

  def converted(self, method: str, num_kv_heads: int) -> pathlib.Path:
    """The checkpoint right after conversion; for all heads, the one pre-trained."""
    if num_kv_heads == NUM_HEADS:
      return self.mha
    return self.folder / 'converted' / f'{method}_{num_kv_heads}' / self.mha.name

  def uptrained(self, method: str, num_kv_heads: int) -> pathlib.Path:
    """The checkpoint after uptraining; the gin files' folders are those of mean."""
    suffix = '' if method in ('mean', 'none') else f'_{method}'
    name = f'{UPTRAIN[num_kv_heads]}{suffix}'
    return self.folder / name / f'checkpoint_{self.last_step}'


def plan(folder: pathlib.Path) -> list[Stage]:
  """Lists the stages of the recipe; results go below the folder."""
  paths = Paths(folder)
  result = [
    Stage(
      f'pre-train MHA, {paths.pretrain_steps} steps',
      paths.mha,
      commands.train('gin/local/pretrain_mha.gin', MODEL_DIR=paths.mha.parent),
      work=paths.pretrain_steps,
    ),
    Stage(
      'collect statistics for svd',
      paths.statistics,
      commands.calibrate(paths.mha, paths.statistics),
      needs=(paths.mha,),
    ),
  ]
  result += [_convert_stage(paths, m, k) for m in METHODS for k in CONVERTED]
  result.append(_uptrain_stage(paths, 'none', NUM_HEADS))
  result += [_uptrain_stage(paths, m, k) for m in UPTRAINED for k in CONVERTED]
  rows = folder / 'rows.json'
  # Decoding is timed here: it waits for all others, so nothing runs beside it.
  result.append(
    Stage(
      'evaluate on the validation split, time decoding',
      rows,
      commands.reproduce('evaluate', 'uptrain', output_dir=folder),
      needs=tuple(stage.result for stage in result),
    )
  )
  result.append(
    Stage(
      'report',
      folder / 'report.md',
      commands.reproduce('report', 'uptrain', output_dir=folder),
      needs=(rows,),
    )
  )
  return result


def evaluate_models(output_dir: str) -> int:
  """Evaluates every checkpoint of the recipe and writes `rows.json`.

  Args:
    output_dir: folder of the checkpoints.

  Returns:
    The exit code.
  """
  paths = Paths(pathlib.Path(output_dir))
  arms = {('none', NUM_HEADS, 0): paths.mha}
  for method in METHODS:
    for num_kv_heads in CONVERTED:
      arms[method, num_kv_heads, 0] = paths.converted(method, num_kv_heads)
  steps = paths.last_step - paths.pretrain_steps
  arms['none', NUM_HEADS, steps] = paths.uptrained('none', NUM_HEADS)
  for method in UPTRAINED:
    for num_kv_heads in CONVERTED:
      arms[method, num_kv_heads, steps] = paths.uptrained(method, num_kv_heads)
  evaluate.write_rows(arms, paths.pretrain_steps, paths.folder / 'rows.json')
  return 0


def write_report(output_dir: str) -> int:
  """Writes `report.md` and its figure from `rows.json`; returns the exit code.

  Args:
    output_dir: folder of both.
  """
  folder = pathlib.Path(output_dir)
  uptrain_report.write(folder / 'rows.json', folder)
  return 0


def _convert_stage(paths: Paths, method: str, num_kv_heads: int) -> Stage:
  result = paths.converted(method, num_kv_heads)
  statistics = paths.statistics if method in CALIBRATED else None
  return Stage(
    f'convert to {num_kv_heads} K/V heads by {method}',
    result,
    commands.convert(
      paths.mha, result, num_kv_heads, method=method, statistics=statistics
    ),
    needs=(paths.mha, statistics) if statistics else (paths.mha,),
  )


def _uptrain_stage(paths: Paths, method: str, num_kv_heads: int) -> Stage:
  source = paths.converted(method, num_kv_heads)
  result = paths.uptrained(method, num_kv_heads)
  steps = paths.last_step - paths.pretrain_steps
  origin = '' if method == 'none' else f' by {method}'
  return Stage(
    f'uptrain with {num_kv_heads} K/V heads{origin}, {steps} steps',
    result,
    commands.train(
      f'gin/local/{UPTRAIN[num_kv_heads]}.gin',
      MODEL_DIR=result.parent,
      INITIAL_CHECKPOINT_PATH=source,
    ),
    needs=(source,),
    work=steps,
  )
