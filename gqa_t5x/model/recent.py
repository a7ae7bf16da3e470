"""New keys and values beside the decode cache, and the loop that moves them into it.

A TPU keeps memory in tiles of 128 positions and more: to write one of them it reads and
writes the whole tile, and where a cache is read and written in one step, XLA copies all
of it on the chip and back. So a step only reads the cache. It writes to a small array
whose first axis is the position, and those go to the cache together, every few steps.

  P recent positions   B batch   n beams   K key/value heads   H head size
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gqa_t5x.model import decode_cache, sharding

Array = jax.Array

POSITIONS = 16  # at most, that are kept beside the cache
NEVER = 2**30  # A position that no token reaches.

# What is kept beside the cache, and how its axes become the cache's.
_BESIDE = {'cached_key': 'recent_key', 'cached_value': 'recent_value'}
_ORDER = {'recent_key': 'PBnKH->BKHPn', 'recent_value': 'PBnKH->BKPnH'}


def while_loop(
  go_on: Callable[[Any], Array],
  decode_one: Callable[[Any], Any],
  state: Any,
  beams: int,
) -> Any:
  """Runs a decode loop; on a TPU with recent keys and values beside the cache.

  Args:
    go_on: from a state to whether there is another step.
    decode_one: the step.
    state: a `flax.struct.dataclass` with the `cache`.
    beams: rows that share a row of the cache.

  Returns:
    The last state.
  """
  if sharding.platform() != 'tpu':
    return lax.while_loop(go_on, decode_one, state)

  state = state.replace(cache=beside(state.cache, beams))
  positions = state.cache['decoder']['recent_positions'].shape[0]

  def decode_some(state):
    def another(carry):
      state, n = carry
      return go_on(state) & (n < positions)

    def step(carry):
      state, n = carry
      return decode_one(state), n + 1

    state, _ = lax.while_loop(another, step, (state, jnp.zeros((), jnp.int32)))
    return state.replace(cache=move(state.cache))

  return lax.while_loop(go_on, decode_some, state)


def beside(cache: Mapping[str, Any], beams: int) -> dict[str, Any]:
  """Returns a cache with room for recent keys and values.

  Args:
    cache: the `cache` collection of a `network.Transformer`.
    beams: n, rows that share a row of the cache.

  Returns:
    The collection, with `recent_key` and `recent_value` `[P, B, n, K, H]` beside what
    is cached, and their positions, `decoder/recent_positions`, int32 `[P]`.
  """
  lengths = [
    leaf.shape[2] // beams
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache)
    if path[-1].key == 'cached_value'
  ]
  positions = min(POSITIONS, *lengths)

  def add(layer):
    B, K, _, H = layer['cached_value'].shape
    empty = jnp.zeros((positions, B, beams, K, H), layer['cached_value'].dtype)
    return layer | dict.fromkeys(_BESIDE.values(), empty)

  return _from_now(_changed(cache, add), positions)


def move(cache: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the cache with what is recent written into it.

  At its end, where fewer than P positions are left, decoding is over: what is written
  there is not read.

  Args:
    cache: from `beside`, or at most P steps after the last move.
  """
  positions_P = cache['decoder']['recent_positions']

  def write(layer):
    index = positions_P[0] * layer['recent_key'].shape[2]
    return layer | {
      name: decode_cache.write(
        layer[name],
        in_order(recent, layer[recent]),
        index,
        decode_cache.LENGTH_AXIS[name],
      )
      for name, recent in _BESIDE.items()
    }

  return _from_now(_changed(cache, write), len(positions_P))


def _changed(node: Any, change: Callable[[dict], dict]) -> Any:
  """Changes what each self-attention keeps."""
  if not isinstance(node, Mapping):
    return node
  node = {name: _changed(child, change) for name, child in node.items()}
  return change(node) if 'cached_key' in node else node


def _from_now(cache: dict[str, Any], positions: int) -> dict[str, Any]:
  """Makes recent what comes next."""
  decoder = cache['decoder']
  positions_P = decoder['cache_index'] + jnp.arange(positions, dtype=jnp.int32)
  return cache | {'decoder': decoder | {'recent_positions': positions_P}}


def in_order(name: str, x_PBnKH: Array) -> Array:
  """Returns keys `[B, K, H, P * n]` or values `[B, K, P * n, H]`, as in the cache.

  Args:
    name: 'recent_key' or 'recent_value'.
    x_PBnKH: what it holds.
  """
  x = jnp.einsum(_ORDER[name], x_PBnKH)
  axis = x.ndim - 2 if name == 'recent_key' else x.ndim - 3
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def key_positions(length: int, positions_P: Array) -> Array:
  """Returns the positions of cached keys, then of recent ones.

  Args:
    length: S, of the cache. What it has of recent positions, and later ones, is old.
    positions_P: of recent keys, int32 `[P]`.

  Returns:
    int32 `[S + P]`.
  """
  cached_S = jnp.arange(length)
  cached_S = jnp.where(cached_S < positions_P[0], cached_S, NEVER)
  return jnp.concatenate([cached_S, positions_P])
