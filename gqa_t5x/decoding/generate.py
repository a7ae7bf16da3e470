"""Decoding on the device: cross-attention K and V are computed once per input.

T5X's own loop leaves that to every step (t5x#1261). Here the encoder runs once, cross
K and V are kept at K heads and shared by all beams and samples of an input, and a step
reads them, the parameters and the self-attention cache, which is updated in place.
T5X's own decode functions can take the place of sampling.py's and beam_search.py's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import Array, lax

from gqa_t5x.decoding.loop import DecodingState
from gqa_t5x.model import decode_cache, dense, quantize, sharding

Params = Mapping[str, Any]

# Most tokens that a copy of the model encodes together: attention among more would take
# more memory than the keys and values that decoding reads.
ENCODED_TOGETHER = 2**14


def generate(
  module: nn.Module,
  params: Params,
  encoder_input_tokens: Array,
  prompts: Array,
  decode_fn: Callable[..., tuple[Array, Array]],
  **decoder_params,
) -> tuple[Array, Array]:
  """Encodes the inputs and decodes from them.

  Args:
    module: a `network.Transformer`.
    params: its parameters; as its `quantize` wants them, or they are made so first.
    encoder_input_tokens: int `[B, S]`, 0 is padding.
    prompts: int32 `[B, T]`, T tokens are decoded at most. Its first column is the start
      token; tokens after it that are not 0 are forced.
    decode_fn: of sampling.py, beam_search.py or t5x.decoding.
    **decoder_params: for `decode_fn`: eos_id, num_decodes, ...

  Returns:
    (tokens int32 `[B, num_decodes, T]`, 0 after the end marker; float32 scores
    `[B, num_decodes]`), the best decode last.

  Raises:
    ValueError: if T is 0.
  """
  if prompts.shape[1] < 1:
    raise ValueError(f'prompts of shape {prompts.shape} leave no token to decode.')
  if not len(prompts):
    # As many dimensions as one input would have.
    rows = [
      jnp.zeros((1, x.shape[1]), x.dtype) for x in (encoder_input_tokens, prompts)
    ]
    of_one = jax.eval_shape(
      lambda: generate(module, params, *rows, decode_fn, **decoder_params)
    )
    return tuple(jnp.zeros((0, *x.shape[1:]), x.dtype) for x in of_one)
  params = quantize.prepared(params, module.config.quantize)
  cache, kept = prepare(module, params, encoder_input_tokens, prompts.shape[1])

  def tokens_to_logits(state: DecodingState) -> tuple[Array, Any]:
    tokens = encoder_input_tokens, state.cur_token[:, 0]
    return step(module, params, kept, state.cache, *tokens, prompts.shape[1])

  return decode_fn(
    inputs=prompts, cache=cache, tokens_to_logits=tokens_to_logits, **decoder_params
  )


def prepare(
  module: nn.Module, params: Params, encoder_input_tokens: Array, max_length: int
) -> tuple[Any, Any]:
  """Encodes the inputs, a few at a time, and makes what all steps share.

  On a CPU that includes the decoder's kernels, transposed: with few rows, its products
  read them twice as fast from the left (docs/performance.md). Those in int8 become
  float32 again: a step would do that before each product.

  Returns:
    (empty `cache` collection of `max_length` positions; the other collections of a
    step: cross-attention K and V in `encoded_kv`, kernels in `transposed`).
  """
  B, S = encoder_input_tokens.shape
  parts = B // encoded_together(B, S)
  cache, encoded_kv = _encode(module, params, encoder_input_tokens, max_length)
  if parts > 1:
    # Only shapes of `encoded_kv` are used: under jit the call above encodes nothing.

    def encode_part(i, kept):
      rows = encoder_input_tokens.reshape(B // parts, parts, S)[:, i]
      _, new = _encode(module, params, rows, max_length)
      return jax.tree.map(
        lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, axis=1), kept, new
      )

    empty = jax.tree.map(
      lambda x: jnp.zeros((B // parts, parts, *x.shape[1:]), x.dtype), encoded_kv
    )
    encoded_kv = jax.tree.map(
      lambda x: x.reshape(B, *x.shape[2:]), lax.fori_loop(0, parts, encode_part, empty)
    )
  kept = {decode_cache.ENCODED_KV: encoded_kv}
  if sharding.platform() == 'cpu':
    transposed = _transposed_kernels(params['decoder'], module.config.head_dim)
    kept[dense.TRANSPOSED] = {'decoder': transposed}
  return cache, kept


def encoded_together(B: int, S: int) -> int:
  """Returns how many of B inputs of S tokens `prepare` encodes at a time, a divisor.

  All copies of the model get as many of each part, so that their rows stay with them.
  """
  mesh = sharding.current_mesh()
  copies = 1 if mesh is None else mesh.shape.get('data', 1)
  rows = B // copies if B % copies == 0 else B
  most = max(1, ENCODED_TOGETHER // S)
  return B // rows * max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)


def _encode(
  module: nn.Module, params: Params, tokens_BS: Array, max_length: int
) -> tuple[Any, Any]:
  """Returns (empty `cache` collection, `encoded_kv` collection)."""
  encoded = module.apply(
    {'params': params}, tokens_BS, enable_dropout=False, method=module.encode
  )
  ones = jnp.ones((tokens_BS.shape[0], max_length), jnp.int32)
  _, variables = module.apply(
    {'params': params},
    encoded,
    tokens_BS,
    ones,
    ones,
    enable_dropout=False,
    decode=True,
    mutable=[decode_cache.CACHE, decode_cache.ENCODED_KV],
    method=module.decode,
  )
  return variables[decode_cache.CACHE], variables[decode_cache.ENCODED_KV]


def _transposed_kernels(decoder: Params, head_dim: int) -> dict[str, Any]:
  """Returns the kernels of a step as `[out, in]`; cross keys and values need none."""

  def transpose(name, kernel):
    if name in dense.PER_HEAD:
      kernel_RNH = kernel.reshape(len(kernel), -1, head_dim)
      return jnp.einsum(dense.PER_HEAD[name], kernel_RNH)
    return kernel.T

  unused = {('encoder_decoder_attention', name) for name in ('key', 'value')}
  flat = traverse_util.flatten_dict(decoder)
  transposed = {
    path: transpose(
      path[-2], quantize.to_float(value, flat.get((*path[:-1], dense.KERNEL_SCALE)))
    )
    for path, value in flat.items()
    if path[-1] == 'kernel' and path[-3:-1] not in unused
  }
  return traverse_util.unflatten_dict(transposed)


def step(
  module: nn.Module,
  params: Params,
  kept: Any,
  cache: Any,
  encoder_input_tokens: Array,
  token_R: Array,
  max_length: int,
) -> tuple[Array, Any]:
  """Decodes one position, after `prepare`.

  Args:
    cache: of `prepare` or an earlier step.
    token_R: the newest token of every row, int32; an input may have several rows.

  Returns:
    (float32 logits `[R, V]` of the next token, the new cache).
  """
  token_R1 = token_R[:, None]
  logits_R1V, variables = module.apply(
    {'params': params, decode_cache.CACHE: cache, **kept},
    None,  # Not needed: K and V of the encoded inputs are kept.
    encoder_input_tokens,
    token_R1,
    token_R1,
    enable_dropout=False,
    decode=True,
    max_decode_length=max_length,
    mutable=[decode_cache.CACHE],
    method=module.decode,
  )
  return logits_R1V[:, 0], variables[decode_cache.CACHE]
