"""The mesh of devices: as many partitions as were asked for, on every chip."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from gqa_t5x.analysis.tpu import topology
from gqa_t5x.errors import BadInput
from gqa_t5x.training import partitioning


@dataclasses.dataclass(frozen=True)
class Device:
  """What the partitioner looks at."""

  id: int
  process_index: int
  coords: tuple[int, int, int] = (0, 0, 0)
  core_on_chip: int = 0
  slice_index: int = 0
  platform: str = 'tpu'


def tpu(x, y, z=1, cores=1, slices=1, host=(2, 2)) -> list[Device]:
  """The devices of a TPU in JAX's order: host by host, each along x, then y."""
  hosts = itertools.product(
    range(slices), range(z), range(y // host[1]), range(x // host[0])
  )
  found = []
  for process, (slice_, c, host_y, host_x) in enumerate(hosts):
    for b, a, core in itertools.product(range(host[1]), range(host[0]), range(cores)):
      coords = (host_x * host[0] + a, host_y * host[1] + b, c)
      found.append(Device(len(found), process, coords, core, slice_))
  return found


def mesh(num_partitions, devices=None):
  partitioner = partitioning.Partitioner(num_partitions)
  partitioner.devices = devices
  return partitioner.mesh


# --- CPUs and GPUs ------------------------------------------------------------


@pytest.mark.parametrize('num_partitions', [1, 2, 4, 8])
def test_partitions_count_on_cpu(num_partitions):
  """T5X's own partitioner makes 8 of any number."""
  got = mesh(num_partitions)
  assert dict(got.shape) == {'data': 8 // num_partitions, 'model': num_partitions}
  assert [device.id for device in got.devices.flat] == list(range(8))
  assert got.devices.flat[7] is jax.devices()[7]


def test_what_t5x_makes_of_the_mesh():
  partitioner = partitioning.Partitioner(2)
  layout = partitioner.get_data_layout(12)
  assert (layout.batch_size, layout.shard_id, layout.num_shards) == (12, 0, 1)
  assert partitioner.data_partition_spec == jax.sharding.PartitionSpec('data')
  with pytest.raises(ValueError, match=r'(?i)batch size \(?6\)? .*divisible'):
    partitioner.get_data_layout(6)


def test_hosts_of_gpus_stay_together():
  devices = [Device(i, i // 4, platform='gpu') for i in range(8)]
  shuffled = [devices[i] for i in (5, 0, 3, 6, 1, 7, 2, 4)]
  got = mesh(2, shuffled).devices
  assert [[device.id for device in row] for row in got] == [
    [0, 1],
    [2, 3],
    [4, 5],
    [6, 7],
  ]


@pytest.mark.parametrize(
  ('devices', 'num_partitions', 'message'),
  [
    (None, 3, '3 does not fit 8 devices, 8 on each host; set {}one of 1, 2, 4, 8.'),
    (None, 16, '16 does not fit 8 devices, 8 on each host; set {}one of 1, 2, 4, 8.'),
    # It divides the devices, but a copy of the model would lie on one host and a half.
    (
      tpu(2, 6),
      6,
      '6 does not fit 12 devices, 4 on each host; set {}one of 1, 2, 4, 12.',
    ),
  ],
)
def test_partitions_that_do_not_fit(devices, num_partitions, message):
  with pytest.raises(ValueError) as error:
    mesh(num_partitions, devices)
  assert str(error.value) == 'num_partitions=' + message.format('MODEL_PARTITIONS to ')


def test_submesh():
  """T5X makes the mesh; the number is still that of the rules."""
  got = partitioning.Partitioner(4, (1, 1, 1, 4)).mesh
  assert dict(got.shape) == {'data': 2, 'model': 4}
  with pytest.raises(ValueError) as error:
    partitioning.Partitioner(4, (2, 2, 1, 2))
  assert str(error.value) == (
    'model_parallel_submesh=(2, 2, 1, 2) has 8 devices, and num_partitions is 4;'
    ' MODEL_PARTITIONS must be their number.'
  )


def test_submesh_of_devices_that_are_not_here():
  partitioner = partitioning.Partitioner(8, (2, 2, 1, 2))
  partitioner.devices = tpu(4, 4, cores=2)
  with pytest.raises(ValueError) as error:
    _ = partitioner.mesh
  assert str(error.value) == (
    'model_parallel_submesh=(2, 2, 1, 2) is laid out by T5X, on the devices that are'
    ' here alone; set MODEL_PARALLEL_SUBMESH = None.'
  )


# --- TPUs ---------------------------------------------------------------------


# Slice -> its devices, and the partitions of which some neighbours are 2 hops apart:
# those that turn from one row of hosts to the next.
SLICES = {
  'v3:2x2x1': (tpu(2, 2, cores=2), ()),
  'v3:4x4': (tpu(4, 4, cores=2), ()),
  'v3:8x16': (tpu(8, 16, cores=2), ()),
  'v4:2x2x2': (tpu(2, 2, 2), ()),
  'v4:4x4x4': (tpu(4, 4, 4), (16,)),
  'v5e:4x4': (tpu(4, 4), (16,)),
  'v5e:8x8': (tpu(8, 8), ()),
  'v5p:2x2x2': (tpu(2, 2, 2), ()),
  'v5p:4x4x4': (tpu(4, 4, 4), (16,)),
  'v6e:4x4': (tpu(4, 4), (16,)),
}
SLICE_PARTITIONS = [
  (name, partitions)
  for name, (devices, _) in SLICES.items()
  for partitions in (1, 2, 4, 8, 16)
  if partitions <= len(devices)
]


def check_mesh(got: np.ndarray, far: bool) -> None:
  """Every host is a block of the mesh, and neighbours in a row are in the network."""
  hosts = np.vectorize(lambda device: device.process_index)(got)
  for host in np.unique(hosts):
    rows, columns = np.nonzero(hosts == host)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert height * width == len(rows)
    assert rows.min() % height == columns.min() % width == 0
  hops = {  # 0 between the cores of a chip
    sum(abs(i - j) for i, j in zip(a.coords, b.coords, strict=True))
    for row in got
    for a, b in itertools.pairwise(row)
  }
  assert hops == {1, 2} if far else hops <= {0, 1}


@pytest.mark.parametrize(('name', 'num_partitions'), SLICE_PARTITIONS)
def test_neighbours_are_neighbours(name, num_partitions):
  devices, far = SLICES[name]
  check_mesh(mesh(num_partitions, devices).devices, num_partitions in far)


@pytest.mark.parametrize('name', SLICES)
def test_devices_of_libtpu(name):
  """The real ones, in the order of `tpu`."""
  try:
    devices = topology.devices(name)
  except BadInput as error:
    pytest.skip(str(error))
  expected, far = SLICES[name]
  assert [(d.process_index, tuple(d.coords), d.core_on_chip) for d in devices] == [
    (d.process_index, d.coords, d.core_on_chip) for d in expected
  ]
  for _, num_partitions in (case for case in SLICE_PARTITIONS if case[0] == name):
    check_mesh(mesh(num_partitions, devices).devices, num_partitions in far)


def test_slices_come_one_after_the_other():
  """Of several slices, a copy of the model stays within one."""
  got = mesh(4, tpu(2, 2, slices=3)).devices
  assert [{device.slice_index for device in row} for row in got] == [{0}, {1}, {2}]
  check_mesh(got, far=False)
