"""Lays a model out over the devices there are, without T5X."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax.core import unfreeze
from flax.linen import partitioning as nn_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa_t5x.errors import BadInput
from gqa_t5x.model import axes, network, quantize

DATA, MODEL = 'data', 'model'


class OneDevice:
  """A model on the first device."""

  def put_params(self, params: Any) -> Any:
    return jax.device_put(params)

  def run(self, function: Any, *args: Any) -> Any:
    """Calls a compiled function."""
    return function(*args)


class Layout:
  """A mesh of all devices: copies of the model by devices that share one.

  Args:
    cfg: the model's.
    model_partitions: devices that share a copy.

  Raises:
    BadInput: the devices, or the model's heads, MLP or vocabulary, do not divide.
  """

  def __init__(self, cfg: network.T5Config, model_partitions: int):
    devices = jax.devices()
    sizes = {
      f'the {len(devices)} devices': len(devices),
      f'num_heads={cfg.num_heads}': cfg.num_heads,
      f'mlp_dim={cfg.mlp_dim}': cfg.mlp_dim,
      f'vocab_size={cfg.vocab_size}': cfg.vocab_size,
    }
    for what, number in sizes.items():
      if model_partitions < 1 or number % model_partitions:
        raise BadInput(f'{what} cannot be divided by {model_partitions} partitions')
    self.mesh = Mesh(np.reshape(devices, (-1, model_partitions)), (DATA, MODEL))
    self._cfg = cfg
    kinds = {K for K in (cfg.self_kv, cfg.cross_kv) if cfg.num_heads != K}
    K = int(np.gcd.reduce(list(kinds))) if kinds else None
    split = {axes.VOCAB, axes.MLP, axes.HEADS, axes.JOINED_HEADS}
    whole = {axes.LENGTH, axes.EMBED, axes.HEAD_DIM, axes.RELPOS_BUCKETS}
    self._rules = (
      (axes.BATCH, DATA),
      *((name, MODEL) for name in sorted(split)),
      *((name, None) for name in sorted(whole)),
      *axes.kv_head_rules(K, model_partitions),
    )

  @contextlib.contextmanager
  def entered(self) -> Iterator[None]:
    """What is traced inside is sharded."""
    with self.mesh, nn_partitioning.axis_rules(self._rules):
      yield

  def put_params(self, params: Any) -> Any:
    """Shards the parameters of a `network.Transformer`; they may be int8."""
    tokens = np.ones((1, 1), np.int32)
    variables = jax.eval_shape(
      lambda: network.Transformer(self._cfg).init(
        jax.random.PRNGKey(0), tokens, tokens, tokens, enable_dropout=False
      )
    )
    names = unfreeze(nn_partitioning.get_axis_names(variables['params_axes']))
    if quantize.are_int8(params):
      names = quantize.axes_to_int8(names)
    shardings = jax.tree.map(
      lambda n: NamedSharding(
        self.mesh, nn_partitioning.logical_to_mesh_axes(tuple(n), self._rules)
      ),
      names,
      is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    return jax.device_put(params, shardings)

  def run(self, function: Any, *args: Any) -> Any:
    """Calls a compiled function, its NumPy arrays split over the devices."""
    args = [
      self.put_rows(x) if isinstance(x, np.ndarray) and x.ndim == 2 else x for x in args
    ]
    with self.entered():
      return function(*args)

  def put_rows(self, array: np.ndarray) -> jax.Array:
    """Splits the rows of a batch over the copies of the model, if they divide."""
    copies = self.mesh.shape[DATA]
    spec = PartitionSpec(DATA if len(array) % copies == 0 else None)
    return jax.device_put(array, NamedSharding(self.mesh, spec))
