"""Conversion of heads that were trained for long: what is left, and what is dropped."""

import statistics
from collections.abc import Sequence
from typing import Any

from gqa_t5x.analysis import figures
from gqa_t5x.reproduce.experiments import targets
from gqa_t5x.reproduce.experiments.models import MEAN, SVD, SVD_BY_WEIGHTS
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.results.reader import Measured
from gqa_t5x.reproduce.results.rows import Row
from gqa_t5x.reproduce.studies import cache_budget
from gqa_t5x.reproduce.studies.heads import LATENT, VARIANTS, Variant

HEAD = ('cosine', 'same neighbour', 'keys dropped', 'values dropped')
STYLES = {
  Variant(MEAN): figures.METHODS['mean'],
  Variant(SVD_BY_WEIGHTS): (figures.GREEN, 'v'),
  Variant(SVD): figures.METHODS['svd'],
  Variant(SVD, refit_outputs=True): (figures.ORANGE, 's'),
  Variant(SVD_BY_WEIGHTS, latent=True): (figures.PINK, '^'),
  LATENT: (figures.BLACK, 'o'),
}
SIDES = ('key', 'value')


def write(part: Part) -> None:
  """Adds a table for each size of the cache, and the figure."""
  doc, path = part.doc, targets.heads_file(part.plan.output_dir)
  rows, spectra = (
    part.found.rows(path, kind, source='measured')
    for kind in ('heads', 'heads_spectrum')
  )
  if not rows or not spectra:
    doc.text(f'{doc.not_run().capitalize()}.')
    return
  doc.text(_conditions(rows))
  for K in dict.fromkeys(row['cache_heads'] for row in rows):
    table = [
      [variant.title, *_cells(part, rows, spectra, variant, K)]
      for variant in VARIANTS
      if _of(rows, variant, K)
    ]
    doc.table([f'cache of {K} of {rows[0]["num_heads"]} heads, by', *HEAD], table)
  _draw(part, rows, spectra)
  _add_budgets(part, part.found.rows(path, 'heads_budget', source='measured'))


def _add_budgets(part: Part, rows: Sequence[Row]) -> None:
  """What is dropped if the cache is spent where it holds most."""
  if not rows:
    return
  heads = list(dict.fromkeys(row['cache_heads'] for row in rows))
  table = []
  for form in dict.fromkeys(row['form'] for row in rows):
    for way in cache_budget.WAYS:
      cells = []
      for K in heads:
        wanted = {'form': form, 'spent': way, 'cache_heads': K}
        values = [row['dropped_share'] for row in rows if row | wanted == row]
        number = Measured(tuple(values), 'measured', (rows[0]['command'],))
        cells.append(part.doc.number(number, 3))
      table.append([form, way, *cells])
  part.doc.text(
    'The share that is dropped, mean over keys and values of all layers, if the same'
    ' bytes are spent otherwise: chosen from the calibrated spectra.'
  )
  head = (f'cache of {K} heads' for K in heads)
  part.doc.table(['form', 'sizes', *head], table, left=(0, 1))


def _conditions(rows: Sequence[Row]) -> str:
  row, samples = rows[0], len({row['sample'] for row in rows})
  return (
    f'All self-attention of {row["model"]}, a sentence encoder of {row["num_heads"]}'
    ' heads, converted and not trained after it. Cosine of the embeddings with the'
    " original's, and how often a text's nearest neighbour is the same, of"
    f' {row["texts"]} docstrings; statistics of {row["calibration_texts"]} others; mean'
    f' ± standard deviation of {samples} samples. Dropped: the share of the spectrum'
    ' that the shared heads do not hold, mean over layers and groups. Latent: all heads'
    ' read one shared head, which has as many numbers as the others have together.'
  )


def _of(rows: Sequence[Row], variant: Variant, K: int, **more: Any) -> list[Row]:
  """The rows of a variant with the cache of K heads."""
  wanted = {'variant': variant.title, 'cache_heads': K, **more}
  return [row for row in rows if row | wanted == row]


def _cells(
  part: Part, rows: Sequence[Row], spectra: Sequence[Row], variant: Variant, K: int
) -> list[str]:
  found, command = _of(rows, variant, K), (rows[0]['command'],)
  values = [[row[key] for row in found] for key in ('cosine', 'same_neighbour')]
  cells = [part.doc.number(Measured(tuple(v), 'measured', command), 3) for v in values]
  for side in SIDES:
    by_sample = [
      _dropped(_of(spectra, variant, K, side=side, sample=row['sample']))
      for row in found
    ]
    number = Measured(tuple(by_sample), 'measured', command)
    cells.append('-' if None in by_sample else part.doc.number(number, 3))
  return cells


def _dropped(spectra: Sequence[Row]) -> float | None:
  """The mean over layers and groups; None of no rows."""
  shares = [share for row in spectra for share in row['dropped_share']]
  return statistics.fmean(shares) if shares else None


def _draw(part: Part, rows: Sequence[Row], spectra: Sequence[Row]) -> None:
  name = 'heads.png'
  heads = list(dict.fromkeys(row['cache_heads'] for row in rows))
  with figures.figure(part.path(name), 11, 4.0) as fig:
    left, *others = fig.subplots(1, 3)
    others[0].sharey(others[1])
    figures.plot(left, _agreement(rows, heads))
    label = f'cache, as of so many of {rows[0]["num_heads"]} heads'
    figures.tidy(left, 'both', 'Agreement', xlabel=label, ylabel='cosine')
    left.set_xticks([*heads, rows[0]['num_heads']])
    lines, labels = left.get_legend_handles_labels()
    fig.legend(lines, labels, loc='outside lower center', ncols=3, fontsize=8)
    for axis, side in zip(others, SIDES, strict=True):
      figures.plot(axis, _by_layer(spectra, heads[0], side))
      title = f'{side.capitalize()}s, cache of {heads[0]} heads'
      figures.tidy(axis, 'y', title, xlabel='layer', ylabel='share dropped')
      axis.xaxis.get_major_locator().set_params(integer=True)
    others[0].set_ylim(bottom=0)  # After both: it fixes what they share.
  part.doc.figure(
    name,
    'Heads that were trained for long, converted and not trained after it: agreement of'
    ' the embeddings against the size of the cache, and the share of each layer that'
    ' does not fit. Measured.',
  )


def _agreement(rows: Sequence[Row], heads: Sequence[int]) -> list[figures.Series]:
  """Cosine against the cache: the mean over the samples, and all heads at 1."""
  series, heads = [], sorted(heads)
  for variant, style in STYLES.items():
    found = {K: [row['cosine'] for row in _of(rows, variant, K)] for K in heads}
    points = {K: statistics.fmean(values) for K, values in found.items() if values}
    points[rows[0]['num_heads']] = 1.0
    drawn = variant.title, list(points), list(points.values())
    series.append(figures.Series(*drawn, *style, hollow=variant.latent, line=True))
  return series


def _by_layer(spectra: Sequence[Row], K: int, side: str) -> list[figures.Series]:
  """The dropped share by layer: the mean over samples and groups."""
  series = []
  for variant, style in STYLES.items():
    found: dict[int, list[Row]] = {}
    for row in _of(spectra, variant, K, side=side):
      found.setdefault(row['layer'], []).append(row)
    if found:
      drawn = variant.title, list(found), [_dropped(few) for few in found.values()]
      series.append(figures.Series(*drawn, *style, hollow=variant.latent, line=True))
  return series
