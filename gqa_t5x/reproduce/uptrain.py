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
UPTRAIN = {NUM_HEADS: 'uptrain_mha', 2: 'uptrain_gqa2', 1: 'uptrain_mqa'}


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
        stage.run(folder / 'logs' / f'{stage.result.name}.log')
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


def plan(folder: pathlib.Path) -> list[Stage]:
  """Lists the stages of the recipe.

  Args:
    folder: where results go.

  Returns:
    The stages in order.
  """
  pretrain_steps = macro('gin/local/pretrain_mha.gin', 'TRAIN_STEPS')
  last_step = macro('gin/local/uptrain_gqa2.gin', 'TRAIN_STEPS')
  uptrain_steps = last_step - pretrain_steps
  mha = folder / 'mha' / f'checkpoint_{pretrain_steps}'
  stages = [
    Stage(
      f'pre-train MHA, {pretrain_steps} steps',
      mha,
      lambda log: _train('pretrain_mha', folder / 'mha', log),
    )
  ]
  arms = {('none', NUM_HEADS, 0): mha}
  for method in METHODS:
    for num_kv_heads in (2, 1):
      converted = folder / 'converted' / f'{method}_{num_kv_heads}'
      arms[method, num_kv_heads, 0] = converted / mha.name
      stages.append(_convert_stage(mha, converted, method, num_kv_heads))
  for num_kv_heads, name in UPTRAIN.items():
    method = 'none' if num_kv_heads == NUM_HEADS else 'mean'
    source = arms[method, num_kv_heads, 0]
    model_dir = folder / name
    result = model_dir / f'checkpoint_{last_step}'
    arms[method, num_kv_heads, uptrain_steps] = result
    stages.append(
      Stage(
        f'uptrain with {num_kv_heads} K/V heads, {uptrain_steps} steps',
        result,
        lambda log, name=name, model_dir=model_dir, source=source: _train(
          name, model_dir, log, INITIAL_CHECKPOINT_PATH=source
        ),
      )
    )
  rows = folder / 'rows.json'
  stages.append(
    Stage(
      'evaluate on the validation split, time decoding',
      rows,
      lambda log: evaluate.write_rows(arms, pretrain_steps, rows),
    )
  )
  stages.append(
    Stage('report', folder / 'report.md', lambda log: report.write(rows, folder))
  )
  return stages


def _convert_stage(mha, converted, method, num_kv_heads) -> Stage:
  return Stage(
    f'convert to {num_kv_heads} K/V heads by {method}',
    converted / mha.name,
    lambda log: _command(
      'gqa_t5x.convert',
      log,
      input=mha,
      output=converted,
      num_kv_heads=num_kv_heads,
      method=method,
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


def _command(module: str, log: pathlib.Path, **flags) -> None:
  """Runs `python -m module --flags`; shows its progress bars, logs everything else."""
  command = [sys.executable, '-m', module, *(f'--{k}={v}' for k, v in flags.items())]
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
