"""The compiled programs of a model: decode, score, and watch what attention reads."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gqa_t5x.conversion import input_sums, output_sums
from gqa_t5x.decoding import beam_search, generate, sampling
from gqa_t5x.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Way:
  """How to decode; static, so that each is compiled once."""

  num_beams: int
  alpha: float
  temperature: float
  topk: int
  topp: float
  num_decodes: int

  def check(
    self, max_length: int, batch_size: int, max_input_length: int | None
  ) -> None:
    """Raises BadInput for what contradicts itself."""
    counts = {'max_length': max_length, 'batch_size': batch_size}
    counts |= {'num_beams': self.num_beams, 'num_decodes': self.num_decodes}
    counts |= {} if max_input_length is None else {'max_input_length': max_input_length}
    for name, number in counts.items():
      if not isinstance(number, int | np.integer):
        raise BadInput(f'{name}={number!r} must be a whole number')
      if number < 1:
        raise BadInput(f'{name}={number} must be at least 1')
    if self.temperature < 0:
      raise BadInput(f'temperature={self.temperature} must not be negative')
    if self.topk < 0 or not 0 <= self.topp <= 1 or (self.topk and self.topp):
      raise BadInput(
        f'topk={self.topk}, topp={self.topp}: give a topk of 1 or more, or a topp from'
        ' 0 to 1, not both'
      )
    if self.temperature and self.num_beams > 1:
      raise BadInput(
        f'num_beams={self.num_beams} and temperature={self.temperature}: choose beam'
        ' search or sampling'
      )
    if (self.topk or self.topp) and not self.temperature:
      raise BadInput(
        f'topk={self.topk}, topp={self.topp} are of sampling; give a temperature, too'
      )
    most = self.num_beams if self.num_beams > 1 or not self.temperature else None
    if most is not None and self.num_decodes > most:
      raise BadInput(
        f'num_decodes={self.num_decodes} is more than num_beams={self.num_beams}; give'
        ' as many beams, or a temperature to sample'
      )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def decode(module, way, eos_id, params, inputs_BS, prompts_BT, key):
  """Decodes inputs; returns (tokens `[B, n, T]`, scores `[B, n]`), the best last."""
  options: dict[str, Any] = {'decode_fn': sampling.greedy}
  if way.num_beams > 1:
    options = {'decode_fn': beam_search.beam_search, 'alpha': way.alpha}
    options['num_decodes'] = way.num_beams
  elif way.temperature:
    options = {'decode_fn': sampling.temperature_sample, 'decode_rng': key}
    options |= {'temperature': way.temperature, 'num_decodes': way.num_decodes}
    options |= {'topk': way.topk, 'topp': way.topp}
  return generate.generate(
    module, params, inputs_BS, prompts_BT, eos_id=eos_id, **options
  )


def _features(inputs_BS, targets_BT, start):
  shifted = jnp.pad(targets_BT[:, :-1], ((0, 0), (1, 0)), constant_values=start)
  return {
    'encoder_input_tokens': inputs_BS,
    'decoder_input_tokens': shifted,
    'decoder_target_tokens': targets_BT,
  }


@functools.partial(jax.jit, static_argnums=(0, 4))
def score(module, params, inputs_BS, targets_BT, start):
  """Sums over the target tokens: cross-entropy, right guesses, and their number."""
  logits_BTV = module.apply(
    {'params': params}, **_features(inputs_BS, targets_BT, start), enable_dropout=False
  )
  chosen_BT1 = jnp.take_along_axis(
    jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1
  )
  real_BT = targets_BT > 0
  correct_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
  sums = -chosen_BT1[..., 0] * real_BT, correct_BT & real_BT, real_BT
  return jnp.stack([jnp.sum(x, dtype=jnp.float32) for x in sums])


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def sum_inputs(module, include_encoder, params, inputs_BS, targets_BT, start):
  """Returns what `input_sums.sum_inputs` does, of a batch of examples."""
  features = _features(inputs_BS, targets_BT, start)
  return input_sums.sum_inputs(module, params, features, include_encoder)


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def sum_outputs(original, converted, originals, params, inputs_BS, targets_BT, start):
  """Returns what `output_sums.sum_outputs` does, of a batch of examples."""
  features = _features(inputs_BS, targets_BT, start)
  return output_sums.sum_outputs(original, originals, converted, params, features)
