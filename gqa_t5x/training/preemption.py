"""Pre-emption: a machine that has to go says so by SIGTERM; training saves first."""

import jax
from jax.experimental import multihost_utils

from gqa_t5x import command_line


class Notice:
  """Whether this run has to stop; on several hosts, all agree on the step.

  With `jax.distributed`, JAX's pre-emption service takes the signal and tells the other
  hosts. On one host alone, this class takes it; a second SIGTERM ends the process.
  """

  def __init__(self):
    """Listens from now on."""
    self._received = False
    self._give_back = lambda: None
    if not jax.distributed.is_initialized():
      self._give_back = command_line.on_sigterm(self._receive)

  def _receive(self) -> None:
    self._received = True

  def reached(self, step: int) -> bool:
    """Returns whether to stop before a step.

    Args:
      step: the next step; all hosts ask before each.
    """
    return self._received or multihost_utils.reached_preemption_sync_point(step)

  def close(self) -> None:
    """Gives the signal back."""
    self._give_back()
