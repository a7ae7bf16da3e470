"""The report of a study of conversion: checked targets, tables, figures."""

import json
import statistics
from collections.abc import Callable
from typing import Any

from gqa_t5x import files
from gqa_t5x.reproduce.experiments.models import (
  FIRST,
  MEAN,
  METHODS,
  MHA,
  RANDOM,
  SVD,
  title,
)
from gqa_t5x.reproduce.experiments.paper import ALPHAS
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.studies import STUDIES
from gqa_t5x.reproduce.report import conversion_figures, trend
from gqa_t5x.reproduce.report.document import NOT_RUN, Document
from gqa_t5x.reproduce.results.losses import Losses
from gqa_t5x.reproduce.results.rows import Row

SPECTRA = (
  '## What does not fit into a shared head',
  'Each group of heads shares one key and one value head. Of the spectrum behind'
  ' `svd` (logits for keys, outputs for values), the figure shows the share that'
  ' does not fit, layer by layer: the mean over the groups, and their range.'
  ' Measured with the same command; the ranks are in the rows.',
)


def write(output_dir: str, study: str) -> None:
  """Writes `conversion.md` and its figures from the rows of a study.

  Args:
    output_dir: of all experiments; other sizes have their folders next to the study's.
    study: a key of studies.STUDIES.
  """
  write_report(Planner(STUDIES[study], output_dir).rows)


def write_report(rows_file: Any) -> None:
  """Writes the report next to a file of rows; see `write`."""
  folder, rows = rows_file.parent, json.loads(rows_file.read_text())
  losses = Losses(rows)
  doc = Document(f'Conversion of a T5.1.1 ({losses.size}): which method loses least')
  doc.text(_conditions(losses, next((r for r in rows if r['kind'] == 'unigram'), None)))
  doc.text('## Targets')
  _add_checks(doc, losses)
  for num_kv_heads in losses.num_kv_heads:
    doc.text(f'## {losses.num_heads} to {num_kv_heads} key/value heads')
    _add_losses(doc, losses, num_kv_heads)
  doc.text(
    f'±: standard deviation over the seeds of uptraining data. {NOT_RUN}: no row.'
  )
  conversion_figures.draw_losses(losses, folder / 'conversion.png')
  doc.image('conversion.png', 'Excess loss by method, and against uptraining')
  doc.text(
    'Axes are linear in the shaded part and logarithmic beyond. Lower row: the loss'
    ' over that of MHA after as many steps on the same data.'
  )
  spectra = [row for row in rows if row['kind'] == 'spectrum']
  if spectra:
    conversion_figures.draw_spectra(spectra, folder / 'spectra.png')
    doc.text(*SPECTRA)
    doc.image('spectra.png', 'Dropped share of the spectrum by layer')
  trend.add(doc, folder, rows_file.name)
  files.write_text(folder / 'conversion.md', doc.markdown())


def _conditions(losses: Losses, unigram: Row | None) -> str:
  row = losses.rows[0]
  versions = ', '.join(f'{name} {value}' for name, value in row['versions'].items())
  longest = max(losses.alphas(MHA, losses.num_heads))
  trained_on = losses.base + losses.mean(MHA, losses.num_heads, longest)
  guess = f'{unigram["validation_loss"]:.3f}' if unigram else NOT_RUN
  return (
    f'All numbers measured: `{row["command"]}`, on {row["device"]}, {row["dtype"]},'
    f' {versions}. Losses are cross-entropies in nats per target token, all on the same'
    f' {row["validation_batches"]} batches of {row["batch_size"]} packed rows of the'
    f' validation split ({row["input_length"]} + {row["output_length"]} tokens). The'
    f' MHA model was pre-trained for {losses.pretrain_steps:,} steps to'
    f' {losses.base:.3f}; the best unigram model, fitted to the validation targets'
    f' themselves, has {guess}. Excess loss is what a model loses over those'
    f' {losses.base:.3f}; negative: it is better by then. MHA trained on for'
    f' {round(longest * losses.pretrain_steps):,} steps more reaches {trained_on:.3f}.'
  )


