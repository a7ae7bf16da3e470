"""What attention of the decoder is worth: the loss with all of a kind set to zero."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gqa_t5x.reproduce.results.rows import Row

MODULES = {'self': 'self_attention', 'cross': 'encoder_decoder_attention'}


def rows(params: Any, loss: Callable[[Any], float]) -> Iterator[Row]:
  """Judges a model without self-attention, and without cross-attention.

  Args:
    params: of the whole model.
    loss: what parameters lose, nats per target token.

  Yields:
    `zeroed`, the kind; `validation_loss` without it, and `excess_loss` over all.
  """
  base = loss(params)
  for kind, module in MODULES.items():
    decoder = dict(params['decoder'])
    for name, layer in decoder.items():
      if name.startswith('layers_'):
        out = {'kernel': np.zeros_like(layer[module]['out']['kernel'])}
        decoder[name] = {**layer, module: {**layer[module], 'out': out}}
    without = loss({**params, 'decoder': decoder})
    yield {
      'zeroed': kind,
      'validation_loss': without,
      'excess_loss': without - base,
    }
