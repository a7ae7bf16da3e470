"""The models that are looked at: by size, heads and type, as shapes alone."""

from typing import Any

import jax
import jax.numpy as jnp

from gqa_t5x.errors import BadInput
from gqa_t5x.model import network

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def config(size: str, num_kv_heads: int | None, dtype: str) -> network.T5Config:
  """Returns a model's configuration.

  Args:
    size: a key of sizes.SIZES.
    num_kv_heads: K of decoder self- and cross-attention; None: the size's, or MHA.
    dtype: of activations, a key of DTYPES.

  Raises:
    BadInput: heads that do not divide.
  """
  try:
    return network.config(size, num_kv_heads=num_kv_heads, dtype=DTYPES[dtype])
  except ValueError as error:
    raise BadInput(f'size={size}: {error}') from error


def variable_shapes(cfg: network.T5Config) -> dict[str, Any]:
  """Returns the shapes of a model's `params`, and their logical axes, `params_axes`."""
  tokens = jnp.ones((1, 1), jnp.int32)
  return jax.eval_shape(
    lambda: network.Transformer(cfg).init(
      jax.random.PRNGKey(0), tokens, tokens, tokens, enable_dropout=False
    )
  )
