"""The command that plans, runs and reports the papers' experiments.

  python -m gqa_t5x.reproduce plan table1
  python -m gqa_t5x.reproduce plan all --scale=local

prints the commands of a table or figure, in order, with what each reads and writes, an
estimate of its chip-hours, and whether it is done. Targets: {targets}, all.
--scale=paper (default of plan) is the papers' own: T5.1.1-Large and -XXL, seven data
sets, on TPU pods; --scale=local a tiny model on the docstrings that every Python has.

  python -m gqa_t5x.reproduce run all --scale=local

runs the plan on this machine, in an hour on two cores, and writes the report.
Stop it with Ctrl-C and start it again: finished stages are not repeated. What a stage
prints is in OUTPUT_DIR/local/logs.

  python -m gqa_t5x.reproduce report --results=runs/reproduce

writes report.md and report.html, one page with everything in it: each number of the
papers beside the measured one, or "not run" and the command that runs it. It may be
called at any time, and reads both scales.

  python -m gqa_t5x.reproduce run uptrain

is the paper's recipe in miniature (10 minutes): pre-train, convert by mean and svd,
uptrain. And the study of conversion methods with all of them, or with a larger model,
takes an hour or more:

  python -m gqa_t5x.reproduce run conversion --scale=local --study=tiny

What a TPU would take, by its compiler, runs on any Linux machine (an hour or two; pip
install --constraint constraints.txt 'jax[tpu]' first), and goes into the same report:

  python -m gqa_t5x.reproduce run compiled
"""

import sys

from absl import app, flags

from gqa_t5x.reproduce.experiments import conversion, plan, run, uptrain
from gqa_t5x.reproduce.experiments.scales import SCALES
from gqa_t5x.reproduce.experiments.targets import ALL, TARGETS
from gqa_t5x.reproduce.report import report
from gqa_t5x.reproduce.results import intensity

EXPERIMENTS = (*TARGETS, ALL)
# What stages run by themselves: (verb, experiment) -> function of output_dir and study.
PARTS = {
  ('evaluate', 'uptrain'): lambda folder, study: uptrain.evaluate_models(folder),
  ('report', 'uptrain'): lambda folder, study: uptrain.write_report(folder),
  ('evaluate', 'conversion'): conversion.evaluate,
  ('report', 'conversion'): conversion.report,
  ('evaluate', 'intensity'): lambda folder, study: intensity.write(folder),
}
FOLDER = 'runs/reproduce'
UPTRAIN_FOLDER = 'runs/local'

flags.DEFINE_string(
  'output_dir',
  None,
  f'Folder of all results, local or gs://; by default {FOLDER}, and of uptrain'
  f' {UPTRAIN_FOLDER}.',
)
flags.DEFINE_string('results', None, 'Of report: the folder of results, as output_dir.')
flags.DEFINE_enum(
  'scale', None, list(SCALES), 'plan: paper unless given. run: local alone.'
)
flags.DEFINE_enum(
  'study', 'quick', list(conversion.STUDIES), 'Which study of conversion methods.'
)
flags.DEFINE_integer(
  'jobs',
  None,
  'How many stages run at once, each on cores of its own; by default one a core.',
)
flags.DEFINE_string(
  'tfds_data_dir', None, 'Of plan: folder of TensorFlow Datasets, for the commands.'
)
flags.DEFINE_bool('json', False, 'Of plan: print JSON.')
USAGE = """\
Usage: python -m gqa_t5x.reproduce plan|run TARGET [--scale=paper|local]
       python -m gqa_t5x.reproduce report [--results=FOLDER]
TARGET: {}. See --help."""


def main(argv: list[str]) -> int:
  """Runs a command; returns the exit code."""
  given = flags.FLAGS
  words = tuple(argv[1:])
  default = UPTRAIN_FOLDER if 'uptrain' in words else FOLDER
  folder = given.output_dir or default
  if words in PARTS:
    return PARTS[words](folder, given.study)
  if words == ('report',):
    return report.write(given.results or folder)
  if words == ('run', 'uptrain'):
    return uptrain.run(folder, given.jobs)
  if len(words) == 2 and words[1] in EXPERIMENTS:
    if words[0] == 'plan':
      scale, data = given.scale or 'paper', given.tfds_data_dir
      return plan.print_plan(words[1], scale, folder, data, given.json)
    if words[0] == 'run':
      return run.run(words[1], given.scale or 'local', folder, given.jobs, given.study)
  print(USAGE.format(', '.join(('uptrain (run only)', *EXPERIMENTS))), file=sys.stderr)
  return 2


if __name__ == '__main__':
  __doc__ = __doc__.format(targets=', '.join(TARGETS))
  app.run(lambda argv: sys.exit(main(argv)))
