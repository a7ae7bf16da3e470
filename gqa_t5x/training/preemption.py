"""Pre-emption: a machine that has to go says so by SIGTERM; training saves first."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Notice:
  """Whether this run has to stop; on several hosts, all agree on the step.

  With `jax.distributed`, JAX's pre-emption service takes the signal and tells the other
  hosts. On one host alone, this class takes it; a second SIGTERM ends the process.
  """

  def __init__(self):
    """Listens from now on."""
    self._received, self._previous = False, None
    main = threading.current_thread() is threading.main_thread()
    if main and not jax.distributed.is_initialized():
      self._previous = signal.signal(signal.SIGTERM, self._receive)

  def _receive(self, signum: int, frame: Any) -> None:
    del signum, frame
    self._received = True
    self.close()

  def reached(self, step: int) -> bool:
    """Returns whether to stop before a step.

    Args:
      step: the next step; all hosts ask before each.
    """
    return self._received or multihost_utils.reached_preemption_sync_point(step)

  def close(self) -> None:
    """Gives the signal back."""
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)
      self._previous = None
