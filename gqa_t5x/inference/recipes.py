"""What `Model.convert` is given, checked before anything is run."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gqa_t5x.conversion import methods, plan
from gqa_t5x.errors import BadInput

_WHOLE = int | np.integer | None


def uses_statistics(recipe: Mapping[str, Any]) -> bool:
  """Whether method or grouping ask for statistics; BadInput for an unknown method."""
  by_method = methods.get_method(recipe['method']).uses_inputs
  return by_method or recipe.get('grouping') == 'similarity'


def check(recipe: Mapping[str, Any], texts: Any, refit_outputs: bool) -> None:
  """Raises BadInput for what contradicts itself.

  Args:
    recipe: fields of a `plan.Recipe`.
    texts: None, or those to convert by.
    refit_outputs: whether outputs are refitted to them.
  """
  if unknown := sorted(recipe.keys() - plan.Recipe.__dataclass_fields__.keys()):
    raise BadInput(f'convert knows no {", ".join(unknown)}; see its docstring')
  if all(v is None for name, v in recipe.items() if name.endswith('kv_heads')):
    raise BadInput('num_kv_heads is missing')
  for name, value in recipe.items():
    if name.endswith(('kv_heads', 'head_dim')) and not isinstance(value, _WHOLE):
      raise BadInput(f'{name}={value!r} must be a whole number')
  if texts is not None and recipe.get('statistics'):
    raise BadInput('texts and statistics were given; leave one of them out')
  if refit_outputs and texts is None:
    raise BadInput('refit_outputs needs texts, and none were given')
  if texts is not None and not uses_statistics(recipe) and not refit_outputs:
    raise BadInput(
      f'texts were given, and method={recipe["method"]!r} uses none; leave them out'
    )
