"""The reports of a study and of the miniature: targets, tables, figures."""

import itertools
import json

import pytest

from gqa_t5x.reproduce.experiments.models import FIRST, MEAN, MHA, RANDOM, SVD
from gqa_t5x.reproduce.report import conversion, conversion_figures, miniature, trend
from gqa_t5x.reproduce.results.losses import Losses

# What all rows have.
COMMON = {
  'kind': 'conversion',
  'source': 'measured',
  'command': 'python -m gqa_t5x.reproduce run conversion --scale=local --size=tiny',
  'size': 'tiny',
  'pretrain_steps': 1000,
  'validation_batches': 40,
  'batch_size': 16,
  'input_length': 128,
  'output_length': 29,
  'dtype': 'float32',
  'device': 'a cpu',
  'versions': {'jax': '1'},
}
UNIGRAM = COMMON | {'kind': 'unigram', 'validation_loss': 6.25}
MHA_LOSSES = {
  (MHA, 8, 1): (0, -0.01, -0.02, -0.05, -0.1),
  (MHA, 8, 2): (0, -0.03, -0.04, -0.07, -0.12),
}
GOOD = MHA_LOSSES | {
  (MEAN, 2, 1): (0.8, 0.2, 0.1, 0.05, 0.01),
  (MEAN, 2, 2): (0.8, 0.4, 0.1, 0.07, 0.03),
  (FIRST, 2, 1): (0.9, 0.3, 0.2, 0.1, 0.05),
  (RANDOM, 2, 1): (1.5, 0.5, 0.3, 0.2, 0.1),
  (SVD, 2, 1): (0.04, 0.03, 0.02, 0.01, 0.0),
}


def loss_rows(table, base=3.5, **values):
  """Rows from (method, K, seed) -> excess losses at the report's alphas."""
  return [
    {
      **COMMON,
      **dict(zip(('method', 'statistics', 'grouping'), method, strict=True)),
      'num_kv_heads': K,
      'seed': seed,
      'uptrain_steps': round(1000 * alpha),
      'alpha': alpha,
      'validation_loss': base + excess,
      'excess_loss': excess,
      **values,
    }
    for (method, K, seed), losses in table.items()
    for alpha, excess in zip(conversion.ALPHAS, losses, strict=True)
  ]


def spectrum_rows(share):
  """Of two layers: sides have 1, 2, 3, 4 times the share, layer 1 twice layer 0's."""
  rows = []
  sides, kinds = enumerate(trend.SIDES, 1), (('calibrated', 1), ('weights', 7))
  for (i, (module, side)), (statistics, factor), layer in itertools.product(
    sides, kinds, (0, 1)
  ):
    dropped = factor * share * i * (layer + 1)
    place = {'layer': layer, 'module': module, 'side': side, 'num_kv_heads': 2}
    shares = {'statistics': statistics, 'dropped_share': [dropped / 2, 1.5 * dropped]}
    rows.append({**COMMON, 'kind': 'spectrum', **place, **shares})
  return rows


def write_report(folder, study, rows):
  """Returns the lines of the report of a study's rows, and its folder."""
  folder = folder / 'local' / 'conversion' / study
  folder.mkdir(parents=True)
  (folder / 'rows.json').write_text(json.dumps(rows))
  conversion.write(str(folder.parents[2]), study)
  return (folder / 'conversion.md').read_text().splitlines(), folder


def assert_pictures(folder, *names):
  assert {path.name for path in folder.glob('*.png')} == set(names)
  for name in names:
    assert (folder / name).read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    ({}, [True, True, True, True, True]),
    ({(FIRST, 2, 1): (0.8,) * 5}, [False, False, True, True, True]),
    ({(FIRST, 2, 1): (0.9, 0, 0, 0.06, 0)}, [True, False, True, True, True]),
    ({(RANDOM, 2, 1): (0.85,) * 5}, [False, True, True, True, True]),
    ({(RANDOM, 2, 1): (1.5, 0, 0, 0.1, 0)}, [True, False, True, True, True]),
    ({(SVD, 2, 1): (0.081, 0, 0, 0.01, 0)}, [True, True, False, False, True]),
    ({(SVD, 2, 1): (0.061, 0, 0, 0.01, 0)}, [True, True, True, False, True]),
    ({(SVD, 2, 1): (0.04, 0, 0, 0.019, 0)}, [True, True, True, True, False]),
    ({(FIRST, 2, 1): ()}, [None, None, True, True, True]),
    ({(SVD, 2, 1): ()}, [True, True, None, None, None]),
  ],
)
def test_checks(change, expected):
  table = {key: values for key, values in (GOOD | change).items() if values}
  losses = Losses(loss_rows(table))
  verdicts = [check(losses, 2) for check in conversion.CHECKS.values()]
  assert [verdict and verdict[0] for verdict in verdicts] == expected


def test_numbers_of_the_checks():
  losses = Losses(loss_rows(GOOD))
  assert [check(losses, 2)[1] for check in conversion.CHECKS.values()] == [
    '0.800 < 0.900 < 1.500',
    '0.060 < 0.100 < 0.200',
    '0.040 / 0.800 = 0.050',
    '0.040 / 0.060 = 0.667; over MHA trained on: 0.040 / 0.120 = 0.333',
    '0.010 / 0.060 = 0.167; over MHA trained on: 0.060 / 0.120 = 0.500',
  ]


