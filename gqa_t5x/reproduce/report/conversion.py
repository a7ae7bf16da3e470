"""The report of a study of conversion: checked targets, tables, figures."""

import pathlib
import statistics
from collections.abc import Callable, Sequence
from functools import partial

from gqa_t5x import files
from gqa_t5x.model import network, sizes
from gqa_t5x.reproduce.experiments.models import MEAN, METHODS, MHA, PAPER_METHODS, SVD
from gqa_t5x.reproduce.experiments.paper import ALPHAS
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.studies import STUDIES
from gqa_t5x.reproduce.report import conversion_figures
from gqa_t5x.reproduce.report.conversion_figures import MODULE_SIDES, Shares
from gqa_t5x.reproduce.report.document import NOT_RUN, Document
from gqa_t5x.reproduce.results.losses import Losses
from gqa_t5x.reproduce.results.rows import Row, read_rows, versions

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

  Raises:
    BadInput: the rows are damaged or mixed.
  """
  plan = Planner(STUDIES[study], output_dir)
  folder, rows_file = plan.folder, plan.rows
  losses = Losses(read_rows(rows_file, 'conversion'))
  doc = Document(f'Conversion of a T5.1.1 ({losses.size}): which method loses least')
  (unigram,) = read_rows(rows_file, 'unigram')
  worth = read_rows(rows_file, 'worth')
  doc.text(_conditions(losses, unigram), _worth(worth), '## Targets')
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
    ' over that of MHA after as many steps on the same data.',
    *SPECTRA,
  )
  spectra = read_rows(rows_file, 'spectrum')
  conversion_figures.draw_spectra(spectra, folder / 'spectra.png')
  doc.image('spectra.png', 'Dropped share of the spectrum by layer')
  _add_trend(doc, rows_file)
  files.write_text(folder / 'conversion.md', doc.markdown())


def _conditions(losses: Losses, unigram: Row) -> str:
  row = losses.rows[0]
  longest = max(losses.alphas(MHA, losses.num_heads))
  trained_on = losses.base + losses.mean(MHA, losses.num_heads, longest)
  return (
    f'All numbers measured: `{row["command"]}`, on {row["device"]}, {row["dtype"]},'
    f' {versions(row)}. Losses are cross-entropies in nats per target token, all on the'
    f' same {row["validation_batches"]} batches of {row["batch_size"]} packed rows of'
    f' the validation split ({row["input_length"]} + {row["output_length"]} tokens).'
    f' The MHA model was pre-trained for {losses.pretrain_steps:,} steps to'
    f' {losses.base:.3f}; the best unigram model, fitted to the validation targets'
    f' themselves, has {unigram["validation_loss"]:.3f}. Excess loss is what a model'
    f' loses over those {losses.base:.3f}; negative: it is better by then. MHA trained'
    f' on for {round(longest * losses.pretrain_steps):,} steps more reaches'
    f' {trained_on:.3f}.'
  )


def _worth(rows: Sequence[Row]) -> str:
  found = {row['zeroed']: _number(row['excess_loss']) for row in rows}
  return (
    'What attention of the decoder is worth: with all self-attention set to zero the'
    f' MHA model loses {found["self"]} more, with all cross-attention {found["cross"]}.'
  )


def _add_losses(doc: Document, losses: Losses, num_kv_heads: int) -> None:
  found = {
    method.title: [losses.of(method, num_kv_heads, alpha) for alpha in ALPHAS]
    for method in METHODS
    if num_kv_heads > 1 or method.grouping != 'similarity'  # One group holds all heads.
  }
  seeds = set().union(*(by_alpha[0] for by_alpha in found.values()))
  mha = [
    {seed: loss for seed, loss in found_mha.items() if seed in seeds}
    for found_mha in (losses.of(MHA, losses.num_heads, alpha) for alpha in ALPHAS)
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


def _number(value: float) -> str:
  """Three digits, and no minus before a zero."""
  return f'{round(value, 3) + 0.0:.3f}'


def _add_checks(doc: Document, losses: Losses) -> None:
  rows = []
  for name, check in CHECKS.items():
    for num_kv_heads in losses.num_kv_heads:
      reached, numbers = check(losses, num_kv_heads) or (None, NOT_RUN)
      answer = NOT_RUN if reached is None else 'yes' if reached else '**no**'
      rows.append([name, str(num_kv_heads), answer, numbers])
  doc.table(['target', 'K', 'reached', 'numbers'], rows, left=(0, 2, 3))
  doc.text(
    'svd is the calibrated one. Where a target compares after uptraining, the excess'
    ' loss over MHA trained on for as many steps is given, too: pre-training was not at'
    ' its end, and every model gains from more steps.'
  )


# Whether a target is reached, and by which numbers; None if it was not run.
Verdict = tuple[bool, str] | None


def _check_order(losses: Losses, num_kv_heads: int, *, alpha: float) -> Verdict:
  """Whether mean loses least of the paper's three, and random most."""
  values = [losses.mean(x, num_kv_heads, alpha) for x in PAPER_METHODS]
  if None in values:
    return None
  return values[0] < values[1] < values[2], ' < '.join(map(_number, values))


