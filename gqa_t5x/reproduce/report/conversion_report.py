"""Rows of the conversion study to tables, checked targets and figures."""

import json
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from gqa_t5x.reproduce.experiments.arms import METHODS, title
from gqa_t5x.reproduce.report import conversion_figures, conversion_trend

Row = dict[str, Any]
Label = tuple[str, str, str]

# Shares of the pre-training steps that tables show.
ALPHAS = (0.0, 0.01, 0.02, 0.05, 0.1)
NOT_RUN = 'not run'
MHA: Label = ('none', 'none', 'contiguous')
MEAN, FIRST, RANDOM = METHODS[:3]
SVD: Label = ('svd', 'calibrated', 'contiguous')
TREND = """
## Against scale

Excess loss right after conversion, and the share of the calibrated spectra that does
not fit, mean over layers and groups.

{table}

![Dropped share of the spectrum by size](trend.png)
"""


class Losses:
  """Excess losses by model, key/value heads, alpha and seed, nats per token."""

  def __init__(self, rows: Iterable[Row]):
    """Sorts rows of kind 'conversion'; other kinds are passed over."""
    self._values: dict[tuple[Label, int, int], dict[int, float]] = {}
    self.rows = [row for row in rows if row['kind'] == 'conversion']
    for row in self.rows:
      self._values.setdefault(self._key(row), {})[row['seed']] = row['excess_loss']
    self.pretrain_steps = self.rows[0]['pretrain_steps']
    mha = [row for row in self.rows if label_of(row) == MHA]
    self.num_heads = mha[0]['num_kv_heads']
    self.base = min(mha, key=lambda row: row['uptrain_steps'])['validation_loss']
    heads = {row['num_kv_heads'] for row in self.rows} - {self.num_heads}
    self.num_kv_heads = sorted(heads, reverse=True)

  @staticmethod
  def _key(row: Row) -> tuple[Label, int, int]:
    return label_of(row), row['num_kv_heads'], row['uptrain_steps']

  def of(self, label: Label, num_kv_heads: int, alpha: float) -> dict[int, float]:
    """Seed -> excess loss; nothing if it was not run."""
    steps = round(alpha * self.pretrain_steps)
    return self._values.get((label, num_kv_heads, steps), {})

  def mean(self, label: Label, num_kv_heads: int, alpha: float) -> float | None:
    """Their mean, or None."""
    values = self.of(label, num_kv_heads, alpha).values()
    return statistics.fmean(values) if values else None

  def over_mha(self, label: Label, num_kv_heads: int, alpha: float) -> float | None:
    """Mean loss over that of MHA trained as long on the same data, seed by seed."""
    values, mha = self.of(label, num_kv_heads, alpha), self.of_mha(alpha)
    pairs = [value - mha[seed] for seed, value in values.items() if seed in mha]
    return statistics.fmean(pairs) if pairs else None

  def of_mha(self, alpha: float) -> dict[int, float]:
    """Seed -> excess loss of MHA trained on: below 0 if it gains."""
    return self.of(MHA, self.num_heads, alpha)

  def alphas(self, label: Label, num_kv_heads: int) -> list[float]:
    """When it was evaluated, in order."""
    wanted = (label, num_kv_heads)
    steps = sorted(key[2] for key in self._values if key[:2] == wanted)
    return [step / self.pretrain_steps for step in steps]


def label_of(row: Row) -> Label:
  """Returns what tells the methods apart: method, statistics, grouping."""
  return row['method'], row['statistics'], row['grouping']


