"""Int8 of a model in memory: what it becomes, and what it cannot do any more."""

import dataclasses
from typing import Any

from gqa_t5x.errors import BadInput
from gqa_t5x.model import network, quantize


def quantized(
  cfg: network.T5Config, params: Any, what: str
) -> tuple[network.T5Config, Any]:
  """Returns configuration and parameters as of `Model.quantize`, which says more."""
  if what not in quantize.QUANTIZATIONS:
    known = ', '.join(quantize.QUANTIZATIONS)
    raise BadInput(f'quantize={what!r} is unknown; choose one of {known}')
  if not quantize.of_weights(what):
    check_float(params, f'quantize={what!r}')
  return dataclasses.replace(cfg, quantize=what), quantize.prepared(params, what)


def check_float(params: Any, action: str) -> None:
  """Raises BadInput for int8 weights where an action needs those they were made of."""
  if quantize.are_int8(params):
    raise BadInput(
      f'{action} needs weights in float, and those of this model are int8; use the'
      ' model that it was made from'
    )
