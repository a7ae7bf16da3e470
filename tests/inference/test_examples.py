"""Batches by length, and span corruption."""

import numpy as np
import pytest
from t5.data import preprocessors

from gqa_t5x.inference import examples

EOS, SENTINEL = 1, 999


@pytest.mark.parametrize(
  ('length', 'expected'), [(0, 16), (1, 16), (16, 16), (17, 32), (64, 64), (65, 128)]
)
def test_bucket(length, expected):
  assert examples.bucket(length) == expected


@pytest.mark.parametrize('batch_size', [1, 3, 100])
def test_batches_hold_every_row_once(batch_size):
  rng = np.random.default_rng(0)
  columns = [
    [rng.integers(1, 9, rng.integers(1, most)).tolist() for _ in range(20)]
    for most in (70, 20)
  ]
  seen, shapes = [], []
  for batch in examples.batches(columns, batch_size):
    size = len(batch.arrays[0])
    assert size == min(batch_size, 32) >= len(batch.rows)
    shapes.append(tuple(array.shape for array in batch.arrays))
    for column, array in zip(columns, batch.arrays, strict=True):
      for row, i in zip(array, batch.rows, strict=False):
        assert row[row > 0].tolist() == column[i]
        assert array.shape[1] == examples.bucket(
          max(len(column[j]) for j in batch.rows)
        )
      assert not array[len(batch.rows) :].any()
    seen += batch.rows
  assert sorted(seen) == list(range(20))
  assert shapes == sorted(shapes, reverse=True)


def rebuilt(example):
  """The text of an example: every sentinel replaced by what the target says."""
  spans, name = {}, None
  for i in example.targets[:-1]:
    if i > 900:
      name = i
      spans[name] = []
    else:
      spans[name].append(i)
  return [j for i in example.inputs[:-1] for j in (spans[i] if i > 900 else [i])]


@pytest.mark.parametrize('length', [2, 3, 7, 20, 100, 513])
def test_span_corruption(length):
  """As many tokens and spans as T5's own, whose random mask it is compared with."""
  ids = list(range(2, 2 + length))
  got = examples.span_corruption(ids, SENTINEL, EOS, np.random.default_rng(0))
  # Ids and sentinels do not overlap: a text of more would.
  ids = [i % 800 + 2 for i in ids]
  got = examples.span_corruption(ids, SENTINEL, EOS, np.random.default_rng(0))
  assert got.inputs[-1] == got.targets[-1] == EOS
  assert rebuilt(got) == ids
  sentinels = [i for i in got.inputs if i > 900]
  assert sentinels == [SENTINEL - i for i in range(len(sentinels))]
  assert [i for i in got.targets if i > 900] == sentinels
  assert got.inputs[0] == ids[0]
  mask = preprocessors.random_spans_noise_mask(
    length, 0.15, seeds=[(0, 1), (2, 3)], mean_noise_span_length=3.0
  ).numpy()
  starts = np.sum(mask[1:] & ~mask[:-1])
  assert len(got.targets) - 1 - len(sentinels) == mask.sum()
  assert len(sentinels) == starts


def test_spans_are_drawn_evenly():
  """Two spans of four tokens: lengths (1, 3), (2, 2), (3, 1) a third of the time."""
  rng, counts = np.random.default_rng(0), {1: 0, 2: 0, 3: 0}
  for _ in range(600):
    example = examples.span_corruption(list(range(2, 29)), SENTINEL, EOS, rng, 0.15, 2)
    second = example.targets.index(SENTINEL - 1)
    counts[second - 1] += 1
  assert all(150 < count < 250 for count in counts.values())
