"""The commands of an experiment's stages, as a user types them."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from gqa_t5x import gin_search_path

# Warnings alone: the trainer shows its progress, and log lines would tear its bar.
QUIET = '--verbosity=-1'


def module(name: str, /, *words: str, **flags: Any) -> tuple[str, ...]:
  """Returns arguments of Python for `-m name`: words, then flags.

  Args:
    name: the module.
    *words: as they are.
    **flags: None leaves a flag out, True is a switch.
  """
  given = (
    f'--{flag}' if value is True else f'--{flag}={value}'
    for flag, value in flags.items()
    if value is not None
  )
  return ('-m', name, *words, *given)


def engine(
  name: str, /, gin_files: Sequence[str], flags: Sequence[str] = (), **macros: Any
) -> tuple[str, ...]:
  """Returns arguments of Python for a module that gin files configure.

  Args:
    name: the module.
    gin_files: paths below the gin search path.
    flags: as they are.
    **macros: values for the files' macros; a path stands for its text.
  """
  words, search_path = [f'--gin_file={file}' for file in gin_files], gin_search_path()
  if pathlib.Path(search_path) != pathlib.Path.cwd():  # Where gin finds them.
    words.append(f'--gin_search_paths={search_path}')
  values = {
    f'gin.{macro}': repr(os.fspath(x) if isinstance(x, os.PathLike) else x)
    for macro, x in macros.items()
  }
  return module(name, *words, *flags, **values)
