"""Runs `gqa_t5x.benchmark` under JAX's profiler: a trace for xprof and TensorBoard.

python launch/trace.py gs://BUCKET/traces/decode decode --size=xxl --dtype=bfloat16
"""

import sys

import jax

from gqa_t5x import benchmark


def main(argv: list[str]) -> int:
  """Traces the benchmark; returns its exit code."""
  if len(argv) < 3:
    print('Usage: python launch/trace.py FOLDER decode FLAGS...', file=sys.stderr)
    return 2
  with jax.profiler.trace(argv[1]):
    return benchmark.main(['benchmark', *argv[2:]])


if __name__ == '__main__':
  sys.exit(main(sys.argv))
