"""Models of any size with random parameters: what a step costs does not depend on them.

Ours, or T5X's own example network, which has the same parameters where K = N.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import unfreeze
from flax.linen import partitioning as nn_partitioning
from jax.sharding import PartitionSpec

from gqa_t5x.analysis.benchmarks import settings
from gqa_t5x.model import network


def module(setting: Any) -> nn.Module:
  """Returns the network of a setting.

  Args:
    setting: has `size`, `config` and `system`: 'gqa_t5x' or 't5x'.

  Raises:
    BadSetting: T5X's example network is asked for and not installed.
  """
  cfg = setting.config
  if setting.system == 'gqa_t5x':
    return network.Transformer(cfg)
  try:
    from t5x.examples.t5 import network as t5x_network
  except ImportError as error:
    raise settings.BadSetting(
      "--compare=t5x needs T5X's own example network (t5x.examples.t5), which is not"
      ' installed; run make setup ENGINE=t5x.'
    ) from error
  fields = (field.name for field in dataclasses.fields(t5x_network.T5Config))
  shared = {name: getattr(cfg, name) for name in fields}
  return t5x_network.Transformer(t5x_network.T5Config(**shared))


def params(cfg: network.T5Config, dtype: Any, seed: int = 0) -> dict[str, Any]:
  """Returns parameters of a model's shapes, made on the device.

  They are uniform numbers of the initialisers' size.

  Args:
    cfg: the configuration.
    dtype: of the parameters.
    seed: of the numbers.
  """
  leaves, treedef = jax.tree.flatten(shapes(cfg))

  @functools.partial(jax.jit, static_argnums=1)
  def make(key, shape):
    scale = (3 / shape[0]) ** 0.5
    return jax.random.uniform(key, shape, dtype, -scale, scale)

  keys = jax.random.split(jax.random.PRNGKey(seed), len(leaves))
  values = [make(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(treedef, values)


def shapes(cfg: network.T5Config) -> dict[str, Any]:
  """Returns the tree of a model's parameters as shapes."""
  return variable_shapes(cfg)['params']


def variable_shapes(cfg: network.T5Config) -> dict[str, Any]:
  """Returns a model's parameters, and the logical axes of each in `params_axes`."""
  tokens = jnp.ones((1, 1), jnp.int32)
  return jax.eval_shape(
    lambda: network.Transformer(cfg).init(
      jax.random.PRNGKey(0), tokens, tokens, tokens, enable_dropout=False
    )
  )


def partition_specs(variables: Mapping[str, Any], rules: Any) -> dict[str, Any]:
  """Returns how each parameter is sharded.

  Args:
    variables: from `variable_shapes`.
    rules: from logical to mesh axes.

  Returns:
    The tree of parameters with PartitionSpecs.
  """
  names = nn_partitioning.get_axis_names(variables['params_axes'])
  return jax.tree.map(
    lambda names: nn_partitioning.logical_to_mesh_axes(tuple(names), rules),
    unfreeze(names),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )
