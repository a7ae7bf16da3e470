"""Greedy decoding and sampling, as decode functions of T5X: one loop on the device."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from gqa_t5x.decoding import loop, top_tokens
from gqa_t5x.decoding.loop import DecodingState, TokensToLogits
from gqa_t5x.model import decode_cache

MIN_TEMPERATURE = 1e-4  # T5X's: temperatures below are 0.


def greedy(
  inputs: Array,
  cache: Any,
  tokens_to_logits: TokensToLogits,
  eos_id: int,
  num_decodes: int = 1,
  cache_offset: int = 0,
  decode_rng: Array | None = None,
  max_decode_steps: int | Array | None = None,
) -> tuple[Array, Array]:
  """Decodes the likeliest token at every step, until every row has ended.

  Arguments and result are those of `temperature_sample`, but for one decode an input,
  scored by the model's distribution; `decode_rng` is not used.

  Raises:
    ValueError: for more than one decode: they would all be the same.
  """
  del decode_rng
  if num_decodes != 1:
    raise ValueError(
      f'num_decodes={num_decodes}, but greedy decoding has one result an input; choose'
      ' decode_fn temperature_sample or beam_search for more.'
    )
  return temperature_sample(
    inputs,
    cache,
    tokens_to_logits,
    eos_id,
    temperature=0.0,
    cache_offset=cache_offset,
    max_decode_steps=max_decode_steps,
  )


@struct.dataclass
class _SamplingState:
  """What the sampling loop carries from step to step; R rows, T tokens at most."""

  step: Array  # int32 ()
  sequences_RT: Array  # [R, T + 1], the start token first
  scores_R: Array
  ended_R: Array
  rng: Array
  cache: Any


def temperature_sample(
  inputs: Array,
  cache: Any,
  tokens_to_logits: TokensToLogits,
  eos_id: int,
  decode_rng: Array | None = None,
  num_decodes: int = 1,
  temperature: float | Array = 1.0,
  topk: int = 1,
  topp: float = 0.0,
  cache_offset: int = 0,
  max_decode_steps: int | Array | None = None,
  rescale_log_probs: bool = True,
) -> tuple[Array, Array]:
  """Draws tokens from the model's distribution; with one rng, those T5X draws.

  Args:
    inputs: int32 `[B, T]`: the start token, then forced tokens, then 0.
    cache: the empty self-attention cache of `prepare`.
    tokens_to_logits: decodes one position of every row.
    decode_rng: a key; None: that of 0.
    num_decodes: independent decodes of every input.
    temperature: divides the logits; one number, or `[B]`. 0 is greedy.
    topk: draw from so many of the likeliest tokens only; 0: from all.
    topp: draw from the smallest set of tokens with at least this probability; 0: all.
    cache_offset: 0: layers are not scanned.
    max_decode_steps: most tokens after the forced ones; None: as many as fit.
    rescale_log_probs: score by the distribution drawn from, or the model's. Greedy
      decoding draws from none: the model's always, where T5X gives 0.

  Returns:
    (tokens int32 `[B, num_decodes, T]`, 0 after the end marker; float32
    `[B, num_decodes]`, the log-probability of what was not forced), by rising score.

  Raises:
    ValueError: for topk and topp together, or numbers that make no sense.
  """
  _check_sampling(num_decodes, temperature, topk, topp, cache_offset)
  B, T = inputs.shape
  forced_RT = jnp.repeat(loop.next_inputs(inputs), num_decodes, axis=0)
  limit_R = jnp.full(B * num_decodes, T)
  if max_decode_steps is not None:
    limit_R = jnp.minimum(T, jnp.sum(forced_RT != 0, axis=1) + max_decode_steps)
  if getattr(temperature, 'ndim', 0):
    temperature = jnp.repeat(temperature, num_decodes)

  def decode_one(state: _SamplingState) -> _SamplingState:
    rng, next_rng = jax.random.split(state.rng)
    token_R1 = lax.dynamic_slice_in_dim(state.sequences_RT, state.step, 1, axis=1)
    logits_RV, cache = tokens_to_logits(
      DecodingState(state.step, state.sequences_RT, token_R1, state.cache)
    )
    drawn = _draw(logits_RV, rng, temperature, topk, topp, rescale_log_probs)
    state = state.replace(rng=next_rng, cache=cache)
    return _append(state, *drawn, forced_RT[:, state.step], limit_R, eos_id)

  start = _start(inputs, num_decodes, cache, decode_rng)
  final = loop.while_loop(lambda s: ~jnp.all(s.ended_R), decode_one, start, beams=1)
  return _by_score(final, B)


def _start(
  inputs_BT: Array, num_decodes: int, cache: Any, decode_rng: Array | None
) -> _SamplingState:
  """Returns the state before the first step."""
  first_R1 = jnp.repeat(inputs_BT[:, :1], num_decodes, axis=0).astype(jnp.int32)
  R, T = len(first_R1), inputs_BT.shape[1]
  return _SamplingState(
    step=jnp.zeros((), jnp.int32),
    sequences_RT=jnp.pad(first_R1, ((0, 0), (0, T))),
    scores_R=jnp.zeros(R, jnp.float32),
    ended_R=jnp.zeros(R, bool),
    rng=jax.random.PRNGKey(0) if decode_rng is None else decode_rng,
    cache=decode_cache.repeat_rows(cache, num_decodes),
  )


def _append(
  state: _SamplingState,
  drawn_R: Array,
  log_prob_R: Array,
  forced_R: Array,
  limit_R: Array,
  eos_id: int,
) -> _SamplingState:
  """Makes each row that has not ended one token longer; a forced token scores 0."""
  free_R = forced_R == 0
  token_R = jnp.where(state.ended_R, 0, jnp.where(free_R, drawn_R, forced_R))
  step = state.step + 1
  return state.replace(
    step=step,
    sequences_RT=lax.dynamic_update_slice_in_dim(
      state.sequences_RT, token_R[:, None], step, axis=1
    ),
    scores_R=state.scores_R + jnp.where(free_R & ~state.ended_R, log_prob_R, 0.0),
    ended_R=state.ended_R | (free_R & (token_R == eos_id)) | (step >= limit_R),
  )


def _by_score(state: _SamplingState, B: int) -> tuple[Array, Array]:
  """Returns tokens `[B, num_decodes, T]` and scores, by rising score."""
  scores_Bn = state.scores_R.reshape(B, -1)
  tokens_BnT = state.sequences_RT[:, 1:].reshape(*scores_Bn.shape, -1)
  order_Bn = jnp.argsort(scores_Bn, axis=1)
  return (
    jnp.take_along_axis(tokens_BnT, order_Bn[:, :, None], axis=1),
    jnp.take_along_axis(scores_Bn, order_Bn, axis=1),
  )


def _check_sampling(num_decodes, temperature, topk, topp, cache_offset) -> None:
  if isinstance(temperature, int | float) and not temperature >= 0:
    raise ValueError(f'temperature={temperature} must be 0 (greedy) or more.')
  if topk and topp:
    raise ValueError(f'topk={topk} and topp={topp} were given; set one of them to 0.')
  if topk < 0 or not 0 <= topp <= 1:
    raise ValueError(f'topk={topk} must be 0 or more, topp={topp} from 0 to 1.')
  loop.check_decodes(num_decodes, cache_offset)


def _draw(
  logits_RV: Array,
  rng: Array,
  temperature: float | Array,
  topk: int,
  topp: float,
  rescale_log_probs: bool,
) -> tuple[Array, Array]:
  """Returns a token for each row, and its log-probability."""
  logits_RV = logits_RV.astype(jnp.float32)
  best_R = jnp.argmax(logits_RV, axis=-1)
  is_number = isinstance(temperature, int | float)
  if topk == 1 or (is_number and temperature <= MIN_TEMPERATURE):
    return best_R.astype(jnp.int32), _log_prob(logits_RV, best_R)
  divisor_R1 = jnp.reshape(jnp.maximum(temperature, MIN_TEMPERATURE), (-1, 1))
  drawn_from_RV = _keep_likeliest(logits_RV / divisor_R1, topk, topp)
  cold = jnp.asarray(temperature) <= MIN_TEMPERATURE
  token_R = jnp.where(cold, best_R, jax.random.categorical(rng, drawn_from_RV))
  log_prob_R = _log_prob(logits_RV, token_R)
  if rescale_log_probs:
    log_prob_R = jnp.where(cold, log_prob_R, _log_prob(drawn_from_RV, token_R))
  return token_R.astype(jnp.int32), log_prob_R


def _log_prob(logits_RV: Array, token_R: Array) -> Array:
  logit_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1)[:, 0]
  return logit_R - jax.nn.logsumexp(logits_RV, axis=-1)


def _keep_likeliest(logits_RV: Array, topk: int, topp: float) -> Array:
  """Rules out all tokens but the likeliest; of equals, all or none."""
  if topk:
    best_Rk, _ = top_tokens.top_k(logits_RV[:, None], min(topk, logits_RV.shape[1]))
    least_R1 = best_Rk[:, -1:]
    return jnp.where(logits_RV >= least_R1, logits_RV, loop.NEG_INF)
  if topp:
    probs_RV = jax.nn.softmax(logits_RV)
    sorted_RV = -jnp.sort(-probs_RV, axis=-1)
    enough_RV = jnp.cumsum(sorted_RV, axis=-1) >= topp
    # Of a sum that rounding keeps below topp, all tokens are needed.
    last_R1 = jnp.where(
      enough_RV.any(-1), jnp.argmax(enough_RV, -1), enough_RV.shape[1] - 1
    )[:, None]
    least_R1 = jnp.take_along_axis(sorted_RV, last_R1, axis=-1)
    return jnp.where(probs_RV >= least_R1, logits_RV, loop.NEG_INF)
  return logits_RV
