"""T5X's own network and decoding, to be timed: what a user has without this project.

It needs T5X's example network, which the stand-in does not have.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from t5x import decoding
from t5x.examples.t5 import network as t5x_network

NO_EOS = -1  # No token ends a row, so that all are as long.


def network(cfg: Any) -> nn.Module:
  """Returns T5X's network of our config's sizes, with parameters as ours at K = N."""
  fields = (field.name for field in dataclasses.fields(t5x_network.T5Config))
  shared = {name: getattr(cfg, name) for name in fields}
  return t5x_network.Transformer(t5x_network.T5Config(**shared))


def decoder(
  cfg: Any, params: Any, inputs_BS: jax.Array, length: int, num_beams: int
) -> tuple[Callable[[], Any], Callable[[int], Any]]:
  """Returns what is timed: (encode the inputs, decode so many tokens of each).

  `cfg` is our T5Config, with all heads. Keys and values of cross-attention are computed
  when T5X computes them.
  """
  module = network(cfg)
  encode = jax.jit(
    functools.partial(module.apply, method=module.encode, enable_dropout=False)
  )
  prepare = functools.partial(encode, {'params': params}, inputs_BS)
  cache = _empty_cache(module, params, inputs_BS, length)
  return prepare, functools.partial(
    _decode, module, num_beams, length, params, prepare(), cache, inputs_BS
  )


@functools.partial(jax.jit, static_argnums=(0, 3))
def _empty_cache(module, params, inputs, length):
  ones = jnp.ones((inputs.shape[0], length), jnp.int32)
  _, variables = module.apply(
    {'params': params},
    jnp.ones_like(inputs),
    ones,
    ones,
    decode=True,
    enable_dropout=False,
    mutable=['cache'],
  )
  return variables['cache']


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(module, num_beams, length, params, encoded, cache, inputs, steps):
  """As T5X's EncoderDecoderModel does it, encoder and prompts apart."""
  encoded, rows = (
    decoding.flat_batch_beam_expand(x, num_beams) for x in (encoded, inputs)
  )

  def tokens_to_logits(state):
    logits, variables = module.apply(
      {'params': params, 'cache': state.cache},
      encoded,
      rows,
      state.cur_token,
      state.cur_token,
      enable_dropout=False,
      decode=True,
      max_decode_length=length,
      mutable=['cache'],
      method=module.decode,
    )
    return jnp.squeeze(logits, axis=1), variables['cache']

  prompts = jnp.zeros((inputs.shape[0], length), jnp.int32)
  if num_beams == 1:
    more = {'temperature': 0.0, 'topk': 0, 'max_decode_steps': steps}
    run = decoding.temperature_sample
  else:
    more = {'num_decodes': num_beams, 'max_decode_step': steps}
    run = decoding.beam_search
  return run(prompts, cache, tokens_to_logits, NO_EOS, **more)
