"""Reads plain values from gin files, so that no number of a run stands twice."""

import ast
import pathlib
import re
from typing import Any

import gqa_t5x


def macro(gin_file: str, name: str) -> Any:
  """Returns the value of a macro that a gin file, or one that it includes, sets.

  Parsing the file with gin would need T5X's script as `__main__`.

  Args:
    gin_file: path below the gin search path, e.g. 'gin/local/pretrain_mha.gin'.
    name: the macro, e.g. 'TRAIN_STEPS'.

  Returns:
    The literal: number, string, list or dict. As in gin, the last one counts;
    includes come before what the file itself sets.

  Raises:
    ValueError: if no file sets it.
  """
  values = _values(gin_file, name)
  if not values:
    raise ValueError(f'{gin_file} does not set {name}.')
  return ast.literal_eval(values[-1])


def _values(gin_file: str, name: str) -> list[str]:
  """What the files assign to a macro, in order."""
  text = (pathlib.Path(gqa_t5x.gin_search_path()) / gin_file).read_text()
  included = re.findall(r"^include '(.+)'", text, flags=re.MULTILINE)
  own = re.findall(rf'^{name} = (.*?)(?: +#.*)?$', text, flags=re.MULTILINE)
  return [value for file in included for value in _values(file, name)] + own
