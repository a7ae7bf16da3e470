"""The reports of a study and of the miniature: targets, tables, figures."""

import functools
import shutil

import pytest

from gqa_t5x.reproduce.experiments.models import FIRST, MEAN, MHA, RANDOM, SVD
from gqa_t5x.reproduce.report import conversion, conversion_figures, miniature
from gqa_t5x.reproduce.results.losses import Losses
from helpers.reports import DOCS, documented

STUDY_ROWS = documented('conversion_study/tiny')
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


def loss_rows(table):
  """Rows from (method, K, seed) -> excess losses at the report's alphas."""
  return [
    {
      **STUDY_ROWS[0],
      **dict(zip(('method', 'statistics', 'grouping'), method, strict=True)),
      'num_kv_heads': K,
      'seed': seed,
      'uptrain_steps': round(2400 * alpha),
      'alpha': alpha,
      'validation_loss': 3.5 + excess,
      'excess_loss': excess,
    }
    for (method, K, seed), losses in table.items()
    for alpha, excess in zip(conversion.ALPHAS, losses, strict=True)
  ]


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


def assert_documented(known, folder, write):
  """Documented rows give the documented report, and pictures of the same names."""
  folder.mkdir(parents=True, exist_ok=True)
  shutil.copy(known / 'rows.json', folder)
  write()
  assert {file.name for file in folder.iterdir()} == {f.name for f in known.iterdir()}
  for file in folder.iterdir():
    written = file.read_bytes()
    if file.suffix == '.png':
      assert written[:4] == b'\x89PNG'
    else:
      assert written == (known / file.name).read_bytes()


def test_documented_studies(tmp_path):
  """The first has several seeds; the second lacks methods, and compares both."""
  for study in ('tiny', 'mini'):
    known, folder = DOCS / 'conversion_study' / study, tmp_path / 'local/conversion'
    write = functools.partial(conversion.write, str(tmp_path), study)
    assert_documented(known, folder / study, write)


def test_documented_miniature(tmp_path):
  assert_documented(DOCS / 'uptrain', tmp_path, lambda: miniature.write(str(tmp_path)))
