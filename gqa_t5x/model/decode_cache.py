"""The decode cache: its variables, their layouts, and all that is done to them.

In the collection `cache`, for each layer of self-attention:

  cached_key     [B, K, R, S * n]  so that both products of a decode step read rows;
  cached_value   [B, K, S * n, R]  position s has one slot a beam, s * n + beam
  pending_key    [P, B, n, K, R]   the latest positions, not yet in the cache; only
  pending_value  [P, B, n, K, R]   on a TPU

  cached_key_scale     [B, K, 1, S * n]   where these are int8 (quantize.py); and
  cached_value_scale   [B, K, 1, S * n]   pending ones, `[P, B, n, K, 1]`

and once, for the decoder:

  cache_index        ()         positions decoded so far; `[B * n]` or `[B, n]` where
                                rows differ
  slots              [B, n, S]  whose slot at position s holds the past of beam i
  pending_positions  [P]        which positions are pending

  B batch   n beams   S positions   P pending ones   R size of a key/value head

The collection `encoded_kv` holds `cached_key` and `cached_value` of the encoded inputs
(and their scales) for each layer of cross-attention: they are computed once, for all
steps.

Beams of one input share its row. When they are reordered only the small table of slots
changes, never keys and values.

A TPU keeps memory in tiles of 128 positions and more: to write one of them it reads and
writes the whole tile, and where a cache is read and written in one step, XLA copies all
of it on the chip and back. So there a step only reads the cache. It writes to arrays
whose first axis is the position, and every few steps `flush` moves those to the cache.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from gqa_t5x.model import axes, quantize, sharding
from gqa_t5x.model.quantize import Int8

CACHE, ENCODED_KV = 'cache', 'encoded_kv'
MAX_PENDING = 16  # Most positions that are pending.
UNREACHED = 2**30  # A position that no token reaches.


class _Kind(NamedTuple):
  """How keys, or values, or their scales, are cached."""

  cached: str  # Names of variables.
  pending: str
  axis: int  # That of S, of 4.
  to_pending: str  # From new positions to a pending one, and from there to the cache.
  to_cached: str


_KEYS = 3, 'BKRn->BnKR', 'PBnKR->BKRPn'
# Scales have the layout of keys; they come last, for there may be none.
_KINDS = (
  _Kind('cached_key', 'pending_key', *_KEYS),
  _Kind('cached_value', 'pending_value', 2, 'BKnR->BnKR', 'PBnKR->BKPnR'),
  _Kind('cached_key_scale', 'pending_key_scale', *_KEYS),
  _Kind('cached_value_scale', 'pending_value_scale', *_KEYS),
)

# --- For attention ------------------------------------------------------------


class KeysAndValues(NamedTuple):
  """What the queries of a call attend to."""

  k_BKRS: Array | Int8
  v_BKSR: Array | Int8
  pending: Sequence[Array | Int8] | None = None  # Those of P more positions.
  kept: bool = True  # Whether decoding keeps these arrays: queries go where they lie.


def keys_and_values(
  layer: nn.Module,
  inputs_kv: Array,
  project: Callable[[Array], tuple[Array, Array]],
  index: Array | None,
) -> KeysAndValues:
  """Returns keys and values of a layer's inputs, and of those before them.

  Args:
    layer: a `GroupedQueryAttention`; its `int8_kv` says whether they are rounded.
    inputs_kv: `[B * n, T, D]`; not looked at once `encoded_kv` holds keys and values.
    project: from `[B, n * T, D]` to keys `[B, K, R, n * T]` and values
      `[B, K, n * T, R]`.
    index: of `Positions`: appends to the cache. None: there is no cache; keys and
      values are kept in `encoded_kv` if a caller makes that mutable.
  """
  if index is not None:
    return _append(layer, inputs_kv, project, index)
  if layer.has_variable(ENCODED_KV, 'cached_key'):
    return KeysAndValues(*_pair(_get(layer, ENCODED_KV)))
  keep = layer.is_mutable_collection(ENCODED_KV) and not layer.is_initializing()
  rows = axes.CACHE_BATCH if keep else axes.BATCH
  new = _new(layer, project(inputs_kv), rows)
  if keep:
    _put(layer, ENCODED_KV, new)
  return KeysAndValues(*_pair(new), kept=False)


def _append(layer, inputs_kv, project, index) -> KeysAndValues:
  if not layer.has_variable(CACHE, 'cached_key'):
    # T5X's first call, on tokens that are all ones: only shapes count.
    new = _new(layer, project(inputs_kv))
    _put(layer, CACHE, _shard(layer, [jnp.zeros_like(x) for x in new]))
    return KeysAndValues(*_pair(new))
  cached = _get(layer, CACHE)
  B, D = len(cached[0]), inputs_kv.shape[-1]
  new = _new(layer, project(inputs_kv.reshape(B, -1, D)))
  if layer.has_variable(CACHE, 'pending_key'):
    pending = [_put_pending(layer, kind, x, index) for kind, x in _by_kind(new)]
    return KeysAndValues(*_pair(cached), _pair(pending))
  index = index * (len(inputs_kv) // B)
  cached = [
    _write(old, x, index, kind.axis)
    for old, (kind, x) in zip(cached, _by_kind(new), strict=True)
  ]
  return KeysAndValues(*_pair(_put(layer, CACHE, _shard(layer, cached))))


def _new(
  layer: nn.Module, projected: Sequence[Array], rows: str = axes.CACHE_BATCH
) -> Sequence[Array]:
  """Returns new keys and values as they are kept, in the order of _KINDS."""
  if not layer.int8_kv:
    return _shard(layer, projected, rows)
  k_BKRS, v_BKSR = projected
  k, v = quantize.to_int8(k_BKRS, axis=2), quantize.to_int8(v_BKSR, axis=3)
  scales = k.scale, jnp.swapaxes(v.scale, 2, 3)
  return _shard(layer, [k.codes, v.codes, *scales], rows)


def _pair(arrays: Sequence[Array]) -> Sequence[Array | Int8]:
  """Returns keys and values of what is kept."""
  if len(arrays) == 2:
    return arrays
  return [Int8(*pair) for pair in zip(arrays[:2], arrays[2:], strict=True)]


def _put_pending(layer: nn.Module, kind: _Kind, new: Array, index: Array) -> Array:
  """Adds a position to the pending ones; returns all in the layout of the cache."""
  x_PBnKR = layer.get_variable(CACHE, kind.pending)
  new_BnKR = jnp.einsum(kind.to_pending, new)
  x_PBnKR = lax.dynamic_update_index_in_dim(x_PBnKR, new_BnKR, index, axis=0)
  kv_heads, _, _ = axes.kv_axes(layer.num_heads, layer.num_kv_heads)
  x_PBnKR = sharding.constrain(
    x_PBnKR, (None, axes.CACHE_BATCH, None, kv_heads, axes.HEAD_DIM)
  )
  layer.put_variable(CACHE, kind.pending, x_PBnKR)
  return _in_cache_layout(kind, x_PBnKR)


def _in_cache_layout(kind: _Kind, x_PBnKR: Array) -> Array:
  """Returns pending keys as `[B, K, R, P * n]`, or values as `[B, K, P * n, R]`."""
  return lax.collapse(jnp.einsum(kind.to_cached, x_PBnKR), kind.axis, kind.axis + 2)


def _write(cached: Array, new: Array, index: Array, axis: int) -> Array:
  """Writes along `axis` at `index`, `()` or one for each row; in place under jit."""
  if index.ndim == 0:
    return lax.dynamic_update_slice_in_dim(cached, new, index, axis)
  write_row = functools.partial(lax.dynamic_update_slice_in_dim, axis=axis - 1)
  return jax.vmap(write_row)(cached, new, jnp.reshape(index, -1))


def _get(layer: nn.Module, collection: str) -> list[Array]:
  kinds = _kinds(layer.variables[collection])
  return [layer.get_variable(collection, kind.cached) for kind in kinds]


def _kinds(variables: Mapping[str, Any]) -> list[_Kind]:
  """Returns what is cached in a layer."""
  return [kind for kind in _KINDS if kind.cached in variables]


def _by_kind(arrays: Sequence[Array]) -> list[tuple[_Kind, Array]]:
  return list(zip(_KINDS[: len(arrays)], arrays, strict=True))


def _put(layer: nn.Module, collection: str, arrays: Sequence[Array]) -> Sequence[Array]:
  for kind, x in _by_kind(arrays):
    layer.put_variable(collection, kind.cached, x)
  return arrays


def _shard(
  layer: nn.Module, arrays: Sequence[Array], rows: str = axes.CACHE_BATCH
) -> Sequence[Array]:
  """Shards what is kept; `rows` is the logical axis of B."""
  kv_heads, _, _ = axes.kv_axes(layer.num_heads, layer.num_kv_heads)
  last = {3: (axes.HEAD_DIM, axes.LENGTH), 2: (axes.LENGTH, axes.HEAD_DIM)}
  return [
    sharding.constrain(x, (rows, kv_heads, *last[kind.axis]))
    for kind, x in _by_kind(arrays)
  ]


# --- For the decoder ----------------------------------------------------------


class Positions(NamedTuple):
  """Where the tokens of a decoder's call stand, and which keys they may see."""

  queries_BT: Array  # Positions of the tokens, int32; `[1, T]` if all rows are alike.
  keys_S: Array  # Positions of the keys, cached ones, then pending ones, int32.
  mask: Array  # bool `[B or 1, 1, T, S]`
  index: Array | None = None  # Where attention writes, int32; None: there is no cache.
  slots_BnS: Array | None = None  # Where beams share the rows of the cache.

  def by_slot(self, bias: Array) -> tuple[Array, Array]:
    """Returns the mask and a bias `[.., S]` by the slots of attention's keys.

    A beam may see the slots of its own past, and its new one.
    """
    if self.slots_BnS is None:
      return self.mask, bias
    B, beams, _ = self.slots_BnS.shape
    slots_BnS = jnp.take(self.slots_BnS, self.keys_S, axis=2, mode='clip')
    own = slots_BnS[..., None] == jnp.arange(beams)
    mask = own & (self.keys_S <= self.queries_BT[0])[:, None]
    return mask.reshape(B, 1, beams, -1), jnp.repeat(bias, beams, axis=-1)