def write(rows_file: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes `conversion.md`, its figures, and `trend.png` if there are other sizes.

  Args:
    rows_file: JSON list of rows (conversion_rows.py).
    folder: where the report goes; other sizes have their folders beside it.
  """
  rows = json.loads(rows_file.read_text())
  losses = Losses(rows)
  conversion_figures.draw_losses(losses, folder / 'conversion.png')
  spectra = [row for row in rows if row['kind'] == 'spectrum']
  if spectra:
    conversion_figures.draw_spectra(spectra, folder / 'spectra.png')
  text = markdown(rows)
  sizes = conversion_trend.read(folder.parent)
  if len(sizes) > 1:
    conversion_trend.draw(sizes, folder / 'trend.png')
    text += TREND.format(table=conversion_trend.markdown(sizes))
  temporary = folder / 'conversion.tmp'
  temporary.write_text(text)
  os.replace(temporary, folder / 'conversion.md')


def markdown(rows: list[Row]) -> str:
  """Returns the whole report."""
  losses = Losses(rows)
  unigram = next((row for row in rows if row['kind'] == 'unigram'), None)
  parts = [
    f'# Conversion of a T5.1.1 ({losses.rows[0]["size"]}): which method loses least',
    _conditions(losses, unigram),
    '## Targets',
    *_check_table(losses),
  ]
  for num_kv_heads in losses.num_kv_heads:
    parts += [f'## {losses.num_heads} to {num_kv_heads} key/value heads']
    parts += [_loss_table(losses, num_kv_heads)]
  parts += [
    f'±: standard deviation over the seeds of uptraining data. {NOT_RUN}: no row.',
    '![Excess loss by method, and against uptraining](conversion.png)',
    'Axes are linear in the shaded part and logarithmic beyond. Lower row: the loss'
    ' over that of MHA after as many steps on the same data.',
  ]
  if any(row['kind'] == 'spectrum' for row in rows):
    parts += [
      '## What does not fit into a shared head',
      'Each group of heads shares one key and one value head. Of the spectrum behind'
      ' `svd` (logits for keys, outputs for values), the figure shows the share that'
      ' does not fit, layer by layer: the mean over the groups, and their range.'
      ' Measured with the same command; the ranks are in the rows.',
      '![Dropped share of the spectrum by layer](spectra.png)',
    ]
  return '\n\n'.join(parts) + '\n'


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


def _loss_table(losses: Losses, num_kv_heads: int) -> str:
  heads = ' | '.join(f'after {alpha:.0%}' if alpha else 'step 0' for alpha in ALPHAS)
  lines = [
    f'| excess loss of | seeds | {heads} |',
    '|---|---:|' + '---:|' * len(ALPHAS),
  ]
  by_name = {
    title(*label): [losses.of(label, num_kv_heads, alpha) for alpha in ALPHAS]
    for label in METHODS
    if num_kv_heads > 1 or label[2] != 'similarity'  # One group holds all heads.
  }
  seeds = set().union(*(found[0] for found in by_name.values()))
  mha = [
    {seed: loss for seed, loss in losses.of_mha(alpha).items() if seed in seeds}
    for alpha in ALPHAS
  ]
  for name, found in {'MHA, trained on': mha, **by_name}.items():
    cells = ' | '.join(_cell(list(by_seed.values())) for by_seed in found)
    lines.append(f'| {name} | {len(found[0])} | {cells} |')
  return '\n'.join(lines)


def _cell(values: list[float]) -> str:
  if not values:
    return NOT_RUN
  spread = f' ± {statistics.stdev(values):.3f}' if len(set(values)) > 1 else ''
  return f'{_number(statistics.fmean(values))}{spread}'


def _check_table(losses: Losses) -> list[str]:
  lines = ['| target | K | reached | numbers |', '|---|---:|---|---|']
  for name, check in CHECKS.items():
    for num_kv_heads in losses.num_kv_heads:
      reached, numbers = check(losses, num_kv_heads)
      answer = NOT_RUN if reached is None else 'yes' if reached else '**no**'
      lines.append(f'| {name} | {num_kv_heads} | {answer} | {numbers} |')
  note = (
    'svd is the calibrated one. Where a target compares after uptraining, the excess'
    ' loss over MHA trained on for as many steps is given, too: pre-training was not at'
    ' its end, and every model gains from more steps.'
  )
  return ['\n'.join(lines), note]


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
