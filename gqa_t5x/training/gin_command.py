"""Gin on the command line, for commands of this project that gin sets up."""

from collections.abc import Sequence

from t5x import gin_utils

import gqa_t5x
from gqa_t5x.command_line import Command
from gqa_t5x.errors import BadInput


def gin_flags(command: Command) -> None:
  """Defines T5X's three flags of gin, and `--gin.NAME=VALUE`, short for a binding."""
  command.texts(
    'gin_file', [], 'A gin file. May be repeated; later files override earlier ones.'
  )
  command.texts(
    'gin_bindings',
    [],
    'NAME = VALUE, applied after the files; --gin.NAME=VALUE is short for it.',
  )
  command.words(
    'gin_search_paths', ['.'], 'Comma-separated folders that hold the gin files.'
  )
  command.rewrite = _rewrite


def parse(
  files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> None:
  """Parses what the flags give, and locks the configuration.

  Raises:
    ValueError: from gin.
    OSError: a file is not there.
  """
  folders = [*search_paths, gqa_t5x.gin_search_path()]
  gin_utils.parse_gin_flags(folders, files, bindings)


def _rewrite(argv: Sequence[str]) -> list[str]:
  try:
    return list(gin_utils.rewrite_gin_args(argv))
  except ValueError as error:
    raise BadInput(str(error)) from error