def advance(
  decoder: nn.Module,
  length: int,
  max_decode_length: int | None,
  prefill_lengths: Array | None,
) -> Positions:
  """Counts the tokens of a call, and returns their positions.

  Args:
    decoder: a `network.Decoder`.
    length: T.
    max_decode_length: S; not needed in the first call, which makes a cache of T.
    prefill_lengths: int `[B]`, how many tokens of each row count; None: all.

  Raises:
    ValueError: if S is not the length of the cache.
  """
  exists = decoder.has_variable(CACHE, 'cache_index')
  counter = decoder.variable(CACHE, 'cache_index', jnp.zeros, (), jnp.int32)
  index, S = counter.value, max_decode_length or length
  if prefill_lengths is not None:
    counter.value = prefill_lengths.astype(jnp.int32)
  elif exists:
    counter.value = index + length
  # One row, or as many as there are numbers: T5X's beam search has `[B, beam]`.
  queries_BT = jnp.reshape(index, (-1, 1)) + jnp.arange(length, dtype=jnp.int32)
  keys_S = jnp.arange(S)
  pending_P = decoder.get_variable(CACHE, 'pending_positions')
  if pending_P is not None:
    # From the first pending position on, what the cache has is out of date.
    keys_S = jnp.where(keys_S < pending_P[0], keys_S, UNREACHED)
    keys_S = jnp.concatenate([keys_S, pending_P])
    index = index - pending_P[0]
  mask = queries_BT[:, None, :, None] >= keys_S
  slots_BnS = decoder.get_variable(CACHE, 'slots')
  if exists:
    beams = 1 if slots_BnS is None else slots_BnS.shape[1]
    cached = _shape(decoder.variables[CACHE])[2] // beams
    if cached != S:
      raise ValueError(
        f'The cache was made for {cached} positions, but this call is for {S}; pass'
        f' max_decode_length={cached}.'
      )
  return Positions(queries_BT, keys_S, mask, index, slots_BnS)


