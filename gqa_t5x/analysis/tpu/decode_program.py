"""Lowers decoding for a TPU slice: the whole loop, as a user's program runs it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.linen import partitioning as nn_partitioning
from jax.sharding import PartitionSpec

from gqa_t5x.analysis import models
from gqa_t5x.analysis.costs import formulas
from gqa_t5x.decoding import beam_search, generate, sampling
from gqa_t5x.errors import BadInput
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
    dtype: of parameters, activations and cache: a key of models.DTYPES.
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
    """The model's configuration; its errors are BadInput."""
    cfg = models.config(self.size, self.num_kv_heads, self.dtype)
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


def lower(setting: Decode, partitioner: Any) -> tuple[Any, Any, Any]:
  """Lowers `generate` for the devices of a partitioner.

  Args:
    setting: what to decode.
    partitioner: of `training.partitioning`, with the devices of a slice.

  Returns:
    (the lowered program, from parameters, inputs `[B, S]` and prompts `[B, T]` to
    tokens and scores; the parameters' shapes; their PartitionSpecs).

  Raises:
    BadInput: numbers that are not positive or do not divide.
  """
  models.check_positive(
    setting, 'batch_size', 'input_length', 'output_length', 'num_beams'
  )
  copies = partitioner.mesh.shape['data']
  if setting.batch_size % copies:
    raise BadInput(
      f'batch_size={setting.batch_size} is not divisible by the {copies} copies of the'
      f' model (devices / model_partitions={setting.model_partitions}).'
    )
  cfg = setting.config
  module = network.Transformer(cfg)
  decode_fn, more = sampling.greedy, {}
  if setting.num_beams > 1:
    decode_fn, more = beam_search.beam_search, {'num_decodes': setting.num_beams}

  def decode(params, inputs, prompts):
    return generate.generate(
      module, params, inputs, prompts, decode_fn, eos_id=EOS, **more
    )

  variables = models.variable_shapes(cfg)
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, cfg.dtype), variables['params']
  )
  specs = _partition_specs(variables['params_axes'], partitioner.logical_axis_rules)
  tokens = [
    jax.ShapeDtypeStruct((setting.batch_size, length), jnp.int32)
    for length in (setting.input_length, setting.output_length)
  ]
  rows = partitioner.data_partition_spec
  partitioned = partitioner.partition(decode, (specs, rows, rows), rows)
  return partitioned.lower(params, *tokens), params, specs


def _partition_specs(params_axes: Any, rules: Any) -> Any:
  """Returns how parameters of these logical axes are sharded, by rules to mesh axes."""
  return jax.tree.map(
    lambda names: nn_partitioning.logical_to_mesh_axes(tuple(names), rules),
    unfreeze(nn_partitioning.get_axis_names(params_axes)),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )
