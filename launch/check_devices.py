"""Says how many devices each host of a TPU sees; fails if any are missing.

  python launch/check_devices.py 8

runs on all hosts at once, and waits for them: training would hang if one is missing.
"""

import sys

import jax


def main(expected: int) -> int:
  """Returns the exit code: 0 if JAX sees `expected` devices on all hosts together."""
  jax.distributed.initialize()
  found = jax.device_count()
  host = f'host {jax.process_index()} of {jax.process_count()}'
  print(f'{host}: {jax.local_device_count()} of {found} devices are here', flush=True)
  if found != expected:
    print(f'error: {expected} devices are expected (DEVICES in launch/env.sh).')
  return int(found != expected)


if __name__ == '__main__':
  sys.exit(main(int(sys.argv[1])))
