"""The conversion study's report: checked targets, tables, figures."""

import json

import pytest

from gqa_t5x.reproduce import conversion_figures, conversion_report
from gqa_t5x.reproduce.arms import METHODS, title

MEAN, FIRST, RANDOM = METHODS[:3]
SVD = ('svd', 'calibrated', 'contiguous')
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
    (conversion_report.MHA, 8, 1): (0, -0.01, -0.02, -0.05, -0.1),
    (conversion_report.MHA, 8, 2): (0, -0.03, -0.04, -0.07, -0.12),
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
    for alpha, excess in zip(conversion_report.ALPHAS, values, strict=True)
  ]


GOOD = {
  (MEAN, 2, 1): (0.8, 0.2, 0.1, 0.05, 0.01),
  (MEAN, 2, 2): (0.8, 0.4, 0.1, 0.07, 0.03),
  (FIRST, 2, 1): (0.9, 0.3, 0.2, 0.1, 0.05),
  (RANDOM, 2, 1): (1.5, 0.5, 0.3, 0.2, 0.1),
  (SVD, 2, 1): (0.04, 0.03, 0.02, 0.01, 0.0),
}


def checks(rows, K):
  losses = conversion_report.Losses(rows)
  return [check(losses, K)[0] for check in conversion_report.CHECKS.values()]


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
  losses = conversion_report.Losses(make_rows(GOOD))
  texts = [check(losses, 2)[1] for check in conversion_report.CHECKS.values()]
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
  conversion_report.write(tmp_path / 'rows.json', tmp_path)
  text = (tmp_path / 'conversion.md').read_text()
  lines = text.splitlines()
  # MHA is shown with the seeds of the methods beside it.
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


def test_titles_of_methods_differ():
  assert len({title(*label) for label in METHODS}) == len(METHODS)
