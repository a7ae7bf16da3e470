"""The commands of an experiment's stages, as a user types them."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import gqa_t5x

# Warnings alone: the trainer shows its progress, and log lines would tear its bar.
QUIET = '--verbosity=-1'


def engine(
  module: str, gin_files: Sequence[str], flags: Sequence[str] = (), **macros: Any
) -> tuple[str, ...]:
  """Arguments of Python for a command of the engine.

  Args:
    module: 't5x.train', 't5x.eval', 't5x.infer' or 'gqa_t5x.calibrate'.
    gin_files: paths below the gin search path.
    flags: further flags.
    **macros: values for the files' macros; a path stands for its text.
  """
  search_path = gqa_t5x.gin_search_path()
  in_checkout = pathlib.Path(search_path) == pathlib.Path.cwd()
  values = {
    name: os.fspath(value) if isinstance(value, os.PathLike) else value
    for name, value in macros.items()
  }
  return (
    '-m',
    module,
    *(f'--gin_file={file}' for file in gin_files),
    *(() if in_checkout else (f'--gin_search_paths={search_path}',)),
    *flags,
    *(f'--gin.{name}={value!r}' for name, value in values.items()),
  )


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
