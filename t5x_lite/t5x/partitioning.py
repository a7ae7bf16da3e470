"""Lays arrays out over the devices of all hosts by logical axis names."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.linen import partitioning as flax_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x import train_state as train_state_lib

LogicalAxisRules = Sequence[tuple[str, str | None]]


def standard_logical_axis_rules(
  activation_partitioning_dims: int = 1,
  parameter_partitioning_dims: int = 1,
  additional_rules: LogicalAxisRules | None = None,
) -> LogicalAxisRules:
  """T5X's rules from logical to mesh axes.

  Dimensions of 2 also split `embed`: of activations over `model`, of parameters over
  `data`. Additional rules yield to the standard ones.
  """
  dims = (activation_partitioning_dims, parameter_partitioning_dims)
  if not set(dims) <= {1, 2}:
    raise ValueError(
      f'activation_partitioning_dims={dims[0]} and parameter_partitioning_dims='
      f'{dims[1]}: each must be 1 or 2'
    )
  rules = [('batch', 'data'), ('vocab', 'model')]
  if dims == (1, 1):
    rules.append(('embed', None))
  rules += [('mlp', 'model'), ('heads', 'model'), ('kv', None), ('joined_kv', 'model')]
  if dims[0] == 2:
    rules.append(('embed', 'model'))
  if dims[1] == 2:
    rules.append(('embed', 'data'))
  replicated = 'relpos_buckets abspos_buckets length layers stack mlp_activations'
  rules += [(name, None) for name in replicated.split()]
  return rules + list(additional_rules or [])


def with_sharding_constraint(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  """Shards an array within a jitted function; as in T5X, not on CPUs."""
  if jax.default_backend() == 'cpu':
    return x
  return jax.lax.with_sharding_constraint(x, spec)


@dataclasses.dataclass
class DataLayout:
  """Which part of a batch of `batch_size` rows this host reads."""

  batch_size: int
  shard_id: int
  num_shards: int


class PartitionedFunction:
  """A jitted function that runs and lowers within its mesh and axis rules."""

  def __init__(self, jitted, mesh: Mesh, rules: LogicalAxisRules):
    self._jitted, self._mesh, self._rules = jitted, mesh, rules

  def __call__(self, *args):
    with self._mesh, flax_partitioning.axis_rules(self._rules):
      return self._jitted(*args)

  def lower(self, *args):
    with self._mesh, flax_partitioning.axis_rules(self._rules):
      return self._jitted.lower(*args)


class PjitPartitioner:
  """Partitions functions and states by logical axis rules.

  Arguments are T5X's: exactly one of the two sizes is given.
  """

  def __init__(
    self,
    num_partitions: int | None = None,
    model_parallel_submesh: Sequence[int] | None = None,
    logical_axis_rules: LogicalAxisRules | None = None,
  ):
    if bool(num_partitions) == bool(model_parallel_submesh):
      raise ValueError(
        f'num_partitions={num_partitions} and model_parallel_submesh='
        f'{model_parallel_submesh}: give exactly one'
      )
    self._num_partitions = num_partitions
    self._model_parallel_submesh = model_parallel_submesh
    rules = logical_axis_rules or standard_logical_axis_rules()
    self.logical_axis_rules = tuple(tuple(rule) for rule in rules)
    self.data_partition_spec = self._to_mesh_axes(('batch',))

  def _to_mesh_axes(self, names: Sequence[str | None]) -> PartitionSpec:
    rules = self.logical_axis_rules
    return flax_partitioning.logical_to_mesh_axes(tuple(names), rules)

  @functools.cached_property
  def mesh(self) -> Mesh:
    """Devices as `data` x `model`; on CPU, as in T5X, all of a host go to `model`."""
    devices, model = np.array(jax.devices()), self._num_partitions
    if self._model_parallel_submesh:
      model = int(np.prod(self._model_parallel_submesh))
    elif devices[0].platform == 'cpu':
      model = jax.local_device_count()
    if len(devices) % model:
      raise ValueError(
        f'{model} model partitions do not divide {len(devices)} devices; choose '
        'num_partitions among the divisors of the number of devices'
      )
    return Mesh(devices.reshape(-1, model), ('data', 'model'))

  def check_batch_size(self, batch_size: int) -> None:
    """Raises a ValueError if a batch does not divide over the mesh's data axis."""
    (axis,) = self.data_partition_spec
    size = self.mesh.shape[axis] if axis else 1
    if batch_size % size:
      raise ValueError(
        f'batch size {batch_size} is not divisible by the data mesh size {size}; '
        f'choose a multiple of {size}'
      )

  def get_data_layout(self, batch_size: int) -> DataLayout:
    """Returns which part of a batch this host reads; see `check_batch_size`."""
    self.check_batch_size(batch_size)
    devices, local = self.mesh.devices, self.mesh.local_mesh.devices
    first_row = int(np.argwhere(devices == local[0, 0])[0, 0])
    return DataLayout(
      batch_size, first_row // len(local), num_shards=len(devices) // len(local)
    )

  def batch_of_all_hosts(self, batch: Mapping[str, np.ndarray]) -> Any:
    """Returns a batch on the devices, from what each host read of it."""
    rows = self.sharding(self.data_partition_spec)
    return {
      k: jax.make_array_from_process_local_data(rows, x) for k, x in batch.items()
    }

  def get_mesh_axes(self, train_state: train_state_lib.TrainState):
    """Returns the state with `PartitionSpec`s of mesh axes, or None, as leaves."""
    axes = train_state.as_logical_axes()
    return jax.tree.map(self._to_mesh_axes, axes, is_leaf=_is_spec)

  def sharding(self, spec: PartitionSpec | None) -> NamedSharding:
    """The sharding of a spec; None is replicated."""
    return NamedSharding(self.mesh, PartitionSpec() if spec is None else spec)

  def partition(
    self,
    fn: Callable[..., Any],
    in_axis_resources: Any,
    out_axis_resources: Any,
    donate_argnums: int | Sequence[int] = (),
  ) -> PartitionedFunction:
    """Jits a function of positional arguments.

    Resources are a spec (None is replicated), or a tree of them, per argument.
    """
    in_shardings, out_shardings = jax.tree.map(
      self.sharding,
      (in_axis_resources, out_axis_resources),
      is_leaf=lambda x: x is None or _is_spec(x),
    )
    jitted = jax.jit(
      fn,
      in_shardings=in_shardings,
      out_shardings=out_shardings,
      donate_argnums=donate_argnums,
    )
    return PartitionedFunction(jitted, self.mesh, self.logical_axis_rules)


def _is_spec(x) -> bool:
  return isinstance(x, PartitionSpec)
