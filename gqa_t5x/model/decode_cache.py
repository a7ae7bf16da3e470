"""The decode cache of one attention layer, as pure functions.

Keys are kept at K heads as `[B, K, H, S]` and values as `[B, K, S, H]`: batch first, as
T5X's beam search needs it, and so that both products of a decode step read rows. A
write touches the new positions only.

The beams of an input share its cache: position s has one slot a beam, s * beams + beam,
and `slots` says in whose slot each beam finds its past. When beams are reordered only
that small table changes, never keys and values:

  slots[b, i, s]   the beam whose slot at position s holds the past of beam i of input b
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# The axis of S in what `cache` and `encoded_kv` hold.
LENGTH_AXIS = {'cached_key': 3, 'cached_value': 2}


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


def causal_mask(positions_BT: Array, positions_S: Array) -> Array:
  """Returns which keys each new token may see: its own and those before.

  Args:
    positions_BT: of new tokens, int32 `[B, T]` (or `[1, T]`) from `query_positions`.
    positions_S: of the keys, int32 `[S]`.

  Returns:
    bool `[B, 1, T, S]` (or `[1, 1, T, S]`).
  """
  return positions_BT[:, None, :, None] >= positions_S


def write(cache: Array, new: Array, index: Array, axis: int) -> Array:
  """Returns the cache with new positions written at `index`, in place under jit.

  Args:
    cache: keys or values so far, `[B, K, H, S]` or `[B, K, S, H]`.
    new: keys or values of the new tokens, T instead of S.
    index: where they go, as in `query_positions`.
    axis: that of S.

  Returns:
    The cache, of the same shape.
  """
  new = new.astype(cache.dtype)
  if index.ndim == 0:
    return lax.dynamic_update_slice_in_dim(cache, new, index, axis)

  def write_row(cache, new, i):
    return lax.dynamic_update_slice_in_dim(cache, new, i, axis - 1)

  return jax.vmap(write_row)(cache, new, jnp.reshape(index, -1))


def repeat_rows(cache: Mapping[str, Any], repeats: int) -> dict[str, Any]:
  """Returns an empty cache with a row of its own for each decode of an input.

  Args:
    cache: the empty `cache` collection of a `network.Transformer`.
    repeats: decodes of each input; they will be neighbours.
  """
  return jax.tree.map(
    lambda x: jnp.repeat(x, repeats, axis=0) if x.ndim == 4 else x, dict(cache)
  )


def with_beams(cache: Mapping[str, Any], num_beams: int) -> dict[str, Any]:
  """Returns an empty cache with a slot for every beam at every position.

  Args:
    cache: the empty `cache` collection of a `network.Transformer`.
    num_beams: beams of each input.

  Returns:
    The collection: keys `[B, K, H, S * beams]`, values `[B, K, S * beams, H]`, and
    `decoder/slots`.
  """

  def widen(path, leaf):
    if leaf.ndim < 4:
      return leaf
    shape = list(leaf.shape)
    shape[LENGTH_AXIS[path[-1].key]] *= num_beams
    return jnp.zeros(shape, leaf.dtype)

  leaves = jax.tree_util.tree_leaves_with_path(cache['decoder'])
  path, leaf = next((path, leaf) for path, leaf in leaves if leaf.ndim == 4)
  B, S = leaf.shape[0], leaf.shape[LENGTH_AXIS[path[-1].key]]
  decoder = jax.tree_util.tree_map_with_path(widen, dict(cache['decoder']))
  return {**cache, 'decoder': {**decoder, 'slots': _own_slots(B, num_beams, S)}}


def _own_slots(B: int, num_beams: int, length: int) -> Array:
  own = jnp.arange(num_beams, dtype=jnp.int32)[:, None]
  return jnp.broadcast_to(own, (B, num_beams, length))


def reorder(cache: Mapping[str, Any], origin_Bn: Array) -> dict[str, Any]:
  """Returns the cache after each beam goes on from the past of another.

  Args:
    cache: from `with_beams`, or a later step.
    origin_Bn: the beam whose past each beam takes over, int32 `[B, beams]`.

  Returns:
    The cache; keys and values are the same arrays.
  """
  decoder = cache['decoder']
  slots = jnp.take_along_axis(decoder['slots'], origin_Bn[:, :, None], axis=1)
  written = jnp.arange(slots.shape[2]) < decoder['cache_index']
  slots = jnp.where(written, slots, _own_slots(*slots.shape))
  return {**cache, 'decoder': {**decoder, 'slots': slots}}


def beam_mask(slots_BnS: Array, positions_11: Array, positions_S: Array) -> Array:
  """Returns which slots each beam may see: those of its own past, and its new one.

  Args:
    slots_BnS: the table of slots.
    positions_11: of the new token, int32 `[1, 1]`.
    positions_S: of the keys, int32 `[S]`.

  Returns:
    bool `[B, 1, beams, S * beams]`.
  """
  B, num_beams, _ = slots_BnS.shape
  slots_BnS = jnp.take(slots_BnS, positions_S, axis=2, mode='clip')
  own = slots_BnS[..., None] == jnp.arange(num_beams)
  mask = own & (positions_S <= positions_11[0])[:, None]
  return mask.reshape(B, 1, num_beams, -1)
