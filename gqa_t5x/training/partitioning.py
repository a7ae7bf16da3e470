"""T5X's partitioner with a mesh for every chip, and the partitions that were asked for.

T5X's own ignores num_partitions on CPUs, and knows no mesh for TPU v5e, v5p and v6e,
nor one of 8 partitions for 8 chips of v4.
"""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from t5x import partitioning

from gqa_t5x.errors import BadInput


class Partitioner(partitioning.PjitPartitioner):
  """T5X's PjitPartitioner on a mesh of `data` x `model`.

  Neighbouring partitions of a model are neighbours in the TPU's network where possible,
  and the devices of a host are a block of the mesh, as T5X needs them.

  Attributes:
    devices: what the mesh is made of; None is `jax.devices()`. Set it before `mesh` is
      used, to compile for devices that are not here.
  """

  devices: Sequence[jax.Device] | None = None

  def __init__(
    self,
    num_partitions: int,
    model_parallel_submesh: tuple[int, int, int, int] | None = None,
    logical_axis_rules: Sequence[tuple[str, str | None]] | None = None,
  ):
    """Keeps its arguments; the mesh is made when it is used.

    Args:
      num_partitions: devices that share a copy of the model.
      model_parallel_submesh: of a TPU, if T5X shall make the mesh: the size along x, y
        and z, and the cores of a chip. None: the mesh is made here.
      logical_axis_rules: see T5X; `axes.kv_head_rules` must be among them.

    Raises:
      BadInput: if the two sizes differ.
    """
    self.num_partitions = num_partitions
    self.model_parallel_submesh = model_parallel_submesh
    if model_parallel_submesh and math.prod(model_parallel_submesh) != num_partitions:
      raise BadInput(
        f'model_parallel_submesh={tuple(model_parallel_submesh)} has'
        f' {math.prod(model_parallel_submesh)} devices, and num_partitions is'
        f' {num_partitions}; MODEL_PARTITIONS must be their number.'
      )
    super().__init__(
      num_partitions=None if model_parallel_submesh else num_partitions,
      model_parallel_submesh=model_parallel_submesh,
      logical_axis_rules=logical_axis_rules,
    )

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The mesh; BadInput if partitions do not divide the devices or a host."""
    if self.model_parallel_submesh and self.devices is None:
      return super().mesh
    if self.model_parallel_submesh:
      raise BadInput(
        f'model_parallel_submesh={tuple(self.model_parallel_submesh)} is laid out by'
        ' T5X, on the devices that are here alone; set MODEL_PARALLEL_SUBMESH = None.'
      )
    devices = list(jax.devices() if self.devices is None else self.devices)
    _check_partitions(self.num_partitions, devices)
    in_order = np.array(sorted(devices, key=_place(devices)))
    return Mesh(in_order.reshape(-1, self.num_partitions), ('data', 'model'))


def on_one_device(partitioner: Partitioner) -> Partitioner:
  """Returns it with the first device as its mesh: what is exported runs anywhere."""
  partitioner.devices = jax.devices()[:1]
  return partitioner


def _check_partitions(num_partitions: int, devices: Sequence[jax.Device]) -> None:
  host = _on_first_host(devices)
  fit = [
    n
    for n in range(1, len(devices) + 1)
    if len(devices) % n == 0 and (len(host) % n == 0 or n % len(host) == 0)
  ]
  if num_partitions not in fit:
    raise BadInput(
      f'num_partitions={num_partitions} does not fit {len(devices)} devices,'
      f' {len(host)} on each host; set MODEL_PARTITIONS to one of'
      f' {", ".join(map(str, fit))}.'
    )


def _on_first_host(devices: Sequence[jax.Device]) -> list[jax.Device]:
  return [d for d in devices if d.process_index == devices[0].process_index]


def _place(devices: Sequence[jax.Device]):
  """Returns the key by which devices are sorted, so that each is next to the last.

  On a TPU the order goes up and down the columns of a host, from host to host along x
  and back, and so on along y and z.
  """
  if devices[0].platform != 'tpu':
    return lambda device: (device.process_index, device.id)
  rows = len({device.coords[1] for device in _on_first_host(devices)})

  def place(device: jax.Device) -> list[int]:
    x, y, z = device.coords
    key, turns = [], 0
    slice_index = getattr(device, 'slice_index', 0)
    for step in (slice_index, z, y // rows, x, y % rows, device.core_on_chip):
      key.append(-step if turns % 2 else step)
      turns += step
    return key

  return place
