"""The paper's recipe in miniature, through the commands that a user types.

Pre-train (MHA), convert (mean, first, random), uptrain (mean), evaluate, report.
Every stage writes what it makes under a temporary name first, so a stage whose
result exists is done; a stage that was cut short is run again, and T5X goes on from
its last checkpoint.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import TextIO

import gqa_t5x
from gqa_t5x.reproduce import evaluate, report
from gqa_t5x.reproduce.gin_macros import macro

NUM_HEADS = 8
METHODS = ('mean', 'first', 'random')
CONVERTED = (2, 1)
UPTRAIN = {NUM_HEADS: 'uptrain_mha', 2: 'uptrain_gqa2', 1: 'uptrain_mqa'}
EVALUATE = ('evaluate', 'uptrain')


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of the recipe.

  Attributes:
    title: what it does.
    result: the file or folder that it leaves.
    run: makes the result, given the log file.
  """

  title: str
  result: pathlib.Path
  run: Callable[[pathlib.Path], None]


class StageFailed(Exception):
  """A command of a stage failed; the message names it and its log."""


def run(output_dir: str) -> int:
  """Runs what is not done yet, and prints the report.

  Args:
    output_dir: folder of checkpoints, logs, rows and the report.

  Returns:
    The exit code: 0, 1 after an error, 130 after Ctrl-C.
  """
  folder = pathlib.Path(output_dir)
  stages = plan(folder)
  (folder / 'logs').mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  try:
    for i, stage in enumerate(stages, 1):
      done = stage.result.exists()
      print(f'[{i}/{len(stages)}] {stage.title}{": done" if done else ""}', flush=True)
      if not done:
        tick = time.monotonic()
        stage.run(folder / 'logs' / f'{i:02d}.log')
        print(f'      {time.monotonic() - tick:.0f} s', flush=True)
  except StageFailed as error:
    print(error, file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('\nStopped. Run the same command again to go on from here.', file=sys.stderr)
    return 130
  print((folder / 'report.md').read_text())
  print(f'Done in {time.monotonic() - start:.0f} s. Report: {folder}/report.md')
  print(f'TensorBoard: tensorboard --logdir={folder}')
  return 0


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

  def converted(self, method: str, num_kv_heads: int) -> pathlib.Path:
    """The checkpoint right after conversion; for all heads, the one pre-trained."""
    if num_kv_heads == NUM_HEADS:
      return self.mha
    return self.folder / 'converted' / f'{method}_{num_kv_heads}' / self.mha.name

  def uptrained(self, num_kv_heads: int) -> pathlib.Path:
    return self.folder / UPTRAIN[num_kv_heads] / f'checkpoint_{self.last_step}'


def plan(folder: pathlib.Path) -> list[Stage]:
  """Lists the stages of the recipe in order; results go below the folder."""
  paths = Paths(folder)
  stages = [
    Stage(
      f'pre-train MHA, {paths.pretrain_steps} steps',
      paths.mha,
      lambda log: _train('pretrain_mha', paths.mha.parent, log),
    )
  ]
  for method in METHODS:
    for num_kv_heads in CONVERTED:
      stages.append(_convert_stage(paths, method, num_kv_heads))
  for num_kv_heads in UPTRAIN:
    stages.append(_uptrain_stage(paths, num_kv_heads))
  rows = folder / 'rows.json'
  stages.append(
    Stage(
      'evaluate on the validation split, time decoding',
      rows,
      lambda log: _command(
        'gqa_t5x.reproduce', log, *EVALUATE, output_dir=folder, verbosity=-1
      ),
    )
  )
  stages.append(
    Stage('report', folder / 'report.md', lambda log: report.write(rows, folder))
  )
  return stages


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
  for num_kv_heads in UPTRAIN:
    method = 'none' if num_kv_heads == NUM_HEADS else 'mean'
    steps = paths.last_step - paths.pretrain_steps
    arms[method, num_kv_heads, steps] = paths.uptrained(num_kv_heads)
  evaluate.write_rows(arms, paths.pretrain_steps, paths.folder / 'rows.json')
  return 0


def _convert_stage(paths: Paths, method: str, num_kv_heads: int) -> Stage:
  result = paths.converted(method, num_kv_heads)
  return Stage(
    f'convert to {num_kv_heads} K/V heads by {method}',
    result,
    lambda log: _command(
      'gqa_t5x.convert',
      log,
      input=paths.mha,
      output=result.parent,
      num_kv_heads=num_kv_heads,
      method=method,
    ),
  )


def _uptrain_stage(paths: Paths, num_kv_heads: int) -> Stage:
  result = paths.uptrained(num_kv_heads)
  steps = paths.last_step - paths.pretrain_steps
  return Stage(
    f'uptrain with {num_kv_heads} K/V heads, {steps} steps',
    result,
    lambda log: _train(
      UPTRAIN[num_kv_heads],
      result.parent,
      log,
      INITIAL_CHECKPOINT_PATH=paths.converted('mean', num_kv_heads),
    ),
  )


def _train(name: str, model_dir: pathlib.Path, log: pathlib.Path, **macros) -> None:
  macros = {'MODEL_DIR': model_dir, **macros}
  _command(
    't5x.train',
    log,
    gin_file=f'gin/local/{name}.gin',
    gin_search_paths=gqa_t5x.gin_search_path(),
    verbosity=-1,  # Warnings; progress comes from the trainer.
    **{f'gin.{macro}': f'"{value}"' for macro, value in macros.items()},
  )


def _command(module: str, log: pathlib.Path, *words: str, **flags) -> None:
  """Runs `python -m module --flags`; shows its progress bars, logs everything else."""
  command = [sys.executable, '-m', module, *words]
  command += [f'--{k}={v}' for k, v in flags.items()]
  env = {**os.environ, 'TQDM_MININTERVAL': '1'}
  with log.open('w') as out:
    print(' '.join(command), file=out, flush=True)
    process = subprocess.Popen(
      command, stdout=out, stderr=subprocess.PIPE, env=env, text=True, bufsize=1
    )
    try:
      _pass_progress(process.stderr, out)
    finally:
      process.terminate()
      code = process.wait()
  if code:
    end = '\n'.join(log.read_text().splitlines()[-12:])
    raise StageFailed(
      f'{end}\n\nThis command failed with exit code {code}; its whole log is {log}:\n'
      f'  {" ".join(command)}'
    )


def _pass_progress(lines: Iterable[str], log: TextIO) -> None:
  """Sends progress bars to the terminal and all other lines to the log.

  Universal newlines have made each redraw of a bar, which ends in a carriage return,
  a line of its own.
  """
  bar = ''
  for line in lines:
    if '%|' in line:
      bar = f'      {line.rstrip()}'
      print(f'\r{bar}', end='', file=sys.stderr, flush=True)
    else:
      log.write(line)
      log.flush()
  if bar:
    print(file=sys.stderr)
