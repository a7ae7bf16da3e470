"""Runs the plan of a target on this machine, and reports."""

import pathlib
import sys

from gqa_t5x.reproduce.experiments import conversion, plan
from gqa_t5x.reproduce.experiments.lab import STUDY
from gqa_t5x.reproduce.report import report
from gqa_t5x.reproduce.runner import stages


def run(
  target: str, scale: str, output_dir: str, jobs: int | None, study: str = STUDY
) -> int:
  """Runs what is not done yet, and writes the report.

  Args:
    target: as of plan.make.
    scale: 'local'; any other is refused.
    output_dir: folder of all results.
    jobs: how many stages run at once; None: one a core.
    study: of conversion, a key of conversion.STUDIES.

  Returns:
    The exit code: 0, 1 after an error, 130 after Ctrl-C.
  """
  if scale != 'local':
    print(
      f'error: --scale={scale} takes TPU pods. Run the commands of this plan there:\n'
      f'  python -m gqa_t5x.reproduce plan {target} --scale={scale}',
      file=sys.stderr,
    )
    return 1
  if '://' in output_dir:
    print(f'error: {output_dir} is not on this machine.', file=sys.stderr)
    return 1
  folder = pathlib.Path(output_dir)
  if study == STUDY:
    chosen = plan.make(target, scale, output_dir).stages
    return stages.run(chosen, folder / scale, jobs) or report.write(output_dir)
  if target != 'conversion':
    print(f'error: --study={study} goes with conversion alone.', file=sys.stderr)
    return 1
  code = stages.run(conversion.plan(folder, study), folder / scale, jobs)
  if not code:
    print(f'Report: {conversion.Paths(folder, study).folder}/conversion.md')
  return code