def test_report(tmp_path):
  losses = loss_rows(GOOD | {(MEAN, 4, 1): (0.3, 0.2, 0.1, 0.05, 0.01)})
  rows = [*losses, UNIGRAM, *spectrum_rows(0.1)]
  lines, folder = write_report(tmp_path, 'tiny', rows)
  # MHA is shown with the seeds of the other methods.
  of_two, of_four = (
    next(line for line in lines[lines.index(heading) :] if 'MHA, trained on' in line)
    for heading in ('## 8 to 2 key/value heads', '## 8 to 4 key/value heads')
  )
  assert of_four == (
    '| MHA, trained on | 1 | 0.000 | -0.010 | -0.020 | -0.050 | -0.100 |'
  )
  assert of_two == (
    '| MHA, trained on | 2 | 0.000 | -0.020 ± 0.014 | -0.030 ± 0.014'
    ' | -0.060 ± 0.014 | -0.110 ± 0.014 |'
  )
  assert (
    '| mean | 2 | 0.800 | 0.300 ± 0.141 | 0.100 | 0.060 ± 0.014 | 0.020 ± 0.014 |'
    in lines
  )
  assert '| svd (calibrated) | 1 | 0.040 | 0.030 | 0.020 | 0.010 | 0.000 |' in lines
  assert f'| svd (weights) | 0 |{" not run |" * 5}' in lines
  text = '\n'.join(lines)
  for fact in ('measured', 'a cpu', 'jax 1', '1,000 steps', '3.500', '6.250', '3.390'):
    assert fact in text
  assert f'`{COMMON["command"]}`' in text
  assert_pictures(folder, 'conversion.png', 'spectra.png')


@pytest.mark.parametrize(
  ('places', 'expected'),
  [
    ([0.0, 0.5, 1.0], [0.0, 0.5, 1.0]),
    ([0.5, 0.5], [0.45, 0.55]),
    ([0.2, 0.25, 0.9], [0.2 - 0.05 / 3, 0.3 - 0.05 / 3, 0.9 - 0.05 / 3]),
  ],
)
def test_labels_are_spread(places, expected):
  assert conversion_figures.spread(places, 0.1) == pytest.approx(expected)


def test_trend(tmp_path):
  reports = {}
  for size, loss, svd, share in (('tiny', 3.5, 0.01, 0.01), ('mini', 3.25, 0.02, 0.02)):
    table = {
      (MHA, 8, 1): (0,) * 5,
      (MEAN, 2, 1): (0.5, 0.1, 0.1, 0.1, 0.1),
      (SVD, 2, 1): (svd, 0, 0, 0, 0),
      (('svd', 'calibrated', 'similarity'), 2, 1): (9.0,) * 5,
    }
    rows = [*loss_rows(table, loss, size=size), UNIGRAM, *spectrum_rows(share)]
    reports[size], folder = write_report(tmp_path, size, rows)
  # The first report knew of a single size.
  assert '## Against scale' not in reports['tiny']
  start = reports['mini'].index('## Against scale')
  assert [line for line in reports['mini'][start:] if line.startswith('| ')] == [
    '| size | D | layers | heads | MHA loss | to K | mean | svd | svd / mean'
    ' | self key | self value | cross key | cross value |',
    '| tiny | 128 | 2 + 4 | 8 x 16 | 3.500 | 2 | 0.500 | 0.0100 | 0.0200'
    ' | 0.0150 | 0.0300 | 0.0450 | 0.0600 |',
    '| mini | 256 | 2 + 6 | 8 x 64 | 3.250 | 2 | 0.500 | 0.0200 | 0.0400'
    ' | 0.0300 | 0.0600 | 0.0900 | 0.1200 |',
  ]
  assert_pictures(folder, 'conversion.png', 'spectra.png', 'trend.png')


def test_report_of_the_miniature(tmp_path):
  names = ('method', 'num_kv_heads', 'uptrain_steps', 'validation_loss')
  facts = {'parameters': 1000, 'cache_bytes_per_token': 64, 'validation_accuracy': 0.25}
  losses = [
    ('none', 8, 0, 2.0),
    ('none', 8, 2, 1.9),
    ('mean', 2, 0, 2.5),
    ('mean', 2, 2, 2.1),
    ('random', 2, 0, 3.5),
    ('svd', 2, 0, 2.2),
    ('svd', 2, 2, 2.05),
  ]
  rows = [
    {**COMMON, **facts, 'kind': 'uptrain', **dict(zip(names, row, strict=True))}
    for row in losses
  ]
  timing = {**COMMON, 'kind': 'decode', 'batch_size': 4, 'input_length': 16}
  rows += [{**timing, 'num_kv_heads': K, 'ms_per_step': float(K)} for K in (8, 2)]
  (tmp_path / 'rows.json').write_text(json.dumps(rows))
  miniature.write(str(tmp_path))
  lines = (tmp_path / 'report.md').read_text().splitlines()
  assert [line for line in lines if line.startswith('| ')][1:] == [
    '| MHA | - | 1,000 | 64 | 2.000, 0.250 | 1.900, 0.250 | 2.000 |',
    '| GQA-2 | mean | 1,000 | 64 | 2.500, 0.250 | 2.100, 0.250 | 0.500 |',
    '| GQA-2 | random | 1,000 | 64 | 3.500, 0.250 | not run | 0.500 |',
    '| GQA-2 | svd | 1,000 | 64 | 2.200, 0.250 | 2.050, 0.250 | 0.500 |',
  ]
  assert_pictures(tmp_path, 'report.png')
