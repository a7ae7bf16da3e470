"""What all decode functions share: the state that the model sees, and the loop."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from gqa_t5x.model import decode_cache, sharding

# T5X's: log-probability of what must not be chosen.
NEG_INF = -1.0e7


@struct.dataclass
class DecodingState:
  """What a decode function tells the model; T5X's names. R rows: inputs x decodes."""

  cur_index: Array  # int32 (), how many tokens are decoded
  sequences: Array  # int32 [R, T + 1], the start token first
  cur_token: Array  # int32 [R, 1], the newest
  cache: Any


TokensToLogits = Callable[[DecodingState], tuple[Array, Any]]


def while_loop(
  go_on: Callable[[Any], Array],
  decode_one: Callable[[Any], Any],
  state: Any,
  beams: int,
) -> Any:
  """Decodes while `go_on(state)`; returns the last state.

  On a TPU a step writes its keys and values to small arrays, and they move into the
  cache every few steps: decode_cache.py says why.

  Args:
    state: a `flax.struct.dataclass` with the `cache`.
    beams: rows that share a row of the cache.
  """
  if sharding.platform() != 'tpu':
    return lax.while_loop(go_on, decode_one, state)

  cache, most = decode_cache.with_pending(state.cache, beams)

  def decode_some(state):
    def another(carry):
      state, n = carry
      return go_on(state) & (n < most)

    def step(carry):
      state, n = carry
      return decode_one(state), n + 1

    state, _ = lax.while_loop(another, step, (state, jnp.zeros((), jnp.int32)))
    return state.replace(cache=decode_cache.flush(state.cache))

  return lax.while_loop(go_on, decode_some, state.replace(cache=cache))


def check_decodes(num_decodes: int, cache_offset: int) -> None:
  """Raises ValueError for what no decode function can do."""
  if num_decodes < 1:
    raise ValueError(f'num_decodes={num_decodes} must be at least 1.')
  if cache_offset:
    raise ValueError(
      f'cache_offset={cache_offset}: layers are not scanned here; use 0.'
    )


def next_inputs(inputs: Array) -> Array:
  """Returns the token that is forced after each position, 0 where none is."""
  return jnp.pad(inputs[:, 1:], ((0, 0), (0, 1))).astype(jnp.int32)
