"""Beam search with T5X's results, without moving keys and values (decode_cache.py)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from gqa_t5x.decoding import loop, top_tokens
from gqa_t5x.decoding.loop import NEG_INF, DecodingState, TokensToLogits
from gqa_t5x.model import decode_cache


@struct.dataclass
class _BeamState:
  """What beam search carries from step to step; the best beam is last, as in T5X."""

  step: Array  # int32 ()
  live_tokens_BnT: Array  # [B, n, T + 1], the start token first
  live_log_probs_Bn: Array
  ended_tokens_BnT: Array
  ended_scores_Bn: Array
  ended_Bn: Array  # which of them are there
  cache: Any


def _brevity_penalty(alpha: float, length: int | Array) -> Array:
  """What log-probabilities are divided by (Wu et al. 2016, arXiv 1609.08144)."""
  return jnp.power((5.0 + length) / 6.0, alpha)


def beam_search(
  inputs: Array,
  cache: Any,
  tokens_to_logits: TokensToLogits,
  eos_id: int,
  num_decodes: int = 4,
  alpha: float = 0.6,
  cache_offset: int = 0,
  decode_rng: Array | None = None,
  max_decode_step: int | Array = -1,
) -> tuple[Array, Array]:
  """Beam search with T5X's results. Reordering beams moves no keys and values.

  Args:
    inputs, cache, tokens_to_logits, eos_id, cache_offset: as in `temperature_sample`.
    num_decodes: beams of every input.
    alpha: scores are log-probabilities by ((5 + length) / 6)^alpha.
    decode_rng: not used.
    max_decode_step: most steps, those over forced tokens included; -1: as many as fit.

  Returns:
    (tokens int32 `[B, num_decodes, T]`; float32 scores `[B, num_decodes]`), by rising
    score. Where no beam has ended, the live ones and their log-probabilities.
  """
  del decode_rng
  loop.check_decodes(num_decodes, cache_offset)
  B, T = inputs.shape
  n = num_decodes
  forced_BT = loop.next_inputs(inputs)
  limit = jnp.where(max_decode_step > 0, jnp.minimum(max_decode_step, T), T)

  def may_improve(state: _BeamState) -> Array:
    best_live_B1 = state.live_log_probs_Bn[:, -1:] / _brevity_penalty(alpha, T + 1)
    worst_ended_B1 = jnp.min(state.ended_scores_Bn, axis=1, keepdims=True)
    worst_ended_Bn = jnp.where(state.ended_Bn, worst_ended_B1, NEG_INF)
    return (state.step < limit) & ~jnp.all(worst_ended_Bn > best_live_B1)

  def decode_one(state: _BeamState) -> _BeamState:
    token_Bn = lax.dynamic_index_in_dim(
      state.live_tokens_BnT, state.step, axis=2, keepdims=False
    )
    logits_RV, cache = tokens_to_logits(
      DecodingState(
        state.step,
        state.live_tokens_BnT.reshape(B * n, T + 1),
        token_Bn.reshape(B * n, 1),
        state.cache,
      )
    )
    log_probs_BnV = jax.nn.log_softmax(logits_RV.astype(jnp.float32)).reshape(B, n, -1)
    forced_B = lax.dynamic_index_in_dim(forced_BT, state.step, axis=1, keepdims=False)
    state = state.replace(cache=cache)
    return _extend(state, log_probs_BnV, forced_B[:, None], eos_id, alpha)

  start = _start(inputs, n, decode_cache.with_beams(cache, n))
  return _result(loop.while_loop(may_improve, decode_one, start, beams=n))


def _start(inputs_BT: Array, n: int, cache: Any) -> _BeamState:
  """Returns the state before the first step: of equal beams, one is alive."""
  B, T = inputs_BT.shape
  first_Bn1 = jnp.broadcast_to(inputs_BT[:, :1, None], (B, n, 1)).astype(jnp.int32)
  tokens_BnT = jnp.pad(first_Bn1, ((0, 0), (0, 0), (0, T)))
  only_one = jnp.where(jnp.arange(n) == 0, 0.0, NEG_INF)
  return _BeamState(
    step=jnp.zeros((), jnp.int32),
    live_tokens_BnT=tokens_BnT,
    live_log_probs_Bn=jnp.broadcast_to(only_one, (B, n)),
    ended_tokens_BnT=jnp.zeros_like(tokens_BnT),
    ended_scores_Bn=jnp.full((B, n), NEG_INF),
    ended_Bn=jnp.zeros((B, n), bool),
    cache=cache,
  )


def _result(state: _BeamState) -> tuple[Array, Array]:
  """Returns the beams that have ended, or the live ones of an input without any."""
  any_B1 = jnp.any(state.ended_Bn, axis=1, keepdims=True)
  tokens_BnT = jnp.where(
    any_B1[:, :, None], state.ended_tokens_BnT, state.live_tokens_BnT
  )
  scores_Bn = jnp.where(any_B1, state.ended_scores_Bn, state.live_log_probs_Bn)
  return tokens_BnT[:, :, 1:], scores_Bn


def _extend(
  state: _BeamState, log_probs_BnV: Array, forced_B1: Array, eos_id: int, alpha: float
) -> _BeamState:
  """Makes each beam one token longer, and keeps the best.

  Of 2 n candidates at most n end, so that n live beams are left.
  """
  _, n, V = log_probs_BnV.shape
  total_BnV = log_probs_BnV + state.live_log_probs_Bn[:, :, None]
  log_prob_Bm, place_Bm = top_tokens.top_k(total_BnV, 2 * n)
  free_B1 = forced_B1 == 0
  # All beams of a forced token would be the same: one stays alive.
  only_one = jnp.where(jnp.arange(2 * n) == 0, 0.0, NEG_INF)
  log_prob_Bm = jnp.where(free_B1, log_prob_Bm, only_one)
  token_Bm = jnp.where(free_B1, place_Bm % V, forced_B1)
  origin_Bm = place_Bm // V
  tokens_BmT = jnp.take_along_axis(state.live_tokens_BnT, origin_Bm[:, :, None], axis=1)
  tokens_BmT = lax.dynamic_update_slice_in_dim(
    tokens_BmT, token_Bm[:, :, None], state.step + 1, axis=2
  )
  ends_Bm = token_Bm == eos_id

  live_Bm = log_prob_Bm + ends_Bm * NEG_INF
  live_tokens_BnT, live_log_probs_Bn, origin_Bn = _best(
    live_Bm, n, tokens_BmT, live_Bm, origin_Bm
  )
  scores_Bm = log_prob_Bm / _brevity_penalty(alpha, state.step + 1)
  scores_Bm = jnp.concatenate(
    [state.ended_scores_Bn, scores_Bm + ~ends_Bm * NEG_INF], axis=1
  )
  ended_tokens_BnT, ended_scores_Bn, ended_Bn = _best(
    scores_Bm,
    n,
    jnp.concatenate([state.ended_tokens_BnT, tokens_BmT], axis=1),
    scores_Bm,
    jnp.concatenate([state.ended_Bn, ends_Bm], axis=1),
  )
  return _BeamState(
    step=state.step + 1,
    live_tokens_BnT=live_tokens_BnT,
    live_log_probs_Bn=live_log_probs_Bn,
    ended_tokens_BnT=ended_tokens_BnT,
    ended_scores_Bn=ended_scores_Bn,
    ended_Bn=ended_Bn,
    cache=decode_cache.reorder(state.cache, origin_Bn),
  )


def _best(scores_Bm: Array, n: int, *arrays: Array) -> tuple[Array, ...]:
  """Takes the n best of each array along axis 1, the best last."""
  best_Bn = jnp.flip(lax.top_k(scores_Bm, n)[1], axis=1)
  return tuple(
    jnp.take_along_axis(x, best_Bn.reshape(*best_Bn.shape, *[1] * (x.ndim - 2)), axis=1)
    for x in arrays
  )
