"""What the tests of gin files and command lines share: runs, readers, a tiny model."""

import atexit
import contextlib
import functools
import importlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from unittest import mock

TESTS = pathlib.Path(__file__).resolve().parent.parent
ROOT = TESTS.parent

# The tiny T5.1.1 with fewer layers, on bytes: a user's own gin file.
TINY_GIN = """
from __gin__ import dynamic_registration

from helpers import tiny_task
from gqa_t5x.model import network

include 'gin/models/t5_1_1_tiny.gin'

VOCABULARY = @tiny_task.vocabulary()
VOCAB_SIZE = 384
ACTIVATION_DTYPE = 'float32'
network.config:
  num_encoder_layers = 1
  num_decoder_layers = 2
"""
TASK_GIN = """
MIXTURE_OR_TASK_NAME = 'tiny_words'
TASK_FEATURE_LENGTHS = {'inputs': 24, 'targets': 8}
BATCH_SIZE = 8
"""
TRAIN_GIN = """
RANDOM_SEED = 0
EVAL_STEPS = 1
WARMUP_STEPS = 100
LOSS_NORMALIZING_FACTOR = None
"""
# A run that keeps its last two checkpoints, and those of every fourth step.
PRETRAINING = {
  'MODEL_DIR': 'mha',
  'TRAIN_STEPS': 6,
  'CHECKPOINT_PERIOD': 2,
  'EVAL_PERIOD': 2,
  'KEEP_CHECKPOINTS': 2,
  'KEEP_PERIOD': 4,
}


# What a command runs, of its module.
FUNCTIONS = {'t5x.train': 'train', 't5x.eval': 'evaluate', 't5x.infer': 'infer'}


@functools.cache
def _compilation_cache() -> str:
  """A folder of this session's, where commands find what others have compiled."""
  folder = tempfile.TemporaryDirectory(prefix='compiled')
  atexit.register(folder.cleanup)
  return folder.name


def environment() -> dict[str, str]:
  """The environment of a command: the same engine, and this repository's code."""
  paths = [os.environ.get('PYTHONPATH', ''), str(ROOT), str(TESTS)]
  return {
    'JAX_COMPILATION_CACHE_DIR': _compilation_cache(),
    'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',  # Compiling takes longer than running.
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
    **os.environ,
    'PYTHONPATH': os.pathsep.join(filter(None, paths)),
    # Unbuffered: lines of both streams in the order in which they were written.
    'PYTHONUNBUFFERED': '1',
  }


def run(folder, *args, timeout=240) -> subprocess.CompletedProcess:
  """Runs `python ARGS` in a folder; the output is text, both streams together."""
  return subprocess.run(
    [sys.executable, *map(str, args)],
    cwd=folder,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
    timeout=timeout,
  )


class Started:
  """`python ARGS` in a process of its own, whose output goes to a file."""

  def __init__(self, folder, *args, **variables):
    self._log = pathlib.Path(folder) / f'{time.monotonic_ns()}.log'
    with self._log.open('w') as log:
      self.process = subprocess.Popen(
        [sys.executable, *args],
        cwd=folder,
        env=environment() | variables,
        stdout=log,
        stderr=subprocess.STDOUT,
      )

  def said(self) -> str:
    return self._log.read_text()

  def end(self, signum: int | None = None) -> str:
    """Sends a signal, if one is given, and waits; returns what the command said."""
    if signum is not None:
      self.process.send_signal(signum)
    self.process.wait(timeout=240)
    return self.said()


def engine_args(module: str, files, search_path=ROOT, **macros) -> list[str]:
  """The arguments of `python` for t5x.train, t5x.eval or t5x.infer."""
  return [
    '-m',
    module,
    f'--gin_search_paths={search_path},.',
    *(f'--gin_file={file}' for file in files),
    *(f'--gin.{name}={value!r}' for name, value in macros.items()),
  ]


def _files(module: str, run_file: str, more_files) -> list[str]:
  files = ['tiny.gin', f'gin/runs/{run_file}.gin', 'task.gin', *more_files]
  return [*files, 'train.gin'] if module == 't5x.train' else files


def engine(folder, module: str, run_file: str, more_files=(), **macros) -> str:
  """Runs an engine's command on the tiny model and task; returns what it printed."""
  write_gin(folder)
  files = _files(module, run_file, more_files)
  done = run(folder, *engine_args(module, files, **macros))
  assert done.returncode == 0, done.stdout[-6000:]
  return done.stdout


def engine_here(folder, module: str, run_file: str, more_files=(), **macros) -> None:
  """Does the same in this process: what a command of its own adds is not tested."""
  write_gin(folder)
  files_here(folder, module, _files(module, run_file, more_files), **macros)


