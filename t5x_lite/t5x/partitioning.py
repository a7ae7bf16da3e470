"""Lays arrays out over the devices of one host by logical axis names."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax.linen import partitioning as flax_partitioning
from jax.interpreters import pxla
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x import train_state as train_state_lib

LogicalAxisRules = Sequence[tuple[str, str | None]]


def global_mesh_defined() -> bool:
  """Whether the caller runs inside a mesh context."""
  return not pxla.thread_resources.env.physical_mesh.empty


def with_sharding_constraint(x, axis_resources):
  """`jax.lax.with_sharding_constraint`, without effect on CPU or outside a mesh."""
  if jax.devices()[0].platform == 'cpu' or not global_mesh_defined():
    return x
  return jax.lax.with_sharding_constraint(x, axis_resources)


def default_mesh(
  num_partitions: int | None, model_parallel_submesh: Sequence[int] | None = None
) -> Mesh:
  """Splits the devices of this host into `data` x `model`.

  Like T5X, on CPU without a submesh all devices go to `model`.

  Raises:
    ValueError: if the partitions do not divide the devices.
  """
  devices = np.array(jax.devices())
  if model_parallel_submesh:
    model = int(np.prod(model_parallel_submesh))
  else:
    model = len(devices) if devices[0].platform == 'cpu' else num_partitions
  if len(devices) % model:
    raise ValueError(
      f'{model} model partitions do not divide {len(devices)} devices; choose '
      'num_partitions among the divisors of the number of devices'
    )
  return Mesh(devices.reshape(-1, model), ('data', 'model'))


def standard_logical_axis_rules(
  activation_partitioning_dims: int = 1,
  parameter_partitioning_dims: int = 1,
  additional_rules: LogicalAxisRules | None = None,
) -> LogicalAxisRules:
  """T5X's rules from logical to mesh axes.

  Args:
    activation_partitioning_dims: 2 also splits activations' `embed` over `model`.
    parameter_partitioning_dims: 2 also splits parameters' `embed` over `data`.
    additional_rules: appended, so that they yield to the standard ones.

  Raises:
    ValueError: if a number of dimensions is not 1 or 2.
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


@dataclasses.dataclass
class DataLayout:
  """How a batch is split over hosts (here: one host)."""

  batch_size: int
  shard_id: int
  num_shards: int
  is_first_host_in_replica_set: bool


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
  """Partitions functions and states by logical axis rules."""

  def __init__(
    self,
    num_partitions: int | None = None,
    model_parallel_submesh: Sequence[int] | None = None,
    params_on_devices: bool = True,
    backend: str | None = None,
    ici_mesh_shape: Sequence[int] | None = None,
    dcn_mesh_shape: Sequence[int] | None = None,
    logical_axis_rules: LogicalAxisRules | None = None,
  ):
    """Chooses the mesh and the rules.

    Args:
      num_partitions: size of the `model` axis (off CPU).
      model_parallel_submesh: four numbers whose product is that size, instead.
      params_on_devices: must be True here.
      backend: must be None here.
      ici_mesh_shape: must be None here (meshes over several TPU slices).
      dcn_mesh_shape: must be None here.
      logical_axis_rules: by default `standard_logical_axis_rules()`.

    Raises:
      ValueError: if neither or both sizes are given, or T5X itself is needed.
    """
    if bool(num_partitions) == bool(model_parallel_submesh):
      raise ValueError(
        f'num_partitions={num_partitions} and model_parallel_submesh='
        f'{model_parallel_submesh}: give exactly one'
      )
    if backend or ici_mesh_shape or dcn_mesh_shape or not params_on_devices:
      raise ValueError(
        'backend, ici_mesh_shape, dcn_mesh_shape and params_on_devices=False need the '
        'real T5X; this is the stand-in for one host'
      )
    self._num_partitions = num_partitions
    self._model_parallel_submesh = model_parallel_submesh
    rules = logical_axis_rules or standard_logical_axis_rules()
    self._logical_axis_rules = tuple(tuple(rule) for rule in rules)
    (self._data_axis,) = flax_partitioning.logical_to_mesh_axes(
      ('batch',), self._logical_axis_rules
    )

  @functools.cached_property
  def mesh(self) -> Mesh:
    return default_mesh(self._num_partitions, self._model_parallel_submesh)

  @property
  def logical_axis_rules(self) -> LogicalAxisRules:
    return self._logical_axis_rules

  @property
  def data_partition_spec(self) -> PartitionSpec:
    return PartitionSpec(self._data_axis)

  def get_data_layout(self, batch_size: int | None = None) -> DataLayout:
    """Returns the layout of a batch.

    Raises:
      ValueError: if the batch does not divide over the mesh's data axis.
    """
    size = self.mesh.shape[self._data_axis] if self._data_axis else 1
    batch_size = batch_size or size
    if batch_size % size:
      raise ValueError(
        f'batch size {batch_size} is not divisible by the data mesh size {size}; '
        f'choose a multiple of {size}'
      )
    return DataLayout(batch_size, 0, 1, True)

  def get_logical_axes(self, train_state: train_state_lib.TrainState):
    """Returns the state with logical axis names, or None, as leaves."""
    return train_state.as_logical_axes()

  def get_mesh_axes(self, train_state: train_state_lib.TrainState):
    """Returns the state with `PartitionSpec`s of mesh axes, or None, as leaves."""
    rules = self._logical_axis_rules
    return jax.tree.map(
      lambda names: flax_partitioning.logical_to_mesh_axes(tuple(names), rules),
      self.get_logical_axes(train_state),
      is_leaf=is_spec,
    )

  def sharding(self, spec: PartitionSpec | None) -> NamedSharding:
    """The sharding of a spec; None is replicated."""
    return NamedSharding(self.mesh, PartitionSpec() if spec is None else spec)

  def _shardings(self, specs: Any):
    return jax.tree.map(self.sharding, specs, is_leaf=lambda x: x is None or is_spec(x))

  def partition(
    self,
    fn: Callable[..., Any],
    in_axis_resources: Any,
    out_axis_resources: Any,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
  ) -> PartitionedFunction:
    """Jits a function.

    Args:
      fn: takes positional arguments.
      in_axis_resources: a spec (None is replicated), or a tree of them, per argument.
      out_axis_resources: the same for the outputs.
      static_argnums: arguments that are compile-time constants.
      donate_argnums: arguments whose memory the outputs may take over.
    """
    jitted = jax.jit(
      fn,
      in_shardings=self._shardings(in_axis_resources),
      out_shardings=self._shardings(out_axis_resources),
      static_argnums=static_argnums,
      donate_argnums=donate_argnums,
    )
    return PartitionedFunction(jitted, self.mesh, self._logical_axis_rules)

  def compile(self, partitioned_fn: PartitionedFunction, *args):
    """Compiles a partitioned function for arguments of these shapes."""
    return partitioned_fn.lower(*args).compile()


def is_spec(x) -> bool:
  """Whether a tree's node is a `PartitionSpec`, which counts as a leaf."""
  return isinstance(x, PartitionSpec)


BasePartitioner = BasePjitPartitioner = PjitPartitioner
