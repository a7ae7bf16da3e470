"""Sharding by logical axis names, in whatever mesh a function is traced for.

T5X's partitioner enters its mesh by `with mesh:`. Flax's own with_sharding_constraint
looks for the mesh of `jax.set_mesh` alone, and under T5X's does nothing, silently
(flax 0.12.8). Here both count.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence

import jax
from flax.linen import partitioning as nn_partitioning
from jax import Array
from jax.interpreters import pxla
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


def current_mesh() -> Mesh | AbstractMesh | None:
  mesh = pxla.thread_resources.env.physical_mesh
  if mesh.empty:
    mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


_traced_for = contextvars.ContextVar('traced_for', default=None)


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
  """Makes `name` the platform of what is traced, whatever devices are here."""
  token = _traced_for.set(name)
  try:
    yield
  finally:
    _traced_for.reset(token)


def platform() -> str:
  """Returns 'cpu', 'gpu' or 'tpu', of the mesh: its devices need not be here."""
  if (name := _traced_for.get()) is not None:
    return name
  mesh = current_mesh()
  if isinstance(mesh, Mesh):
    return mesh.devices.flat[0].platform
  return jax.default_backend()


def parts(name: str) -> int:
  """Returns into how many parts the mesh cuts a logical axis of axes.py."""
  (over,) = spec([name]) or (None,)
  return math.prod(current_mesh().shape[axis] for axis in jax.tree.leaves(over))


def spec(names: Sequence[str | None]) -> PartitionSpec:
  """Returns the mesh axes of logical ones; without a mesh, of none."""
  rules = nn_partitioning.get_axis_rules()
  if current_mesh() is None or not rules:
    return PartitionSpec(*[None] * len(names))
  return nn_partitioning.logical_to_mesh_axes(tuple(names), rules)


def constrain(x: Array, names: Sequence[str | None]) -> Array:
  """Shards dimensions by their logical axes (None: not); without a mesh, not at all."""
  mesh = current_mesh()
  if mesh is None or not nn_partitioning.get_axis_rules():
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names)))
