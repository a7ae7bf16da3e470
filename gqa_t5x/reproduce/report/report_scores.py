"""Table 1 and figure 3: scores and times of MHA, GQA and MQA."""

import pathlib
import statistics
from collections.abc import Sequence

from gqa_t5x.reproduce.experiments import paper, targets
from gqa_t5x.reproduce.experiments.lab import Lab, num_kv_heads
from gqa_t5x.reproduce.experiments.models import Model
from gqa_t5x.reproduce.report import figures
from gqa_t5x.reproduce.report.document import NOT_RUN, Document
from gqa_t5x.reproduce.report.figures import Series
from gqa_t5x.reproduce.results import results
from gqa_t5x.reproduce.results.results import Measured, Results


def write(doc: Document, found: Results, lab: Lab, folder: pathlib.Path) -> None:
  """Adds the table and the figure of one scale.

  Args:
    doc: the report.
    found: reads results.
    lab: of the scale.
    folder: where figures go.
  """
  scores = {
    model: [found.score(lab, model, task) for task in lab.scale.tasks]
    for model in lab.scale.models
  }
  times = {model: seconds_per_sample(found, lab, model) for model in lab.scale.models}
  rows = []
  for model in lab.scale.models:
    rows += [*_paper_row(model), _our_row(doc, model, scores[model], times[model])]
  averaged = ['average'] if len(lab.scale.tasks) > 1 else []
  doc.table(['model', '', 's/sample', *averaged, *titles(lab.scale.tasks)], rows)
  doc.text(
    'Scores of the development sets, the best checkpoint of each run: ROUGE-1, BLEU of'
    " WMT14, F1 of TriviaQA. In brackets: ours less the paper's. ±: standard deviation"
    ' over n seeds. s/sample: time per sample of one chip, the mean over the tasks. The'
    " paper's averages are as printed; that of the seven scores of MQA-XXL is 46.8."
    if lab.scale.public
    else _local_text(lab)
  )
  _figure(doc, lab, scores, times, folder)
  doc.commands(missing(lab, scores, times))


def titles(tasks: Sequence[str]) -> list[str]:
  """Returns what the paper calls tasks; those that it has not, by their own names."""
  return [paper.TITLES.get(task, task) for task in tasks]


def seconds_per_sample(found: Results, lab: Lab, model: Model) -> Measured | None:
  """Returns the time per sample of a model, the mean over the tasks; None if not run.

  Args:
    found: reads results.
    lab: of the scale.
    model: which one.
  """
  numbers = []
  for task in lab.scale.tasks:
    lengths = lab.value('finetune', 'TASK_FEATURE_LENGTHS', task)
    numbers.append(_time(found, lab, model, lengths))
  return results.mean(numbers)


def _time(found: Results, lab: Lab, model: Model, lengths: dict[str, int]):
  for name, timing in targets.timings(lab).items():
    if timing.size != model.size:
      continue
    asked = (timing.input_length, timing.output_length)
    if lab.scale.public and asked != (lengths['inputs'], lengths['targets']):
      continue
    for row in found.rows(lab.rows(name), 'decode_benchmark', size=model.size):
      if row['num_kv_heads'] == num_kv_heads(model):
        value = (row['seconds_per_sample'],)
        return Measured(value, row['source'], (row['command'],))
  return None


def _paper_row(model: Model) -> list[list[str]]:
  if model.label not in paper.TABLE1:
    return []
  scores = [f'{score}' for score in paper.TABLE1[model.label]]
  seconds = f'{paper.SECONDS_PER_SAMPLE[model.label]:.2f}'
  average = f'{paper.TABLE1_AVERAGE[model.label]}'
  return [[model.label, 'paper', seconds, average, *scores]]


def _our_row(
  doc: Document, model: Model, scores: list[Measured | None], time: Measured | None
) -> list[str]:
  theirs = paper.TABLE1.get(model.label, [None] * len(scores))
  cells = [doc.number(x, 1, y) for x, y in zip(scores, theirs, strict=True)]
  average = paper.TABLE1_AVERAGE.get(model.label)
  if len(scores) > 1:
    cells.insert(0, doc.number(results.mean(scores), 1, average))
  digits = 2 if average else 4
  time_cell = doc.number(time, digits, paper.SECONDS_PER_SAMPLE.get(model.label))
  return [model.label, 'ours', time_cell, *cells]


def _local_text(lab: Lab) -> str:
  timing = next(iter(targets.timings(lab).values()))
  steps = lab.value('finetune', 'FINETUNE_STEPS', lab.scale.tasks[0])
  return (
    'ROUGE-1 of the validation split of `pydocs_summarize` (the first line of a'
    f' docstring from its body), the best checkpoint of {steps} steps of fine-tuning.'
    ' ±: standard deviation over n seeds. GQA and MQA are converted by mean and'
    f' uptrained with alpha = {paper.ALPHA:g}. s/sample, the encoder included: batch'
    f' {timing.batch_size}, input {timing.input_length}, output {timing.output_length}.'
  )


def _figure(doc, lab, scores, times, folder: pathlib.Path) -> None:
  """Average score against time per sample: figure 3."""
  series = []
  for model in lab.scale.models:
    color, marker = figures.style(model.label)
    if model.size == 'large':
      color = figures.PINK
    if model.label in paper.TABLE1:
      x, y = paper.SECONDS_PER_SAMPLE[model.label], paper.TABLE1_AVERAGE[model.label]
      series.append(
        Series(f'{model.label}, paper', [x], [y], color, marker, hollow=True)
      )
    average, time = results.mean(scores[model]), times[model]
    if average and time:
      seeds = [s.spread for s in scores[model] if s.spread is not None]
      errors = [statistics.fmean(seeds)] if seeds else None
      label = f'{model.label}, ours'
      x, y = [time.mean], [average.mean]
      series.append(Series(label, x, y, color, marker, errors=errors))
  if not series:
    doc.text(f'Figure 3: {NOT_RUN}.')
    return
  name = f'figure3_{lab.scale.name}.png'
  figures.draw(
    folder / name,
    series,
    'time per sample (s)',
    'average score' if lab.scale.public else 'ROUGE-1',
  )
  doc.figure(name, 'Figure 3: score against time per sample.')


def missing(lab: Lab, scores, times) -> list[str]:
  """Returns the commands of what has no number yet, in order."""
  wanted = Lab(lab.scale, str(lab.output_dir))
  for model in lab.scale.models:
    for task, score in zip(lab.scale.tasks, scores[model], strict=True):
      if score is None:
        for seed in lab.scale.seeds_of(model):
          wanted.finetuned(model, task, seed)
  if None in times.values():
    for name, timing in targets.timings(lab).items():
      wanted.timed(name, timing)
  return [str(stage) for stage in wanted.stages if not stage.result.exists()]
