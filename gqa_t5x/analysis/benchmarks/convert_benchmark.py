"""Times the conversion of a checkpoint, and `cp` of it on the same disk."""

import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from gqa_t5x.analysis import models
from gqa_t5x.analysis.benchmarks import workload
from gqa_t5x.checkpoints import writer
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, TensorSpec, Unit
from gqa_t5x.conversion.methods import METHODS
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network

COLUMNS = {
  'size': 'size',
  'num_kv_heads': 'K',
  'method': 'method',
  'compression': 'compression',
  'seconds': 'seconds',
  'cp_seconds': 'cp',
  'cp_fraction': 'of cp',
  'gb_per_s': 'GB/s',
  'peak_mb': 'peak MB',
}
STEP = 1000
# What the child process does: it alone knows how much memory it had at most.
_CHILD = """
import sys, time
from gqa_t5x import convert
start = time.perf_counter()
code = convert.main(sys.argv)
seconds = time.perf_counter() - start
with open('/proc/self/status', encoding='utf-8') as file:
  peak = next(int(line.split()[1]) for line in file if line.startswith('VmHWM'))
print(seconds, 1024 * peak)
sys.exit(code)
"""


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is converted, from an uncompressed source.

  Attributes:
    size: a key of sizes.SIZES.
    num_kv_heads: K of the result.
    method: a key of METHODS that needs no statistics.
    compression: of the result, a key of writer.COMPRESSORS.
  """

  size: str
  num_kv_heads: int
  method: str
  compression: str

  def check(self) -> None:
    """Raises BadInput for what cannot be."""
    models.config(self.size, self.num_kv_heads, 'float32')
    for name, known in (('method', METHODS), ('compression', writer.COMPRESSORS)):
      if getattr(self, name) not in known:
        raise BadInput(f'{name}={getattr(self, name)}; choose from {", ".join(known)}.')


def measure(
  chosen: Sequence[Setting], repeats: int, command: str, work_dir: str = '.'
) -> Iterator[dict[str, Any]]:
  """Yields rows of kind 'convert_benchmark'; see `benchmark.run`.

  The source is in the page cache. `work_dir` is a folder on the disk to measure; what
  is written there is removed. BadInput if there is no space.
  """
  root = pathlib.Path(work_dir).absolute() / 'gqa_t5x_benchmark.tmp'
  try:
    for setting in chosen:
      source = root / setting.size / f'checkpoint_{STEP}'
      if not source.exists():
        shutil.rmtree(root, ignore_errors=True)
        _write_random(setting.size, source)
      rounds = [_round(setting, source, root) for _ in range(repeats)]
      yield _row(setting, source, rounds, command)
  finally:
    shutil.rmtree(root, ignore_errors=True)


def _write_random(size: str, path: pathlib.Path) -> None:
  """Writes an uncompressed checkpoint of random float32 in T5X's legacy layout."""
  shapes = models.variable_shapes(network.config(size))['params']
  leaves = traverse_util.flatten_dict({'target': shapes}, sep='/')

  def random(seed, name, shape):
    rng = np.random.default_rng(seed)
    return {name: rng.random(shape, np.float32) - 0.5}

  units = [
    Unit(
      {name: TensorSpec(leaf.shape, np.dtype(np.float32))},
      functools.partial(random, seed, name, leaf.shape),
    )
    for seed, (name, leaf) in enumerate(leaves.items())
  ]
  step = LazyTensor.of(np.asarray(STEP, np.int32))
  units.append(Unit({'state/step': step}, lambda: {'state/step': step.read()}))
  path.parent.mkdir(parents=True)
  writer.write_checkpoint(
    epath.Path(path), units, lambda nbytes: None, compression='none'
  )


def _round(
  setting: Setting, source: pathlib.Path, root: pathlib.Path
) -> tuple[float, float, int, int]:
  """Returns seconds of the conversion and of `cp`, peak memory, bytes written."""
  output = root / 'converted'
  arguments = dataclasses.asdict(setting) | {'input': source, 'output': output}
  del arguments['size']
  words = [f'--{name}={value}' for name, value in arguments.items()]
  done = subprocess.run(
    [sys.executable, '-c', _CHILD, *words], capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise BadInput(done.stderr.strip().splitlines()[-1].removeprefix('error: '))
  seconds, peak = done.stdout.splitlines()[-1].split()
  written = _size(output)
  shutil.rmtree(output)
  # Both write to the disk, not to the page cache alone.
  start = time.perf_counter()
  subprocess.run(['cp', '-r', source, output], check=True)
  os.sync()
  cp_seconds = time.perf_counter() - start
  shutil.rmtree(output)
  return float(seconds), cp_seconds, int(peak), written


def _size(folder: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())


def _row(
  setting: Setting, source: pathlib.Path, rounds: Sequence[tuple], command: str
) -> dict[str, Any]:
  """Returns a row; `python -m gqa_t5x.benchmark convert --help` explains its keys."""
  seconds, cp_seconds, peak, written = (float(x) for x in np.median(rounds, axis=0))
  nbytes = _size(source)
  return workload.common_keys('convert_benchmark', command, vars(setting)) | {
    'seconds': seconds,
    'cp_seconds': cp_seconds,
    'cp_fraction': cp_seconds / seconds,
    'input_bytes': nbytes,
    'output_bytes': int(written),
    'gb_per_s': 1e-9 * nbytes / seconds,
    'peak_mb': 1e-6 * peak,
  }
