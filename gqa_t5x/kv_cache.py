"""The decode cache of one attention layer, as pure functions.

Keys and values are kept at K heads as `[B, K, S, H]`: batch first, as T5X's beam
search needs it, and each head's positions contiguous, so that a decode step is a
plain batched matrix product over them. A write touches the new positions only.
"""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def query_positions(index: Array, length: int) -> Array:
  """Returns the positions of `length` new tokens.

  Args:
    index: number of tokens already cached, int32; `()` for all rows alike, or one
      number a row in any shape (`[B]`; T5X's beam search has `[B, beam]`).
    length: T, number of new tokens.

  Returns:
    int32 `[1, T]`, or `[B, T]` if the rows differ.
  """
  return jnp.reshape(index, (-1, 1)) + jnp.arange(length, dtype=jnp.int32)


def causal_mask(positions_BT: Array, cache_length: int) -> Array:
  """Returns which cached positions each new token may see: itself and those before.

  Args:
    positions_BT: int32 `[B, T]` (or `[1, T]`) from `query_positions`.
    cache_length: S.

  Returns:
    bool `[B, 1, T, S]` (or `[1, 1, T, S]`).
  """
  return positions_BT[:, None, :, None] >= jnp.arange(cache_length)


def write(cache_BKSH: Array, new_BKTH: Array, index: Array) -> Array:
  """Returns the cache with new positions written at `index`, in place under jit.

  Args:
    cache_BKSH: keys or values so far.
    new_BKTH: keys or values of the new tokens.
    index: where they go, as in `query_positions`.

  Returns:
    `[B, K, S, H]`.
  """
  new_BKTH = new_BKTH.astype(cache_BKSH.dtype)
  if index.ndim == 0:
    return lax.dynamic_update_slice_in_dim(cache_BKSH, new_BKTH, index, axis=2)

  def write_row(cache_KSH, new_KTH, i):
    return lax.dynamic_update_slice_in_dim(cache_KSH, new_KTH, i, axis=1)

  return jax.vmap(write_row)(cache_BKSH, new_BKTH, jnp.reshape(index, -1))
