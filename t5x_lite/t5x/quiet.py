"""Imports TensorFlow without what it says on standard error about a missing GPU.

Nobody needs a GPU in TensorFlow here: it reads the data, and the devices are JAX's. No
environment variable hides these lines. All else passes, and does so even if TensorFlow
ends the process.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

NOISE = (
  'All log messages before absl::InitializeLog()',
  'Could not find cuda drivers',
  'failed call to cuInit',
)


@contextlib.contextmanager
def without(*texts: str) -> Iterator[None]:
  """Leaves out the lines of standard error that hold one of the texts."""
  if shutil.which('grep') is None:
    yield
    return
  patterns = [word for text in texts for word in ('-e', text)]
  with subprocess.Popen(
    ['grep', '--invert-match', '--fixed-strings', *patterns],
    stdin=subprocess.PIPE,
    stdout=2,
  ) as sieve:
    kept = os.dup(2)
    os.dup2(sieve.stdin.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(kept, 2)
      os.close(kept)


with without(*NOISE):
  import jax  # noqa: F401 (raises TensorFlow's log level, unless the user has set it)
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')
