"""Table 1 and figure 3: scores and times of MHA, GQA and MQA."""

import statistics
from collections.abc import Sequence

from gqa_t5x.analysis import palette
from gqa_t5x.reproduce.experiments import paper, targets
from gqa_t5x.reproduce.experiments.models import Model
from gqa_t5x.reproduce.report import figures
from gqa_t5x.reproduce.report.figures import Series
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.results import reader
from gqa_t5x.reproduce.results.reader import Measured


def write(part: Part) -> None:
  """Adds the table and the figure of one scale."""
  scale, doc = part.scale, part.doc
  scores = {
    model: [part.found.score(part.plan, model, task) for task in scale.tasks]
    for model in scale.models
  }
  times = {model: seconds_per_sample(part, model) for model in scale.models}
  rows = []
  for model in scale.models:
    rows += [*_paper_row(model), _our_row(part, model, scores[model], times[model])]
  averaged = ['average'] if len(scale.tasks) > 1 else []
  doc.table(['model', '', 's/sample', *averaged, *titles(scale.tasks)], rows)
  doc.text(
    'Scores of the development sets, the best checkpoint of each run: ROUGE-1, BLEU of'
    " WMT14, F1 of TriviaQA. In brackets: ours less the paper's. ±: standard deviation"
    ' over n seeds. s/sample: time per sample of one chip, the mean over the tasks. The'
    " paper's averages are as printed; that of the seven scores of MQA-XXL is 46.8."
    if scale.public
    else _local_text(part)
  )
  _figure(part, scores, times)


def titles(tasks: Sequence[str]) -> list[str]:
  """Returns what the paper calls tasks; those that it has not, by their own names."""
  return [paper.TITLES.get(task, task) for task in tasks]


def seconds_per_sample(part: Part, model: Model) -> Measured | None:
  """Returns a model's time per sample, the mean over the tasks; None if not run."""
  numbers = []
  for task in part.scale.tasks:
    lengths = part.plan.value('finetune', 'TASK_FEATURE_LENGTHS', task)
    numbers.append(_time(part, model, lengths))
  return reader.mean(numbers)


def _time(part: Part, model: Model, lengths: dict[str, int]) -> Measured | None:
  for timing in part.scale.timings:
    if timing.size != model.size:
      continue
    asked = (timing.input_length, timing.output_length)
    if part.scale.public and asked != (lengths['inputs'], lengths['targets']):
      continue
    path = part.plan.timing(targets.timing_name(timing), timing).result
    for row in part.found.rows(path, 'decode_benchmark', size=model.size):
      if row['num_kv_heads'] == model.num_kv_heads:
        seconds = (row['seconds_per_sample'],)
        return Measured(seconds, row['source'], (row['command'],))
  return None


def _paper_row(model: Model) -> list[list[str]]:
  if model.label not in paper.TABLE1:
    return []
  scores = [f'{score}' for score in paper.TABLE1[model.label]]
  seconds = f'{paper.SECONDS_PER_SAMPLE[model.label]:.2f}'
  average = f'{paper.TABLE1_AVERAGE[model.label]}'
  return [[model.label, 'paper', seconds, average, *scores]]


def _our_row(
  part: Part, model: Model, scores: list[Measured | None], time: Measured | None
) -> list[str]:
  doc = part.doc
  theirs = paper.TABLE1.get(model.label, [None] * len(scores))
  cells = [doc.number(x, 1, y) for x, y in zip(scores, theirs, strict=True)]
  average = paper.TABLE1_AVERAGE.get(model.label)
  if len(scores) > 1:
    cells.insert(0, doc.number(reader.mean(scores), 1, average))
  digits = 2 if average else 4
  time_cell = doc.number(time, digits, paper.SECONDS_PER_SAMPLE.get(model.label))
  return [model.label, 'ours', time_cell, *cells]


def _local_text(part: Part) -> str:
  timing = part.scale.timings[0]
  steps = part.plan.value('finetune', 'FINETUNE_STEPS', part.scale.tasks[0])
  return (
    'ROUGE-1 of the validation split of `pydocs_summarize` (the first line of a'
    f' docstring from its body), the best checkpoint of {steps} steps of fine-tuning.'
    ' ±: standard deviation over n seeds. GQA and MQA are converted by mean and'
    f' uptrained with alpha = {paper.ALPHA:g}. s/sample, the encoder included: batch'
    f' {timing.batch_size}, input {timing.input_length}, output {timing.output_length}.'
  )


def _figure(part: Part, scores, times) -> None:
  """Average score against time per sample: figure 3."""
  series = []
  for model in part.scale.models:
    color, marker = figures.style(model.label)
    if model.size == 'large':
      color = palette.PINK
    if model.label in paper.TABLE1:
      x, y = paper.SECONDS_PER_SAMPLE[model.label], paper.TABLE1_AVERAGE[model.label]
      series.append(
        Series(f'{model.label}, paper', [x], [y], color, marker, hollow=True)
      )
    average, time = reader.mean(scores[model]), times[model]
    if average and time:
      seeds = [s.spread for s in scores[model] if s.spread is not None]
      errors = [statistics.fmean(seeds)] if seeds else None
      label = f'{model.label}, ours'
      x, y = [time.mean], [average.mean]
      series.append(Series(label, x, y, color, marker, errors=errors))
  if not series:
    part.doc.text(f'Figure 3: {part.doc.not_run()}.')
    return
  part.figure(
    f'figure3_{part.scale.name}.png',
    'Figure 3: score against time per sample.',
    series,
    'time per sample (s)',
    'average score' if part.scale.public else 'ROUGE-1',
  )
