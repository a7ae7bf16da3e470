"""The report: each number of the papers and ours, in Markdown and as one page."""

import pathlib
from collections.abc import Callable

from gqa_t5x import files
from gqa_t5x.reproduce.experiments import targets
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.scales import LOCAL, PAPER
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.report.tables import (
  ablations,
  appendix_a,
  compiled,
  figure6,
  heads,
  intensity,
  local_study,
  overview,
  shazeer,
  table1,
  training,
)
from gqa_t5x.reproduce.results.reader import Reader

INTRODUCTION = """\
The tables and figures of *GQA* (Ainslie et al. 2023, arXiv 2305.13245) and of *Fast
Transformer Decoding* (Shazeer 2019, arXiv 1911.02150). Part 1 holds our numbers to
theirs, at their scale; what has no number was not run, and the plan of its commands is
named. Part 2 is the same at the scale of one machine: a tiny T5.1.1, pre-trained by
span corruption on the docstrings that every Python installation holds, converted,
uptrained, and fine-tuned to summarize docstrings. It shows shapes, not sizes.

All commands of a target, in order: `python -m gqa_t5x.reproduce plan table1`."""


Write = Callable[[Part], None]
# Heading -> target, and what writes its part.
PAPER_PARTS: dict[str, tuple[str, Write]] = {
  'Table 1 and figure 3': ('table1', table1.write),
  'Figure 4: how to convert': ('figure4', ablations.write_figure4),
  'Figure 5: how long to uptrain': ('figure5', ablations.write_figure5),
  'Figure 6: how many heads': ('figure6', figure6.write),
  'Times on TPUs, by their compiler': ('compiled', compiled.write),
  'Appendix A: stability of training': ('appendix_a', appendix_a.write),
  'Shazeer: WMT14 English to German': ('shazeer', shazeer.write),
}
LOCAL_PARTS: dict[str, tuple[str, Write]] = {
  'Table 1 and figure 3, tiny': ('table1', table1.write),
  'Figures 4 and 5: the study of conversion': ('conversion', local_study.write),
  'Conversion of long-trained heads': ('heads', heads.write),
  'Conversion against training': ('training', training.write),
  'Figure 6: time against heads': ('figure6', figure6.write),
  'Appendix A, tiny': ('appendix_a', appendix_a.write),
  "Shazeer's models, timed": ('shazeer', shazeer.write),
  'Arithmetic intensity': ('intensity', intensity.write),
}


def write(output_dir: str) -> None:
  """Writes `report.md`, `report.html` and their figures.

  They go into the folder of all results; if that is gs://, into `report` here.
  """
  folder = pathlib.Path('report' if '://' in output_dir else output_dir)
  found = Reader()
  doc = Document("GQA and MQA for T5: the papers' experiments, reproduced")
  doc.text(INTRODUCTION)
  paper, local = (
    Part(doc, found, Planner(scale, output_dir), folder) for scale in (PAPER, LOCAL)
  )
  overview.write(local)
  doc.text("## Part 1: at the papers' scale")
  _write_parts(paper, PAPER_PARTS)
  doc.text('## Part 2: on one machine')
  _write_parts(local, LOCAL_PARTS)
  doc.text('## Skipped results')
  doc.text('\n'.join(f'- {problem}' for problem in found.problems) or 'None.')
  files.write_text(folder / 'report.md', doc.markdown())
  files.write_text(folder / 'report.html', doc.html(folder))
  print(f'Report: {folder}/report.md and {folder}/report.html')
  for problem in found.problems:
    print(f'Skipped: {problem}')


def _write_parts(part: Part, parts: dict[str, tuple[str, Write]]) -> None:
  """Adds a scale's parts, and after each how to get what it lacks."""
  doc, scale, output_dir = part.doc, part.scale.name, str(part.plan.output_dir)
  for heading, (target, write_part) in parts.items():
    doc.text(f'### {heading}')
    doc.has_gaps = False
    write_part(part)
    missing = doc.has_gaps and targets.make_plan(target, scale, output_dir).missing()
    if missing:
      noun = 'command' if len(missing) == 1 else 'commands'
      doc.text(
        f'Not run: {len(missing)} {noun}, which `python -m gqa_t5x.reproduce plan'
        f' {target} --scale={scale} --output_dir={output_dir}` prints.'
      )
