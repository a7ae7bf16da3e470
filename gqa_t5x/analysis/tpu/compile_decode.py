"""Compiles decoding for a TPU slice: the whole loop, as a user's program runs it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gqa_t5x.analysis.benchmarks import random_model, settings
from gqa_t5x.analysis.benchmarks.settings import BadSetting
from gqa_t5x.analysis.costs import formulas
from gqa_t5x.analysis.tpu import program
from gqa_t5x.decoding import beam_search, sampling
from gqa_t5x.decoding.generate import generate
from gqa_t5x.model import network

EOS = 1


@dataclasses.dataclass(frozen=True)
class Decode:
  """What is decoded, and how it is laid out.

  Attributes:
    size: a key of sizes.SIZES.
    num_kv_heads: K of decoder self- and cross-attention; None: the size's, or MHA.
    batch_size: B, inputs of the whole slice.
    input_length: S, tokens.
    output_length: T, tokens; positions of the self-attention cache.
    num_beams: 1 decodes greedily.
    dtype: of parameters, activations and cache: a key of settings.DTYPES.
    model_partitions: devices that share a copy of the model.
    kv_sharding: of `axes.kv_head_rules`; None is by rule.
    num_layers: of encoder and decoder each; None: the size's.
  """

  size: str
  num_kv_heads: int | None
  batch_size: int
  input_length: int
  output_length: int
  num_beams: int
  dtype: str
  model_partitions: int
  kv_sharding: str | None = None
  num_layers: int | None = None

  @functools.cached_property
  def config(self) -> network.T5Config:
    """The model's configuration; its errors are BadSetting."""
    cfg = settings.config(self.size, self.num_kv_heads, self.dtype)
    if self.num_layers is None:
      return cfg
    n = self.num_layers
    return dataclasses.replace(cfg, num_encoder_layers=n, num_decoder_layers=n)

  def least_bytes(self, devices: int) -> float:
    """Returns the bytes that a step must read on one of so many devices.

    That is its part of the parameters and of the cache, once, the cache being full.
    """
    step = formulas.decode_step(
      self.config,
      self.batch_size,
      self.input_length,
      self.output_length,
      num_beams=self.num_beams,
      param_itemsize=jnp.dtype(self.config.dtype).itemsize,
    )
    return step.param_bytes / self.model_partitions + step.cache_bytes / devices

  def cache_bytes(self) -> int:
    """Returns the bytes of all keys and values, of the whole slice."""
    rows = self.batch_size * self.num_beams
    return formulas.cross_kv_bytes(
      self.config, self.batch_size, self.input_length
    ) + formulas.self_cache_bytes(self.config, rows, self.output_length)


def lower(setting: Decode, partitioner: Any) -> tuple[Any, dict[str, float]]:
  """Lowers `generate` for the devices of a partitioner.

  Args:
    setting: what to decode.
    partitioner: of gqa_t5x.partitioning, with the devices of a slice.

  Returns:
    (the lowered program, from parameters, inputs `[B, S]` and prompts `[B, T]` to
    tokens and scores; bytes of `parameters` and `cache` on one device).

  Raises:
    BadSetting: numbers that are not positive or do not divide.
  """
  settings.check_positive(
    setting, 'batch_size', 'input_length', 'output_length', 'num_beams'
  )
  copies = partitioner.mesh.shape['data']
  if setting.batch_size % copies:
    raise BadSetting(
      f'batch_size={setting.batch_size} is not divisible by the {copies} copies of the'
      f' model (devices / model_partitions={setting.model_partitions}).'
    )
  cfg = setting.config
  module = network.Transformer(cfg)
  decode_fn, more = sampling.greedy, {}
  if setting.num_beams > 1:
    decode_fn, more = beam_search.beam_search, {'num_decodes': setting.num_beams}

  def decode(params, inputs, prompts):
    return generate(module, params, inputs, prompts, decode_fn, eos_id=EOS, **more)

  variables = random_model.variable_shapes(cfg)
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, cfg.dtype), variables['params']
  )
  tokens = [
    jax.ShapeDtypeStruct((setting.batch_size, length), jnp.int32)
    for length in (setting.input_length, setting.output_length)
  ]
  rows = partitioner.data_partition_spec
  layout = random_model.partition_specs(variables, partitioner.logical_axis_rules)
  lowered = partitioner.partition(decode, (layout, rows, rows), rows).lower(
    params, *tokens
  )
  return lowered, {
    'parameters': program.bytes_on_device(params, layout, partitioner.mesh),
    'cache': setting.cache_bytes() / partitioner.mesh.size,
  }
