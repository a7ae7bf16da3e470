"""Pre-emption: a machine that is taken away sends SIGTERM; training saves first."""

import threading

import jax
from jax.experimental import multihost_utils

from gqa_t5x import command_line


class Notice:
  """Listens for SIGTERM; on several hosts, all agree on the step to stop at.

  With `jax.distributed`, JAX's pre-emption service takes the signal and tells the other
  hosts. On one host alone, this class takes it; a second SIGTERM ends the process.

  Attributes:
    close: function that gives the signal back.
  """

  def __init__(self):
    self._received = threading.Event()
    self.close = lambda: None
    if not jax.distributed.is_initialized():
      self.close = command_line.on_sigterm(self._received.set)

  def received(self) -> bool:
    """Returns whether SIGTERM has come; never with `jax.distributed`."""
    return self._received.is_set()

  def reached(self, step: int) -> bool:
    """Returns whether to stop before the next step; all hosts ask before each."""
    return self.received() or multihost_utils.reached_preemption_sync_point(step)
