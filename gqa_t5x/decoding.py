"""Decoding on the device: cross-attention K and V are computed once per input.

T5X's own decode functions leave that to every step (t5x#1261). Here the encoder
runs once, cross K and V are kept at K heads, and a step reads them, the parameters
and the self-attention cache, which the loop updates in place.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax

Array = jax.Array
Params = Mapping[str, Any]


@struct.dataclass
class GreedyState:
  """What the decode loop carries from step to step.

  Attributes:
    step: number of tokens decoded, int32 `()`.
    tokens_BT: the output so far, 0 where not yet decoded, int32.
    token_B: the newest token, int32.
    scores_B: log-probability of the output so far, float32.
    ended_B: which rows have ended, bool.
    cache: the self-attention cache.
  """

  step: Array
  tokens_BT: Array
  token_B: Array
  scores_B: Array
  ended_B: Array
  cache: Any


def prepare(
  module: nn.Module, params: Params, encoder_input_tokens: Array, max_length: int
) -> tuple[Any, Any]:
  """Encodes the inputs; returns an empty cache and the cross-attention K and V.

  Args:
    module: a `network.Transformer`.
    params: its parameters.
    encoder_input_tokens: int `[B, S]`, 0 is padding.
    max_length: positions of the self-attention cache.

  Returns:
    (`cache` collection, `encoded_kv` collection).
  """
  encoded = module.apply(
    {'params': params}, encoder_input_tokens, enable_dropout=False, method=module.encode
  )
  ones = jnp.ones((encoder_input_tokens.shape[0], max_length), jnp.int32)
  _, variables = module.apply(
    {'params': params},
    encoded,
    encoder_input_tokens,
    ones,
    ones,
    enable_dropout=False,
    decode=True,
    mutable=['cache', 'encoded_kv'],
    method=module.decode,
  )
  return variables['cache'], variables['encoded_kv']


def step(
  module: nn.Module,
  params: Params,
  encoded_kv: Any,
  cache: Any,
  encoder_input_tokens: Array,
  token_B: Array,
  max_length: int,
) -> tuple[Array, Any]:
  """Decodes one position.

  Args:
    module, params, encoder_input_tokens, max_length: as in `prepare`.
    encoded_kv, cache: from `prepare` or an earlier step.
    token_B: the newest token of every row, int32.

  Returns:
    (float32 logits `[B, V]` of the next token, the new cache).
  """
  token_B1 = token_B[:, None]
  logits_B1V, variables = module.apply(
    {'params': params, 'cache': cache, 'encoded_kv': encoded_kv},
    None,  # Not needed: K and V of the encoded inputs are kept.
    encoder_input_tokens,
    token_B1,
    token_B1,
    enable_dropout=False,
    decode=True,
    max_decode_length=max_length,
    mutable=['cache'],
    method=module.decode,
  )
  return logits_B1V[:, 0], variables['cache']


def greedy(
  module: nn.Module,
  params: Params,
  encoder_input_tokens: Array,
  max_length: int,
  eos_id: int = 1,
) -> tuple[Array, Array]:
  """Decodes the likeliest token at every step, until every row has ended.

  Args:
    module: a `network.Transformer`.
    params: its parameters.
    encoder_input_tokens: int `[B, S]`, 0 is padding.
    max_length: T, most tokens to decode, the end marker included.
    eos_id: the token that ends a row.

  Returns:
    (tokens int32 `[B, T]`, 0 after the end marker; float32 `[B]`, the
    log-probability of each row up to and with its end marker).

  Raises:
    ValueError: if `max_length` is not positive.
  """
  if max_length < 1:
    raise ValueError(f'max_length={max_length} must be at least 1.')
  B = encoder_input_tokens.shape[0]
  cache, encoded_kv = prepare(module, params, encoder_input_tokens, max_length)

  def decode_one(state: GreedyState) -> GreedyState:
    logits_BV, cache = step(
      module,
      params,
      encoded_kv,
      state.cache,
      encoder_input_tokens,
      state.token_B,
      max_length,
    )
    logits_BV = logits_BV.astype(jnp.float32)
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    best_logit_B = jnp.max(logits_BV, axis=-1)
    log_prob_B = best_logit_B - jax.nn.logsumexp(logits_BV, axis=-1)
    token_B = jnp.where(state.ended_B, 0, best_B)
    return GreedyState(
      step=state.step + 1,
      tokens_BT=lax.dynamic_update_slice_in_dim(
        state.tokens_BT, token_B[:, None], state.step, axis=1
      ),
      token_B=token_B,
      scores_B=state.scores_B + jnp.where(state.ended_B, 0.0, log_prob_B),
      ended_B=state.ended_B | (token_B == eos_id),
      cache=cache,
    )

  final = lax.while_loop(
    lambda state: (state.step < max_length) & ~jnp.all(state.ended_B),
    decode_one,
    _start(B, max_length, cache),
  )
  return final.tokens_BT, final.scores_B


def _start(B: int, max_length: int, cache: Any) -> GreedyState:
  """Returns the state before the first step: token 0 starts every row."""
  return GreedyState(
    step=jnp.zeros((), jnp.int32),
    tokens_BT=jnp.zeros((B, max_length), jnp.int32),
    token_B=jnp.zeros((B,), jnp.int32),
    scores_B=jnp.zeros((B,), jnp.float32),
    ended_B=jnp.zeros((B,), bool),
    cache=cache,
  )