# --- For decode functions: `cache` is the collection of a `network.Transformer` -----


def repeat_rows(cache: Mapping[str, Any], repeats: int) -> dict[str, Any]:
  """Returns an empty cache with `repeats` rows for each input, one after the other."""
  return jax.tree.map(
    lambda x: jnp.repeat(x, repeats, axis=0) if x.ndim == 4 else x, dict(cache)
  )


def with_beams(cache: Mapping[str, Any], beams: int) -> dict[str, Any]:
  """Returns an empty cache with a slot for every beam at every position."""

  B, _, S, _ = _shape(cache)

  def widen(layer):
    return layer | {
      kind.cached: jnp.zeros_like(jnp.repeat(layer[kind.cached], beams, kind.axis))
      for kind in _kinds(layer)
    }

  return _set(_in_each_layer(cache, widen), slots=_own_slots(B, beams, S))


def reorder(cache: Mapping[str, Any], origin_Bn: Array) -> dict[str, Any]:
  """Returns the cache after each beam takes over the past of another, `origin_Bn`."""
  decoder = cache['decoder']
  slots_BnS = jnp.take_along_axis(decoder['slots'], origin_Bn[:, :, None], axis=1)
  decoded_S = jnp.arange(slots_BnS.shape[2]) < decoder['cache_index']
  slots_BnS = jnp.where(decoded_S, slots_BnS, _own_slots(*slots_BnS.shape))
  return _set(cache, slots=slots_BnS)


