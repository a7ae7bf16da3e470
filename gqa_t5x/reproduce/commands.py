"""The commands of an experiment's stages, as a user types them."""

import pathlib
from typing import Any

import gqa_t5x

CALIBRATE = 'gin/local/calibrate.gin'


def train(gin_file: str, **macros: Any) -> tuple[str, ...]:
  """Arguments of Python for a training run.

  Args:
    gin_file: path below the gin search path.
    **macros: values for the file's macros; a path stands for its text.
  """
  return _engine('t5x.train', gin_file, macros)


def calibrate(
  checkpoint: pathlib.Path, output: pathlib.Path, **macros: Any
) -> tuple[str, ...]:
  """Arguments of Python that make a checkpoint's statistics.

  Args:
    checkpoint: the checkpoint.
    output: the file of statistics.
    **macros: values for other macros of gin/local/calibrate.gin.
  """
  macros = {'CHECKPOINT_PATH': checkpoint, 'OUTPUT': output, **macros}
  return _engine('gqa_t5x.calibrate', CALIBRATE, macros)


def convert(
  checkpoint: pathlib.Path, result: pathlib.Path, num_kv_heads: int, **flags: Any
) -> tuple[str, ...]:
  """Arguments of Python for a conversion.

  Args:
    checkpoint: the MHA checkpoint.
    result: the converted one, of the same step.
    num_kv_heads: K.
    **flags: further flags; None leaves one out.
  """
  flags = {
    'input': checkpoint,
    'output': result.parent,
    'num_kv_heads': num_kv_heads,
    **flags,
  }
  given = (f'--{name}={value}' for name, value in flags.items() if value is not None)
  return ('-m', 'gqa_t5x.convert', *given)


def reproduce(*words: str, **flags: Any) -> tuple[str, ...]:
  """Arguments of Python for `gqa_t5x.reproduce`: words, then flags."""
  given = (f'--{name}={value}' for name, value in flags.items())
  return ('-m', 'gqa_t5x.reproduce', *words, *given)


def _engine(module: str, gin_file: str, macros: dict[str, Any]) -> tuple[str, ...]:
  values = {
    name: str(value) if isinstance(value, pathlib.Path) else value
    for name, value in macros.items()
  }
  return (
    '-m',
    module,
    f'--gin_file={gin_file}',
    f'--gin_search_paths={gqa_t5x.gin_search_path()}',
    '--verbosity=-1',  # Warnings; the trainer shows its progress.
    *(f'--gin.{name}={value!r}' for name, value in values.items()),
  )
