"""The command that runs experiments and reports them.

  python -m gqa_t5x.reproduce run uptrain --output_dir=runs/local

runs the paper's recipe in miniature on this machine: pre-trains a tiny T5.1.1 with
multi-head attention, converts it to 2 and to 1 key/value heads, uptrains both, and
reports. Stop it with Ctrl-C and run it again: finished stages are not repeated.
"""

import sys

from absl import app, flags

from gqa_t5x.reproduce import uptrain

COMMANDS = {
  ('run', 'uptrain'): uptrain.run,
  # What a run starts in a process of its own.
  ('evaluate', 'uptrain'): uptrain.evaluate_models,
}

_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir', 'runs/local', 'Folder of checkpoints, logs, rows and the report.'
)


def main(argv: list[str]) -> int:
  """Runs a command; returns the exit code."""
  command = COMMANDS.get(tuple(argv[1:]))
  if command is None:
    print(
      'Usage: python -m gqa_t5x.reproduce run uptrain [--output_dir=...]',
      file=sys.stderr,
    )
    return 2
  return command(_OUTPUT_DIR.value)


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)))