def with_pending(cache: Mapping[str, Any], beams: int) -> tuple[dict[str, Any], int]:
  """Returns a cache with room for pending keys and values, and P: flush it by then."""
  B, K, slots, _ = _shape(cache)
  P = min(MAX_PENDING, slots // beams)

  def add(layer):
    def empty(kind):
      x = layer[kind.cached]
      return jnp.zeros((P, B, beams, K, x.shape[5 - kind.axis]), x.dtype)

    return layer | {kind.pending: empty(kind) for kind in _kinds(layer)}

  return _pending_from_now(_in_each_layer(cache, add), P), P


def flush(cache: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the cache with the pending keys and values written into it.

  At its end, where fewer than P positions are left, decoding is over: what is written
  there is not read.
  """
  positions_P = cache['decoder']['pending_positions']

  def write_pending(layer):
    index = positions_P[0] * layer['pending_key'].shape[2]
    for kind in _kinds(layer):
      new = _in_cache_layout(kind, layer[kind.pending])
      layer = layer | {kind.cached: _write(layer[kind.cached], new, index, kind.axis)}
    return layer

  return _pending_from_now(_in_each_layer(cache, write_pending), len(positions_P))


def _pending_from_now(cache: Mapping[str, Any], P: int) -> dict[str, Any]:
  positions_P = cache['decoder']['cache_index'] + jnp.arange(P, dtype=jnp.int32)
  return _set(cache, pending_positions=positions_P)


def _own_slots(B: int, beams: int, S: int) -> Array:
  own = jnp.arange(beams, dtype=jnp.int32)[:, None]
  return jnp.broadcast_to(own, (B, beams, S))


def _in_each_layer(node: Any, change: Callable[[dict], dict]) -> Any:
  """Changes the variables of each layer of self-attention."""
  if not isinstance(node, Mapping):
    return node
  node = {name: _in_each_layer(child, change) for name, child in node.items()}
  return change(node) if 'cached_key' in node else node


def _set(cache: Mapping[str, Any], **variables: Array) -> dict[str, Any]:
  """Sets variables of the decoder."""
  return {**cache, 'decoder': {**cache['decoder'], **variables}}


def _shape(cache: Mapping[str, Any]) -> tuple[int, ...]:
  """Returns the shape of cached values, `[B, K, S * n, R]`, that all layers have."""
  leaves = jax.tree_util.tree_leaves_with_path(cache)
  return next(x.shape for path, x in leaves if path[-1].key == 'cached_value')
