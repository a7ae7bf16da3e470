"""Reads plain values from gin files, so that no number of a run stands twice."""

import ast
import pathlib
import re
from typing import Any

import gqa_t5x


def macro(gin_file: str, name: str) -> Any:
  """Returns the value of a macro that a gin file itself sets.

  Parsing the file with gin would need T5X's script as `__main__`.

  Args:
    gin_file: path below the gin search path, e.g. 'gin/local/pretrain_mha.gin'.
    name: the macro, e.g. 'TRAIN_STEPS'.

  Returns:
    The literal: number, string, list or dict.

  Raises:
    ValueError: if the file does not set it.
  """
  text = (pathlib.Path(gqa_t5x.gin_search_path()) / gin_file).read_text()
  values = re.findall(rf'^{name} = (.*?)(?: +#.*)?$', text, flags=re.MULTILINE)
  if not values:
    raise ValueError(f'{gin_file} does not set {name}.')
  return ast.literal_eval(values[-1])
