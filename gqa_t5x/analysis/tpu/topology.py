"""TPU slices without a TPU: devices to compile for, from the compiler in libtpu.

A slice is written `GENERATION:SHAPE`, in chips: v4:2x2x2 is 8 chips. A chip is one
device, but of v3, whose two cores are two.
"""

import contextlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
from jax.experimental import topologies

from gqa_t5x.analysis.tpu.chips import CHIPS
from gqa_t5x.errors import BadInput

GENERATIONS = tuple(name for name, chip in CHIPS.items() if chip.links)
# Two cores act as one device, and a host has 2 x 2 x 1 chips.
MEGACORE = {
  'chip_config_name': 'megacore',
  'chips_per_host_bounds': (2, 2, 1),
  'num_slices': 1,
}
OPTIONS = {'v4': MEGACORE, 'v5p': MEGACORE}


def parse(name: str) -> tuple[str, tuple[int, ...]]:
  """Returns (generation, chips in each dimension) of the name of a slice.

  BadInput for an unknown generation, no shape, or more chips than a pod has.
  """
  generation, _, shape = name.partition(':')
  if generation not in GENERATIONS:
    raise BadInput(
      f'topology={name}: {generation!r} is unknown; choose one of'
      f' {", ".join(GENERATIONS)}, and a shape in chips: v4:2x2x2.'
    )
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', shape):
    raise BadInput(
      f'topology={name}: {shape!r} is no shape in chips; write it as in v4:2x2x2.'
    )
  dimensions = tuple(int(n) for n in shape.split('x'))
  chips, pod = math.prod(dimensions), CHIPS[generation].pod
  if chips > pod:
    raise BadInput(f'topology={name}: {chips} chips are more than a pod has, {pod}.')
  return generation, dimensions


def devices(name: str) -> Sequence[jax.Device]:
  """Returns the devices of a slice; programs can be compiled for them, but not run.

  BadInput if there is no such slice, or libtpu is not installed.
  """
  generation, shape = parse(name)
  options = dict(OPTIONS.get(generation, {}))
  if math.prod(shape) < 4:  # Less than a host.
    options['chips_per_host_bounds'] = (*shape, 1)[:3]
  # Without a TPU, libtpu would look for one at Google Cloud's metadata server.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # Nothing runs on a TPU here, so that several may compile at a time.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  with quiet(BadInput):
    try:
      return topologies.get_topology_desc(name, 'tpu', **options).devices
    except Exception as error:  # libtpu raises RuntimeError, JaxRuntimeError and more.
      if 'not installed' in str(error):
        raise BadInput(
          'The TPU compiler is not installed;'
          " pip install --constraint constraints.txt 'jax[tpu]'."
        ) from error
      said = str(error).strip().split('\n')[0][:200]
      raise BadInput(
        f'topology={name}: the compiler knows no such slice; shapes that Google Cloud'
        f' offers are in its pages of {generation}. It said: {said}'
      ) from error


@contextlib.contextmanager
def quiet(*expected: type[Exception]) -> Iterator[None]:
  """Holds back what is written to stderr, by C++ too, and shows it on an error.

  Exceptions that are `expected` say enough by themselves: nothing is shown.
  """
  sys.stderr.flush()
  terminal, failed = os.dup(2), False
  with tempfile.TemporaryFile() as held_back:
    os.dup2(held_back.fileno(), 2)
    try:
      yield
    except Exception as error:
      failed = not isinstance(error, expected)
      raise
    finally:
      sys.stderr.flush()
      os.dup2(terminal, 2)
      os.close(terminal)
      if failed:
        held_back.seek(0)
        os.write(2, held_back.read())
