"""What accelerators can do, as their makers publish it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    flops: FLOP/s of bfloat16 matrix products.
    bandwidth: bytes/s from its memory.
    memory: bytes.
  """

  flops: float
  bandwidth: float
  memory: float


# Source: Google Cloud's pages of TPU v3 and v4. A core of a CPU: what training and
# decoding of the tiny model reach on one with AVX-512 (float32), by estimates.py's
# shares of the peak.
CHIPS = {
  'v3': Chip(flops=123e12, bandwidth=900e9, memory=32 * 2**30),
  'v4': Chip(flops=275e12, bandwidth=1228e9, memory=32 * 2**30),
  'core': Chip(flops=200e9, bandwidth=14e9, memory=8 * 2**30),
}
