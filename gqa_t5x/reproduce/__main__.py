"""The command that runs experiments and reports them.

  python -m gqa_t5x.reproduce run uptrain --output_dir=runs/local

runs the paper's recipe in miniature on this machine: pre-trains a tiny T5.1.1 with
multi-head attention, converts it to 2 and to 1 key/value heads, uptrains both, and
reports. Stop it with Ctrl-C and run it again: finished stages are not repeated.
"""

import sys

from absl import app, flags

from gqa_t5x.reproduce import uptrain

TARGETS = {'uptrain': uptrain.run}

_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir', 'runs/local', 'Folder of checkpoints, logs, rows and the report.'
)


def main(argv: list[str]) -> int:
  """Runs a target; returns the exit code."""
  if len(argv) != 3 or argv[1] != 'run' or argv[2] not in TARGETS:
    print(
      f'Usage: python -m gqa_t5x.reproduce run {"|".join(TARGETS)} [--output_dir=...]',
      file=sys.stderr,
    )
    return 2
  return TARGETS[argv[2]](_OUTPUT_DIR.value)


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)))
