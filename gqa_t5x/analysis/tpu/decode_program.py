"""Lowers decoding for a TPU slice: the whole loop, as a user's program runs it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning
from jax.sharding import PartitionSpec

from gqa_t5x.analysis import models
from gqa_t5x.decoding import beam_search, generate, sampling
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network

EOS = 1


@dataclasses.dataclass(frozen=True)
class Setting(models.DecodeSetting):
  """What is decoded, and how it is laid out.

  Attributes:
    model_partitions: devices that share a copy of the model.
    kv_sharding: of `axes.kv_head_rules`; None is by rule.
    num_layers: of encoder and decoder each; None: the size's.
  """

  model_partitions: int
  kv_sharding: str | None = None
  num_layers: int | None = None

  @property
  def config(self) -> network.T5Config:
    """The model's configuration."""
    cfg, n = super().config, self.num_layers
    layers = {'num_encoder_layers': n, 'num_decoder_layers': n}
    return dataclasses.replace(cfg, **layers) if n else cfg

  def least_bytes(self, devices: int) -> float:
    """Returns the bytes that a step must read on one of so many devices.

    That is its part of the parameters and of the cache, once, the cache being full.
    """
    cost = self.cost
    return cost.param_bytes / self.model_partitions + cost.cache_bytes / devices


def lower(setting: Setting, partitioner: Any) -> tuple[Any, Any, Any]:
  """Lowers `generate` for the devices of a partitioner of `training.partitioning`.

  Returns:
    (the lowered program, from parameters, inputs `[B, S]` and prompts `[B, T]` to
    tokens and scores; the parameters' shapes; their PartitionSpecs).

  Raises:
    BadInput: a batch that does not divide.
  """
  copies = partitioner.mesh.shape['data']
  if setting.batch_size % copies:
    raise BadInput(
      f'batch_size={setting.batch_size} is not divisible by the {copies} copies of the'
      f' model (devices / model_partitions={setting.model_partitions}).'
    )
  cfg = setting.config
  more = {'decode_fn': sampling.greedy}
  if setting.num_beams > 1:
    more = {'decode_fn': beam_search.beam_search, 'num_decodes': setting.num_beams}
  module = network.Transformer(cfg)
  decode = functools.partial(generate.generate, module, eos_id=EOS, **more)
  params, names = models.decoding_shapes(cfg)
  rules = partitioner.logical_axis_rules
  specs = jax.tree.map(
    lambda names: nn_partitioning.logical_to_mesh_axes(tuple(names), rules),
    names,
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )
  tokens = [
    jax.ShapeDtypeStruct((setting.batch_size, length), jnp.int32)
    for length in (setting.input_length, setting.output_length)
  ]
  rows = partitioner.data_partition_spec
  partitioned = partitioner.partition(decode, (specs, rows, rows), rows)
  return partitioned.lower(params, *tokens), params, specs