def _check_ratio(
  losses: Losses, num_kv_heads: int, *, svd: float, mean: float, limit: float
) -> Verdict:
  """Whether svd loses at most a share of what mean loses, each at its own alpha."""
  asked = ((SVD, num_kv_heads, svd), (MEAN, num_kv_heads, mean))
  values = [losses.mean(*key) for key in asked]
  if None in values:
    return None
  numbers, over_mha = _ratio(*values), [losses.over_mha(*key) for key in asked]
  if mean and None not in over_mha:
    numbers += f'; over MHA trained on: {_ratio(*over_mha)}'
  return values[0] <= limit * values[1], numbers


def _ratio(svd: float, mean: float) -> str:
  share = f'= {svd / mean:.3f}' if mean > 0 and svd >= 0 else '(no ratio)'
  return f'{_number(svd)} / {_number(mean)} {share}'


CHECKS: dict[str, Callable[[Losses, int], Verdict]] = {
  'at step 0, loss of mean < first < random': partial(_check_order, alpha=0.0),
  'after 5%, loss of mean < first < random (the figure 4 of the paper)': partial(
    _check_order, alpha=0.05
  ),
  'at step 0, svd loses at most 0.1 of what mean loses': partial(
    _check_ratio, svd=0.0, mean=0.0, limit=0.1
  ),
  'svd at step 0 loses no more than mean after 5%': partial(
    _check_ratio, svd=0.0, mean=0.05, limit=1.0
  ),
  'after 5%, svd loses at most 0.3 of what mean loses': partial(
    _check_ratio, svd=0.05, mean=0.05, limit=0.3
  ),
}


def _add_trend(doc: Document, rows_file: pathlib.Path) -> None:
  """Adds a comparison of sizes, whose folders are next to each other, if there are any.

  That is a table and the figure `trend.png`; `rows_file` is that of the report's size.
  """
  folder = rows_file.parent
  found = {size: folder.parent / size / rows_file.name for size in sizes.SIZES}
  found = {size: file for size, file in found.items() if file.exists()}
  if len(found) < 2:
    return
  studies = {size: _read_study(file) for size, file in found.items()}
  doc.text(
    '## Against scale',
    'Excess loss right after conversion, and the share of the calibrated spectra that'
    ' does\nnot fit, mean over layers and groups.',
  )
  sides = (f'{kind.partition("_")[0]} {side}' for kind, side in MODULE_SIDES)
  head = ['size', 'D', 'layers', 'heads', 'MHA loss', 'to K', 'mean', 'svd']
  rows = [
    _trend_row(size, losses, K, shares[K])
    for size, (losses, shares) in studies.items()
    for K in losses.num_kv_heads
  ]
  doc.table([*head, 'svd / mean', *sides], rows)
  conversion_figures.draw_trend(studies, folder / 'trend.png')
  doc.image('trend.png', 'Dropped share of the spectrum by size')


def _trend_row(size: str, losses: Losses, K: int, shares: Shares) -> list[str]:
  config = network.config(size)
  mean, svd = (losses.mean(method, K, 0.0) for method in (MEAN, SVD))
  return [
    size,
    str(config.emb_dim),
    f'{config.num_encoder_layers} + {config.num_decoder_layers}',
    f'{config.num_heads} x {config.head_dim}',
    f'{losses.base:.3f}',
    str(K),
    f'{mean:.3f}',
    f'{svd:.4f}',
    f'{svd / mean:.4f}',
    *(f'{share:.4f}' for share in shares.values()),
  ]


def _read_study(file: pathlib.Path) -> tuple[Losses, dict[int, Shares]]:
  """A study's losses, and for each K what does not fit of its calibrated spectra."""
  losses, found = Losses(read_rows(file, 'conversion')), {}
  for row in read_rows(file, 'spectrum'):
    if row['statistics'] == 'calibrated':
      key = row['num_kv_heads'], row['module'], row['side']
      found.setdefault(key, []).extend(row['dropped_share'])
  return losses, {
    K: {side: statistics.fmean(found[K, *side]) for side in MODULE_SIDES}
    for K in losses.num_kv_heads
  }
