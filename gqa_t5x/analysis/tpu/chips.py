"""What accelerators can do, as their makers publish it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    flops: FLOP/s of bfloat16 matrix products.
    bandwidth: bytes/s from its memory.
    memory: bytes.
    usable: bytes that the compiler gives to a program; the rest is the system's.
    links: bytes/s that it receives from its neighbours, over all links together.
    devices: JAX devices a chip.
    pod: chips that are linked, at most.
  """

  flops: float
  bandwidth: float
  memory: float
  usable: float = 0
  links: float = 0
  devices: int = 1
  pod: int = 1


# Sources: Google Cloud's pages of each TPU; v5e, v5p and v6e publish their links for
# both directions together, half of which is received; those of v3 and v4 are from
# Jouppi et al. 2023 (arXiv 2304.01433), table 4: 4 links of 70 and 6 of 50 GB/s.
# `usable` is what the compiler of libtpu 0.0.42.1 names when a program is too large.
# A core of a CPU: what training and decoding of the tiny model reach on one with
# AVX-512 (float32), by estimates.py's shares of the peak.
GIB = 2**30
CHIPS = {
  'v3': Chip(123e12, 900e9, 32 * GIB, 2 * 15.48 * GIB, 280e9, devices=2, pod=1024),
  'v4': Chip(275e12, 1228e9, 32 * GIB, 30.75 * GIB, 300e9, pod=4096),
  'v5e': Chip(197e12, 819e9, 16 * GIB, 15.75 * GIB, 200e9, pod=256),
  'v5p': Chip(459e12, 2765e9, 95 * GIB, 95.74 * GIB, 600e9, pod=6144),
  'v6e': Chip(918e12, 1638e9, 32 * GIB, 31.25 * GIB, 400e9, pod=256),
  'core': Chip(flops=200e9, bandwidth=14e9, memory=8 * GIB),
}
