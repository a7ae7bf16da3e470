"""Leaves out lines on standard error that mean nothing to a user.

They are of libraries that look for accelerators, and no environment variable hides
them. All others pass, even if the library ends the process.
"""

import contextlib
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator

# Of TensorFlow, then of libtpu where there is no TPU.
_LINES = """All log messages before absl::InitializeLog()
Could not find cuda drivers
failed call to cuInit
could not determine TPU
Logging before InitGoogle()
=== Source Location Trace: ===
libtpu_init_utils.cc"""


def import_tensorflow() -> None:
  """Imports TensorFlow, which is to read the data; the devices are JAX's.

  It comes before any other import of TensorFlow.
  """
  with _without_lines():
    import jax  # noqa: F401 (raises its log level, unless the user has set it)
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')


def find_devices() -> None:
  """Lets JAX look for its devices; it names each kind that it does not find."""
  import jax

  logging.getLogger('jax._src.xla_bridge').setLevel(logging.WARNING)
  with _without_lines():
    jax.devices()


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
