"""The reports of a study and of the miniature: targets, tables, figures."""

import json

import pytest

from gqa_t5x.reproduce.experiments.models import FIRST, MEAN, MHA, RANDOM, SVD
from gqa_t5x.reproduce.report import conversion, conversion_figures, miniature, trend
from gqa_t5x.reproduce.results.losses import Losses

# What all rows have.
COMMON = {
  'kind': 'conversion',
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


def make_rows(table):
  """Rows from (label, K, seed) -> excess losses at the report's alphas."""
  table = {
    (MHA, 8, 1): (0, -0.01, -0.02, -0.05, -0.1),
    (MHA, 8, 2): (0, -0.03, -0.04, -0.07, -0.12),
  } | table
  return [
    {
      **COMMON,
      **dict(zip(('method', 'statistics', 'grouping'), label, strict=True)),
      'num_kv_heads': K,
      'seed': seed,
      'uptrain_steps': round(1000 * alpha),
      'alpha': alpha,
      'validation_loss': 3.5 + excess,
      'excess_loss': excess,
    }
    for (label, K, seed), values in table.items()
    for alpha, excess in zip(conversion.ALPHAS, values, strict=True)
  ]


GOOD = {
  (MEAN, 2, 1): (0.8, 0.2, 0.1, 0.05, 0.01),
  (MEAN, 2, 2): (0.8, 0.4, 0.1, 0.07, 0.03),
  (FIRST, 2, 1): (0.9, 0.3, 0.2, 0.1, 0.05),
  (RANDOM, 2, 1): (1.5, 0.5, 0.3, 0.2, 0.1),
  (SVD, 2, 1): (0.04, 0.03, 0.02, 0.01, 0.0),
}


def checks(rows, K):
  losses = Losses(rows)
  return [check(losses, K)[0] for check in conversion.CHECKS.values()]


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
    ({(FIRST, 2, 1): None}, [None, None, True, True, True]),
    ({(SVD, 2, 1): None}, [True, True, None, None, None]),
  ],
)
def test_checks(change, expected):
  table = {key: values for key, values in (GOOD | change).items() if values}
  assert checks(make_rows(table), 2) == expected


def test_numbers_of_the_checks():
  losses = Losses(make_rows(GOOD))
  texts = [check(losses, 2)[1] for check in conversion.CHECKS.values()]
  assert texts == [
    '0.800 < 0.900 < 1.500',
    '0.060 < 0.100 < 0.200',
    '0.040 / 0.800 = 0.050',
    '0.040 / 0.060 = 0.667; over MHA trained on: 0.040 / 0.120 = 0.333',
    '0.010 / 0.060 = 0.167; over MHA trained on: 0.060 / 0.120 = 0.500',
  ]


def test_report(tmp_path):
  rows = make_rows(GOOD | {(MEAN, 4, 1): (0.3, 0.2, 0.1, 0.05, 0.01)})
  rows.append({'kind': 'unigram', 'validation_loss': 6.25})
  for layer in (0, 1):
    for side in ('key', 'value'):
      for module in ('self_attention', 'cross_attention'):
        for statistics in ('weights', 'calibrated'):
          place = {'layer': layer, 'module': module, 'side': side}
          shares = {'num_kv_heads': 2, 'dropped_share': [0.1, 0.2]}
          rows.append({'kind': 'spectrum', 'statistics': statistics, **place, **shares})
  (tmp_path / 'rows.json').write_text(json.dumps(rows))
  conversion.write_report(tmp_path / 'rows.json')
  text = (tmp_path / 'conversion.md').read_text()
  lines = text.splitlines()
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
  for fact in ('measured', 'a cpu', 'jax 1', '1,000 steps', '3.500', '6.250', '3.390'):
    assert fact in text
  assert (
    '`python -m gqa_t5x.reproduce run conversion --scale=local --size=tiny`' in text
  )
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {'rows.json', 'conversion.md', 'conversion.png', 'spectra.png'}
  for name in ('conversion.png', 'spectra.png'):
    assert (tmp_path / name).read_bytes()[:4] == b'\x89PNG'


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


