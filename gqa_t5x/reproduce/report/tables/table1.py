"""Table 1 and figure 3: scores and times of MHA, GQA and MQA."""

import statistics
from collections.abc import Mapping, Sequence

from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments import paper, targets
from gqa_t5x.reproduce.experiments.models import Model
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.results import reader
from gqa_t5x.reproduce.results.reader import Measured

Scores = Mapping[Model, Sequence[Measured | None]]
Times = Mapping[Model, Measured | None]


NOT_THEIRS = f'ours, {paper.NOT_THERE}'


def write(part: Part) -> None:
  """Adds the table and the figure of one scale."""
  scale, doc = part.scale, part.doc
  scores = {
    model: [part.found.score(part.plan, model, task) for task in scale.tasks]
    for model in scale.models
  }
  times = {
    model: reader.mean([_time(part, model, task) for task in scale.tasks])
    for model in scale.models
  }
  rows = []
  for model in scale.models:
    if theirs := paper.TABLE1.get(model.label):
      seconds = f'{paper.SECONDS_PER_SAMPLE[model.label]:.2f}'
      rows.append([model.label, 'paper', seconds, *map(str, theirs)])
    ours = _our_cells(part, model, scores[model], times[model])
    rows.append(
      [model.label, 'ours' if theirs or not scale.public else NOT_THEIRS, *ours]
    )
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
  return [paper.TASKS.get(task, [task])[0] for task in tasks]


def _time(part: Part, model: Model, task: str) -> Measured | None:
  """Time per sample with a task's lengths; at the local scale, with others."""
  lengths = part.plan.value('finetune', 'TASK_FEATURE_LENGTHS', task)
  for timing in part.scale.timings:
    timed = {'inputs': timing.input_length, 'targets': timing.output_length}
    if timing.size == model.size and (timed == lengths or not part.scale.public):
      for row in part.decode_rows(targets.timing_name(timing), timing):
        if (row['num_kv_heads'], row.get('kv_head_dim')) == (
          model.num_kv_heads,
          model.kv_head_dim,
        ):
          return Measured.of(row, row['seconds_per_sample'])
  return None


def _our_cells(
  part: Part, model: Model, scores: Sequence[Measured | None], time: Measured | None
) -> list[str]:
  doc = part.doc
  average, *theirs = paper.TABLE1.get(model.label, [None] * (1 + len(scores)))
  cells = [doc.number(x, 1, y) for x, y in zip(scores, theirs, strict=True)]
  if len(scores) > 1:
    cells.insert(0, doc.number(reader.mean(scores), 1, average))
  digits = 2 if average else 4
  return [doc.number(time, digits, paper.SECONDS_PER_SAMPLE.get(model.label)), *cells]


def _local_text(part: Part) -> str:
  timing = part.scale.timings[0]
  steps = part.plan.value('finetune', 'FINETUNE_STEPS', *part.scale.tasks)
  return (
    'ROUGE-1 of the validation split of `pydocs_summarize` (the first line of a'
    f' docstring from its body), the best checkpoint of {steps} steps of fine-tuning.'
    ' ±: standard deviation over n seeds. GQA and MQA are converted by mean and'
    f' uptrained with alpha = {paper.ALPHA:g}. s/sample, the encoder included: batch'
    f' {timing.batch_size}, input {timing.input_length}, output {timing.output_length}.'
  )


def _figure(part: Part, scores: Scores, times: Times) -> None:
  """Average score against time per sample: figure 3."""
  series = []
  for model, label in ((model, model.label) for model in part.scale.models):
    color, marker = figures.heads_style(label)
    style = figures.PINK if model.size == 'large' else color, marker
    if label in paper.TABLE1:
      x, y = paper.SECONDS_PER_SAMPLE[label], paper.TABLE1[label][0]
      series.append(figures.Series(f'{label}, paper', [x], [y], *style, hollow=True))
    average, time = reader.mean(scores[model]), times[model]
    if average and time:
      seeds = [s.spread for s in scores[model] if s.spread is not None]
      errors = [statistics.fmean(seeds)] if seeds else None
      x, y = [time.mean], [average.mean]
      series.append(figures.Series(f'{label}, ours', x, y, *style, errors=errors))
  if not series:
    part.doc.text(f'Figure 3: {part.doc.not_run()}.')
  part.figure(
    f'figure3_{part.scale.name}.png',
    'Figure 3: score against time per sample.',
    series,
    'time per sample (s)',
    'average score' if part.scale.public else 'ROUGE-1',
  )
