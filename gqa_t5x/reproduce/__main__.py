"""The command that runs experiments and reports them.

  python -m gqa_t5x.reproduce run uptrain

runs the paper's recipe in miniature on this machine (about 10 minutes): pre-trains a
tiny T5.1.1 with multi-head attention, converts it to 2 and to 1 key/value heads,
uptrains, and reports mean (the paper) and svd side by side.

  python -m gqa_t5x.reproduce run conversion --scale=local

compares all conversion methods: for 4, 2 and 1 of 8 key/value heads, the loss right
after conversion and while uptraining goes on to 10% of the pre-training steps. An hour
or more; --size=mini does the same with a larger model, in many hours.

Stop a run with Ctrl-C and start it again: finished stages are not repeated. What a
stage prints is in OUTPUT_DIR/logs (of conversion: OUTPUT_DIR/SIZE/logs). A checkpoint
that is already where a run would put its own counts as made: so a model pre-trained
elsewhere can be studied.

A run starts these by itself; they also work alone, on a finished run:

  python -m gqa_t5x.reproduce evaluate uptrain|conversion    checkpoints -> rows.json
  python -m gqa_t5x.reproduce report uptrain|conversion      rows.json -> the report
"""

import sys
from typing import Any

from absl import app, flags

from gqa_t5x.reproduce import conversion, uptrain

# (verb, experiment) -> the function, and which flags it takes besides --output_dir.
COMMANDS: dict[tuple[str, ...], Any] = {
  ('run', 'uptrain'): (uptrain.run, ('jobs',)),
  ('evaluate', 'uptrain'): (uptrain.evaluate_models, ()),
  ('report', 'uptrain'): (uptrain.write_report, ()),
  ('run', 'conversion'): (conversion.run, ('jobs', 'size', 'scale')),
  ('evaluate', 'conversion'): (conversion.evaluate, ('size',)),
  ('report', 'conversion'): (conversion.report, ('size',)),
}
FOLDERS = {'uptrain': 'runs/local', 'conversion': 'runs/conversion'}

_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir',
  None,
  'Folder of checkpoints, logs, rows and the report; by default runs/local for uptrain,'
  ' runs/conversion for conversion.',
)
flags.DEFINE_integer(
  'jobs',
  None,
  'How many stages run at once, each on cores of its own; by default one a core.',
)
flags.DEFINE_enum(
  'size',
  'tiny',
  list(conversion.STUDIES),
  'The model of the conversion study; see gqa_t5x/network.py.',
)
flags.DEFINE_enum(
  'scale',
  'local',
  conversion.SCALES,
  'local: on this machine. paper: not there yet.',
)


def main(argv: list[str]) -> int:
  """Runs a command; returns the exit code."""
  words = tuple(argv[1:])
  if words not in COMMANDS:
    print(
      'Usage: python -m gqa_t5x.reproduce run uptrain|conversion [--output_dir=...];'
      ' see --help.',
      file=sys.stderr,
    )
    return 2
  function, names = COMMANDS[words]
  values = {name: flags.FLAGS[name].value for name in names}
  return function(_OUTPUT_DIR.value or FOLDERS[words[1]], **values)


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)))
