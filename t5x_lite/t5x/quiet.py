"""Imports TensorFlow without its lines on standard error about a missing GPU.

TensorFlow reads the data here; the devices are JAX's. No environment variable hides
these lines. All others pass, even if TensorFlow ends the process.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

_LINES = """All log messages before absl::InitializeLog()
Could not find cuda drivers
failed call to cuInit"""


@contextlib.contextmanager
def _without_lines() -> Iterator[None]:
  """Leaves out the lines of standard error that hold one of `_LINES`."""
  if shutil.which('grep') is None:
    yield
    return
  command = ['grep', '--invert-match', '--fixed-strings', _LINES]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2) as sieve:
    kept = os.dup(2)
    os.dup2(sieve.stdin.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(kept, 2)
      os.close(kept)


with _without_lines():
  import jax  # noqa: F401 (raises TensorFlow's log level, unless the user has set it)
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')
