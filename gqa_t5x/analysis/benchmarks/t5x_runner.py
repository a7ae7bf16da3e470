"""T5X's own network, decoded by T5X: what a user has without this project."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gqa_t5x.analysis.benchmarks import decode_benchmark, random_model


class Runner:
  """As decode_benchmark.Runner; keys and values of cross-attention are T5X's affair."""

  def __init__(self, setting: Any):
    """Makes parameters and encodes random inputs.

    Args:
      setting: a decode_benchmark.Setting with all heads.

    Raises:
      BadSetting: T5X's example network is not installed.
    """
    self.setting = setting
    cfg = setting.config
    self._module = random_model.module(setting)
    self._params = random_model.params(cfg, cfg.dtype)
    self._inputs = decode_benchmark.random_inputs(setting)
    self._encode = jax.jit(
      functools.partial(
        self._module.apply, method=self._module.encode, enable_dropout=False
      )
    )
    self._encoded = self.prepare()
    self._cache = _empty_cache(
      self._module, self._params, self._inputs, setting.output_length
    )

  def prepare(self) -> jax.Array:
    """Encodes the inputs."""
    return self._encode({'params': self._params}, self._inputs)

  def decode(self, steps: int) -> Any:
    """Decodes so many tokens of each input; returns (tokens, scores)."""
    return _decode(
      self._module,
      self.setting.num_beams,
      self.setting.output_length,
      self._params,
      self._encoded,
      self._cache,
      self._inputs,
      steps,
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
  from t5x import decoding

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
    return decoding.temperature_sample(
      prompts,
      cache,
      tokens_to_logits,
      decode_benchmark.NEVER,
      temperature=0.0,
      topk=0,
      max_decode_steps=steps,
    )
  return decoding.beam_search(
    prompts,
    cache,
    tokens_to_logits,
    decode_benchmark.NEVER,
    num_decodes=num_beams,
    max_decode_step=steps,
  )
