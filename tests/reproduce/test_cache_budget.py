"""Caches whose bytes are spent where they hold most."""

import itertools

import numpy as np
import pytest

from gqa_t5x.reproduce.studies import cache_budget

SIZES = (1, 2, 4)


def test_every_way_finds_the_least_of_all_choices():
  rng = np.random.default_rng(0)
  places = list(itertools.product(range(3), ('key', 'value')))
  choices = {place: dict(zip(SIZES, rng.random(3), strict=True)) for place in places}
  same = {
    'the same everywhere': lambda layer, side: 0,
    'keys and values apart': lambda layer, side: side == 'key',
    'by layer': lambda layer, side: layer,
    'by layer, keys and values apart': lambda layer, side: (layer, side),
  }
  expected = dict.fromkeys(same, np.inf)
  for sizes in itertools.product(SIZES, repeat=len(places)):
    chosen = dict(zip(places, sizes, strict=True))
    if sum(sizes) <= 2 * len(places):
      share = np.mean([choices[place][kept] for place, kept in chosen.items()])
      for way, key in same.items():
        groups = {}
        for place, kept in chosen.items():
          groups.setdefault(key(*place), set()).add(kept)
        if all(len(kept) == 1 for kept in groups.values()):
          expected[way] = min(expected[way], share)
  assert cache_budget.spend(choices, 2) == pytest.approx(expected)