def _add_losses(doc: Document, losses: Losses, num_kv_heads: int) -> None:
  found = {
    title(method): [losses.of(method, num_kv_heads, alpha) for alpha in ALPHAS]
    for method in METHODS
    if num_kv_heads > 1 or method[2] != 'similarity'  # One group holds all heads.
  }
  seeds = set().union(*(by_alpha[0] for by_alpha in found.values()))
  mha = [
    {seed: loss for seed, loss in losses.of_mha(alpha).items() if seed in seeds}
    for alpha in ALPHAS
  ]
  rows = [
    [name, str(len(by_alpha[0])), *(_cell(list(x.values())) for x in by_alpha)]
    for name, by_alpha in {'MHA, trained on': mha, **found}.items()
  ]
  times = (f'after {alpha:.0%}' if alpha else 'step 0' for alpha in ALPHAS)
  doc.table(['excess loss of', 'seeds', *times], rows)


def _cell(values: list[float]) -> str:
  if not values:
    return NOT_RUN
  spread = f' ± {statistics.stdev(values):.3f}' if len(set(values)) > 1 else ''
  return f'{_number(statistics.fmean(values))}{spread}'


def _add_checks(doc: Document, losses: Losses) -> None:
  rows = []
  for name, check in CHECKS.items():
    for num_kv_heads in losses.num_kv_heads:
      reached, numbers = check(losses, num_kv_heads)
      answer = NOT_RUN if reached is None else 'yes' if reached else '**no**'
      rows.append([name, str(num_kv_heads), answer, numbers])
  doc.table(['target', 'K', 'reached', 'numbers'], rows, left=(0, 2, 3))
  doc.text(
    'svd is the calibrated one. Where a target compares after uptraining, the excess'
    ' loss over MHA trained on for as many steps is given, too: pre-training was not at'
    ' its end, and every model gains from more steps.'
  )


Verdict = tuple[bool | None, str]


def order_check(alpha: float) -> Callable[[Losses, int], Verdict]:
  """Makes a check that mean loses least of the paper's three, and random most.

  Args:
    alpha: when; the paper's figure 4 has 0.05.
  """

  def check(losses: Losses, num_kv_heads: int) -> Verdict:
    values = [losses.mean(x, num_kv_heads, alpha) for x in (MEAN, FIRST, RANDOM)]
    if None in values:
      return None, NOT_RUN
    return values[0] < values[1] < values[2], ' < '.join(map(_number, values))

  return check


def ratio_check(
  svd_alpha: float, mean_alpha: float, limit: float
) -> Callable[[Losses, int], Verdict]:
  """Makes a check that svd loses at most a share of what mean loses.

  Args:
    svd_alpha: when svd is looked at.
    mean_alpha: when mean is.
    limit: the share.
  """

  def check(losses: Losses, num_kv_heads: int) -> Verdict:
    svd = losses.mean(SVD, num_kv_heads, svd_alpha)
    mean = losses.mean(MEAN, num_kv_heads, mean_alpha)
    if svd is None or mean is None:
      return None, NOT_RUN
    numbers = _ratio(svd, mean)
    svd_over = losses.over_mha(SVD, num_kv_heads, svd_alpha)
    mean_over = losses.over_mha(MEAN, num_kv_heads, mean_alpha)
    if mean_alpha and None not in (svd_over, mean_over):
      numbers += f'; over MHA trained on: {_ratio(svd_over, mean_over)}'
    return svd <= limit * mean, numbers

  return check


def _ratio(svd: float, mean: float) -> str:
  share = f'= {svd / mean:.3f}' if mean > 0 and svd >= 0 else '(no ratio)'
  return f'{_number(svd)} / {_number(mean)} {share}'


def _number(value: float) -> str:
  """Three digits, and no minus before a zero."""
  return f'{round(value, 3) + 0.0:.3f}'


CHECKS: dict[str, Callable[[Losses, int], Verdict]] = {
  'at step 0, loss of mean < first < random': order_check(0.0),
  'after 5%, loss of mean < first < random (the figure 4 of the paper)': order_check(
    0.05
  ),
  'at step 0, svd loses at most 0.1 of what mean loses': ratio_check(0.0, 0.0, 0.1),
  'svd at step 0 loses no more than mean after 5%': ratio_check(0.0, 0.05, 1.0),
  'after 5%, svd loses at most 0.3 of what mean loses': ratio_check(0.05, 0.05, 0.3),
}