def rows_of_size(size, mha_loss, svd_loss, share):
  """A study of 8 to 2 heads; the share of layer 1 is twice that of layer 0."""
  mha = (MHA, 8, 1)
  table = {
    mha: (0,) * 5,
    (MEAN, 2, 1): (0.5, 0.1, 0.1, 0.1, 0.1),
    (SVD, 2, 1): (svd_loss, 0, 0, 0, 0),
    (('svd', 'calibrated', 'similarity'), 2, 1): (9.0,) * 5,
  }
  rows = [
    row | {'size': size, 'validation_loss': mha_loss + row['excess_loss']}
    for row in make_rows(table)
    if row['method'] != 'none' or row['seed'] == 1
  ]
  for layer in (0, 1):
    for i, (module, side) in enumerate(trend.SIDES):
      for statistics, factor in (('calibrated', 1), ('weights', 7)):
        dropped = factor * share * (i + 1) * (layer + 1)
        rows.append(
          {
            'kind': 'spectrum',
            'layer': layer,
            'module': module,
            'side': side,
            'statistics': statistics,
            'num_kv_heads': 2,
            'dropped_share': [0.5 * dropped, 1.5 * dropped],
          }
        )
  return rows


def test_trend(tmp_path):
  for size, loss, svd, share in (('tiny', 3.5, 0.01, 0.01), ('mini', 3.25, 0.02, 0.02)):
    (tmp_path / size).mkdir()
    rows = rows_of_size(size, loss, svd, share)
    (tmp_path / size / 'rows.json').write_text(json.dumps(rows))
    conversion.write_report(tmp_path / size / 'rows.json')
  # The first report knew of a single size.
  assert '## Against scale' not in (tmp_path / 'tiny' / 'conversion.md').read_text()
  lines = (tmp_path / 'mini' / 'conversion.md').read_text().splitlines()
  start = lines.index('## Against scale')
  assert [line for line in lines[start:] if line.startswith('| ')] == [
    '| size | D | layers | heads | MHA loss | to K | mean | svd | svd / mean'
    ' | self key | self value | cross key | cross value |',
    '| tiny | 128 | 2 + 4 | 8 x 16 | 3.500 | 2 | 0.500 | 0.0100 | 0.0200'
    ' | 0.0150 | 0.0300 | 0.0450 | 0.0600 |',
    '| mini | 256 | 2 + 6 | 8 x 64 | 3.250 | 2 | 0.500 | 0.0200 | 0.0400'
    ' | 0.0300 | 0.0600 | 0.0900 | 0.1200 |',
  ]
  assert (tmp_path / 'mini' / 'trend.png').read_bytes()[:4] == b'\x89PNG'


# --- The miniature -------------------------------------------------------------


def miniature_rows():
  common = {
    'parameters': 1000,
    'cache_bytes_per_token': 64,
    'pretrain_steps': 40,
    'device': 'cpu',
    'versions': {'jax': '1'},
    'kind': 'uptrain',
  }
  losses = [
    ('none', 8, 0, 2.0),
    ('none', 8, 2, 1.9),
    ('mean', 2, 0, 2.5),
    ('mean', 2, 2, 2.1),
    ('random', 2, 0, 3.5),
    ('svd', 2, 0, 2.2),
    ('svd', 2, 2, 2.05),
  ]
  names = ('method', 'num_kv_heads', 'uptrain_steps', 'validation_loss')
  rows = [
    {**common, **dict(zip(names, row, strict=True)), 'validation_accuracy': 0.25}
    for row in losses
  ]
  timing = {'kind': 'decode', 'batch_size': 4, 'input_length': 16}
  rows.append({**timing, 'num_kv_heads': 8, 'ms_per_step': 8.0})
  rows.append({**timing, 'num_kv_heads': 2, 'ms_per_step': 2.0})
  return rows


def test_report_of_the_miniature(tmp_path):
  rows_file = tmp_path / 'rows.json'
  rows_file.write_text(json.dumps(miniature_rows()))
  miniature.write(str(tmp_path))
  table = [
    line
    for line in (tmp_path / 'report.md').read_text().splitlines()
    if line.startswith('| ')
  ]
  assert table[1:] == [
    '| MHA | - | 1,000 | 64 | 2.000, 0.250 | 1.900, 0.250 | 2.000 |',
    '| GQA-2 | mean | 1,000 | 64 | 2.500, 0.250 | 2.100, 0.250 | 0.500 |',
    '| GQA-2 | random | 1,000 | 64 | 3.500, 0.250 | not run | 0.500 |',
    '| GQA-2 | svd | 1,000 | 64 | 2.200, 0.250 | 2.050, 0.250 | 0.500 |',
  ]
  assert (tmp_path / 'report.png').read_bytes()[:4] == b'\x89PNG'
  assert {p.name for p in tmp_path.iterdir()} == {
    'rows.json',
    'report.md',
    'report.png',
  }
