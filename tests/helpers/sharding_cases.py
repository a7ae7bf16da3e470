"""What the tests of sharding share: a small model, its meshes, what is split how."""

import contextlib
import functools

import jax
import numpy as np
from flax import traverse_util
from flax.linen import partitioning as nn_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from t5x import partitioning as t5x_partitioning

from gqa_t5x.model import axes, network
from gqa_t5x.training import partitioning
from helpers import model_oracle as oracle

DEVICES, N, H, V = 8, 8, 8, 64
# So long that keys and values are larger than all activations of a step.
B, S, T = 16, 40, 40
EOS = 1


@functools.cache
def config(K: int, **overrides) -> network.T5Config:
  sizes = dict(
    vocab_size=V,
    emb_dim=32,
    mlp_dim=48,
    num_heads=N,
    head_dim=H,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_activations=('gelu', 'linear'),
    dropout_rate=0.0,
  )
  return network.T5Config(**sizes | overrides, num_kv_heads=K)


@functools.cache
def partitioner(K, num_partitions, kv_sharding=None, parameter_dims=1):
  rules = t5x_partitioning.standard_logical_axis_rules(
    1,
    parameter_dims,
    axes.kv_head_rules(None if K == N else K, num_partitions, kv_sharding),
  )
  return partitioning.Partitioner(num_partitions, logical_axis_rules=rules)


@contextlib.contextmanager
def entered(layout):
  """As T5X enters its mesh."""
  with layout.mesh, nn_partitioning.axis_rules(layout.logical_axis_rules):
    yield


def sharded_params(cfg, layout):
  """Parameters lie where their logical axes say."""
  names, put = oracle.axis_names(oracle.initial_shapes(cfg)), {}
  for path, value in oracle.flat(oracle.params(cfg)).items():
    spec = nn_partitioning.logical_to_mesh_axes(names[path], layout.logical_axis_rules)
    put[path] = jax.device_put(value, NamedSharding(layout.mesh, spec))
  return traverse_util.unflatten_dict(put, sep='/')


def sharded_rows(layout, *arrays):
  """As many rows as divide lie on the data axis; others are replicated."""
  data = layout.mesh.shape['data']
  spec = PartitionSpec('data' if len(arrays[0]) % data == 0 else None)
  return [jax.device_put(x, NamedSharding(layout.mesh, spec)) for x in arrays]


@functools.cache
def batch(rows=B):
  """Inputs, decoder inputs and targets; some are shorter."""
  rng = np.random.default_rng(0)
  inputs, targets = (rng.integers(2, V, (rows, n)).astype(np.int32) for n in (S, T))
  inputs[::3, 8:] = 0
  targets[1::3, 4:] = 0
  return inputs, np.pad(targets[:, :-1], ((0, 0), (1, 0))), targets
