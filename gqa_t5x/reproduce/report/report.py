"""The report: each number of the papers beside ours, in Markdown and as one page."""

import os
import pathlib

from gqa_t5x.reproduce.experiments.lab import Lab
from gqa_t5x.reproduce.experiments.scales import LOCAL, PAPER
from gqa_t5x.reproduce.report import (
  report_ablations,
  report_compiled,
  report_overview,
  report_scores,
  report_stability,
  report_times,
)
from gqa_t5x.reproduce.report.document import FIGURES, Document
from gqa_t5x.reproduce.results.results import Results

INTRODUCTION = """\
The tables and figures of *GQA* (Ainslie et al. 2023, arXiv 2305.13245) and of *Fast
Transformer Decoding* (Shazeer 2019, arXiv 1911.02150). Part 1 holds our numbers to
theirs, at their scale; what has no number was not run, and the command that runs it
follows. Part 2 is the same at the scale of one machine: a tiny T5.1.1, pre-trained by
span corruption on the docstrings that every Python installation holds, converted,
uptrained, and fine-tuned to summarize docstrings. It shows shapes, not sizes.

All commands of a target, in order: `python -m gqa_t5x.reproduce plan table1`."""


def write(output_dir: str) -> int:
  """Writes `report.md`, `report.html` and their figures; returns the exit code.

  Args:
    output_dir: folder of all results, of both scales. The report goes there; if it
      is gs://, into the folder `report` here.
  """
  folder = pathlib.Path(output_dir)
  if '://' in output_dir:
    folder = pathlib.Path('report')
  figures = folder / FIGURES
  figures.mkdir(parents=True, exist_ok=True)
  found = Results()
  doc = Document("GQA and MQA for T5: the papers' experiments, reproduced")
  doc.text(INTRODUCTION)
  report_overview.write(doc, found, Lab(LOCAL, output_dir), figures)
  _write_paper(doc, found, Lab(PAPER, output_dir), figures)
  _write_local(doc, found, Lab(LOCAL, output_dir), figures)
  doc.text('## Skipped results')
  doc.text('\n'.join(f'- {problem}' for problem in found.problems) or 'None.')
  _replace(folder / 'report.md', doc.markdown())
  _replace(folder / 'report.html', doc.html(folder))
  print(f'Report: {folder}/report.md and {folder}/report.html')
  for problem in found.problems:
    print(f'Skipped: {problem}')
  return 0


def _write_paper(doc: Document, found: Results, lab: Lab, folder: pathlib.Path) -> None:
  doc.text("## Part 1: at the papers' scale", '### Table 1 and figure 3')
  report_scores.write(doc, found, lab, folder)
  doc.text('### Figure 4: how to convert')
  report_ablations.write_figure4(doc, found, lab, folder)
  doc.text('### Figure 5: how long to uptrain')
  report_ablations.write_figure5(doc, found, lab, folder)
  doc.text('### Figure 6: how many heads')
  report_times.write_figure6(doc, found, lab, folder)
  doc.text('### Times on TPUs, by their compiler')
  report_compiled.write(doc, found, lab, folder)
  doc.text('### Appendix A: stability of training')
  report_stability.write(doc, found, lab)
  doc.text('### Shazeer: WMT14 English to German')
  report_times.write_shazeer(doc, found, lab)


def _write_local(doc: Document, found: Results, lab: Lab, folder: pathlib.Path) -> None:
  doc.text('## Part 2: on one machine', '### Table 1 and figure 3, tiny')
  report_scores.write(doc, found, lab, folder)
  doc.text('### Figures 4 and 5: the study of conversion')
  report_ablations.write_study(doc, found, lab, folder)
  doc.text('### Figure 6: time against heads')
  report_times.write_figure6(doc, found, lab, folder)
  doc.text('### Appendix A, tiny')
  report_stability.write(doc, found, lab)
  doc.text("### Shazeer's models, timed")
  report_times.write_shazeer(doc, found, lab)
  doc.text('### Arithmetic intensity')
  report_times.write_intensity(doc, found, lab, folder)


def _replace(path: pathlib.Path, text: str) -> None:
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text)
  os.replace(temporary, path)
