"""Spikes and divergence of the loss: on series made by hand, and in a trainer."""

import concurrent.futures
import math
import types

import numpy as np
import pytest
from absl import logging
from t5x import trainer as t5x_trainer

from gqa_t5x.training import loss_watch
from helpers.trainers import make_state, make_trainer

PERIOD = 100  # steps
NAN, INF = math.nan, math.inf


def curve(n: int, noise: float = 0.01) -> list[float]:
  """A loss that falls from 10 towards 2, with the noise of a period's mean."""
  rng = np.random.default_rng(0)
  return [2 + 8 / (1 + i / 5) + noise * e for i, e in enumerate(rng.standard_normal(n))]


def flat(n: int, level: float = 2.0, noise: float = 0.01) -> list[float]:
  return list(level + noise * np.random.default_rng(1).standard_normal(n))


def found(losses) -> list[loss_watch.Event]:
  """The events of a series; steps are indices of the periods."""
  watch = loss_watch.Watch()
  return [event for i, loss in enumerate(losses) for event in watch.add(i, loss)]


def changed(losses, at: int, values) -> list[float]:
  return [*losses[:at], *values, *losses[at + len(values) :]]


# Up to 7 nats, and back again within five periods.
HIGH = [5.0, 7.0, 4.0, 3.0, 2.5]


@pytest.mark.parametrize(
  ('losses', 'expected'),
  [
    ([], []),
    (curve(500, noise=0.05), []),
    (flat(1000, noise=0.1), []),
    # Less than RISE above, however quiet the run.
    (changed([2.0] * 100, 60, [2.09]), []),
    (changed([2.0] * 100, 60, [2.11]), [('spike', 60)]),
    # Less than six times the noise of 0.1.
    (changed(flat(200, noise=0.1), 60, [2.4]), []),
    (changed(flat(200, noise=0.1), 60, [3.2]), [('spike', 60)]),
    # One spike, however long it takes to come back, unless it takes too long.
    (changed(curve(500), 300, HIGH), [('spike', 300)]),
    (changed(flat(300), 100, [4.0] * 19), [('spike', 100)]),
    (changed(flat(300), 100, [4.0] * 20), [('spike', 100), ('divergence', 119)]),
    (
      changed(changed(flat(300), 100, HIGH), 200, HIGH),
      [('spike', 100), ('spike', 200)],
    ),
    # While the loss falls steeply, a rise is seen.
    (changed(curve(100), 15, [8.0]), [('spike', 15)]),
    # The first ten periods are not judged.
    (changed(flat(100), 9, [9.0]), []),
    (changed(flat(100), 10, [9.0]), [('spike', 10)]),
    ([*flat(9), 9.0], []),
    # A climb that stays, at once or slowly.
    ([*flat(100), *flat(100, level=6.0)], [('spike', 100), ('divergence', 119)]),
    ([2.0] * 100 + [2.0 + 0.001 * i for i in range(1000)], [('divergence', 620)]),
    # Not a number: at once, once, and also at the start.
    (changed(flat(100), 50, [NAN]), [('divergence', 50)]),
    ([*flat(100), *[NAN] * 50], [('divergence', 100)]),
    ([INF, NAN, 2.0], [('divergence', 0)]),
    (changed(flat(100), 50, [NAN, 2.0, INF]), [('divergence', 50), ('divergence', 52)]),
  ],
)
def test_find(losses, expected):
  assert [(event.kind, event.step) for event in found(losses)] == expected


@pytest.mark.parametrize(
  ('factor', 'expected'),
  # 4 x 10 positions, 30 of them real, 2.5 nats each.
  [(None, 2.5), (2048 * 114, 2.5 * 2048 * 114)],
)
def test_nats_per_token(factor, expected):
  metrics = {
    'loss': 99.0,
    'cross_ent_loss_per_all_target_tokens': 30 * 2.5 / 40,
    'non_padding_fraction/loss_weights': 30 / 40,
  }
  assert loss_watch.nats_per_token(metrics, factor) == pytest.approx(expected)
  empty = metrics | {'non_padding_fraction/loss_weights': 0.0}
  assert math.isnan(loss_watch.nats_per_token(empty, factor))


# --- In the trainer -----------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
  """Has a trainer train periods of given losses; returns scalars and warnings."""
  scalars, said = [], []
  monkeypatch.setattr(logging, 'warning', lambda text, *args: said.append(text % args))

  def train(losses, factor=None):
    made = make_trainer(make_state(), loss_normalizing_factor=factor)
    manager, series = made.train_metrics_manager, iter(losses)
    monkeypatch.setattr(manager, 'write_scalar', lambda *scalar: scalars.append(scalar))

    def one_period(self, batches, num_steps, start_step):
      loss = next(series) / (factor if isinstance(factor, int) else 1)
      values = {
        'cross_ent_loss_per_all_target_tokens': loss / 2,
        'non_padding_fraction/loss_weights': 0.5,
      }
      done = concurrent.futures.Future()
      done.set_result({k: types.SimpleNamespace(value=v) for k, v in values.items()})
      return done

    monkeypatch.setattr(t5x_trainer.Trainer, 'train', one_period)
    for i in range(len(losses)):
      made.train(iter(()), PERIOD, start_step=1000 + i * PERIOD)
    made.close()
    return scalars, said

  return train


@pytest.mark.parametrize('factor', [None, 233472])
def test_the_trainer_says_and_writes_what_it_sees(trained, factor):
  losses = changed([2.0] * 40, 20, [4.5])
  losses[30] = NAN
  scalars, said = trained(losses, factor)
  assert len(scalars) == 2 * len(losses)
  steps = [1000 + PERIOD * (i + 1) for i in range(len(losses))]
  spikes = [(val, step) for key, val, step in scalars if key == 'stability/spikes']
  assert spikes == [(int(i >= 20), step) for i, step in enumerate(steps)]
  ends = [(val, step) for key, val, step in scalars if key == 'stability/divergences']
  assert ends == [(int(i >= 30), step) for i, step in enumerate(steps)]
  assert said == [
    'spike of the loss at step 3100: 4.500 nats per token; the median was 2.000',
    'divergence of the loss at step 4100: nan nats per token; the median was 2.000',
  ]


def test_a_loss_of_unknown_scale_is_not_watched(trained, monkeypatch):
  monkeypatch.setattr(loss_watch.Watch, 'add', None)
  assert trained([2.0], 'NUM_REAL_TARGET_TOKENS') == ([], [])


def test_a_loss_that_is_nan_from_the_start(trained):
  scalars, said = trained([NAN])
  assert scalars == [('stability/spikes', 0, 1100), ('stability/divergences', 1, 1100)]
  assert said[0].endswith('nan nats per token; the median was not known yet')