def files_here(folder, module: str, files, **macros) -> None:
  """Runs an engine on gin files in this process, on one device."""
  import jax

  from gqa_t5x.training import partitioning

  bindings = [f'{name} = {value!r}' for name, value in macros.items()]
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.chdir(folder))
    one = mock.patch.object(partitioning.Partitioner, 'devices', jax.devices()[:1])
    stack.enter_context(one)
    jax.config.update('jax_disable_most_optimizations', True)
    stack.callback(jax.config.update, 'jax_disable_most_optimizations', False)
    arguments_of = stack.enter_context(gin_config(files, bindings, f'{ROOT},.'))
    name = FUNCTIONS[module]
    getattr(importlib.import_module(module), name)(**arguments_of(name))


def write_gin(folder) -> None:
  """Writes the tiny model's gin files into a folder."""
  for name, text in (('tiny', TINY_GIN), ('task', TASK_GIN), ('train', TRAIN_GIN)):
    (pathlib.Path(folder) / f'{name}.gin').write_text(text)


def scalars(folder) -> dict[tuple[str, int], float]:
  """Returns the TensorBoard scalars in a folder by tag and step."""
  import tensorflow as tf
  from tensorboard.backend.event_processing import event_accumulator

  events = event_accumulator.EventAccumulator(
    str(folder), size_guidance={event_accumulator.TENSORS: 0}
  )
  events.Reload()
  return {
    (tag, event.step): float(tf.make_ndarray(event.tensor_proto))
    for tag in events.Tags()['tensors']
    for event in events.Tensors(tag)
    if event.tensor_proto.dtype == tf.float32.as_datatype_enum
  }


def steps(model_dir) -> list[int]:
  """Returns the steps of the checkpoints in a folder, in order."""
  found = pathlib.Path(model_dir).glob('checkpoint_*')
  return sorted(int(path.name.removeprefix('checkpoint_')) for path in found)


def gin_files() -> dict[str, str]:
  """Returns the text of every gin file by its path from the repository's root."""
  return {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in sorted((ROOT / 'gin').rglob('*.gin'))
  }


def includes(file: str) -> set[str]:
  """Returns the files that a gin file includes, directly or not."""
  direct = set(re.findall(r"^include '(.+)'", gin_files()[file], flags=re.MULTILINE))
  return direct.union(*map(includes, direct))


@functools.cache
def recorders() -> dict:
  """Stand-ins of the engines' functions, which return what gin passes to them."""
  from t5x import eval as eval_lib
  from t5x import infer as infer_lib
  from t5x import train as train_lib

  def recorder(function):
    @functools.wraps(function)
    def record(**kwargs):
      return kwargs

    return record

  functions = (train_lib.train, eval_lib.evaluate, infer_lib.infer)
  return {function.__name__: recorder(function) for function in functions}


def forget_main() -> None:
  """Unregisters gin's configurables of `__main__`: others can have their names."""
  import gin

  registry, inverse = gin.config._REGISTRY, gin.config._INVERSE_REGISTRY
  # Gin files import it as train_script, calibrate_script, ...
  selectors = [name for name, _ in registry.items() if '_script.' in name]
  for name in selectors:
    registry.pop(name)
  for function in [f for f, of in inverse.items() if of.selector in selectors]:
    inverse.pop(function)


@contextlib.contextmanager
def gin_config(files, bindings=(), search_path=ROOT):
  """Parses and finalises gin files as an engine does, then forgets them again.

  Args:
    files: as given to `--gin_file`.
    bindings: as given to `--gin_bindings`.
    search_path: as given to `--gin_search_paths`, comma-separated.

  Yields:
    A function from `train`, `evaluate` or `infer` to the arguments that it would get.
  """
  from t5x import gin_utils

  import __main__
  import gin

  gin.clear_config()
  forget_main()
  with contextlib.ExitStack() as stack:
    stack.callback(gin.clear_config)
    # Outside of the engines, `import __main__ as train_script` finds nothing.
    for name, function in recorders().items():
      stack.enter_context(mock.patch.object(__main__, name, function, create=True))
    prefixes = mock.patch.object(gin.config, '_LOCATION_PREFIXES', [])
    stack.enter_context(prefixes)
    words = [*sys.argv, *(f'--gin_bindings={binding}' for binding in bindings)]
    stack.enter_context(mock.patch.object(sys, 'argv', words))
    gin_utils.parse_gin_flags(str(search_path).split(','), list(files), list(bindings))
    yield lambda name: gin.get_configurable(recorders()[name])()
