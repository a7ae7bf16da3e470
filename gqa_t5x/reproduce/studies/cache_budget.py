"""What the cache would hold if its bytes were spent where they hold most."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

# What may differ -> what has the same size.
WAYS: dict[str, Callable[[int, str], object]] = {
  'the same everywhere': lambda layer, side: None,
  'keys and values apart': lambda layer, side: side,
  'by layer': lambda layer, side: layer,
  'by layer, keys and values apart': lambda layer, side: (layer, side),
}
# (layer, 'key' or 'value') -> numbers a token that are kept -> share dropped
Choices = Mapping[tuple[int, str], Mapping[int, float]]


def spend(choices: Choices, numbers: int) -> dict[str, float]:
  """Returns by way the least mean share that is dropped.

  Args:
    choices: what may be kept of each layer and side; all offer the same numbers.
    numbers: kept a token, on the mean over layers and sides.
  """
  found = {}
  for way, key in WAYS.items():
    together: dict[object, list[tuple[int, str]]] = {}
    for place in choices:
      together.setdefault(key(*place), []).append(place)
    options = [
      {
        kept * len(places): sum(choices[place][kept] for place in places)
        for kept in choices[places[0]]
      }
      for places in together.values()
    ]
    found[way] = _least(options, numbers * len(choices)) / len(choices)
  return found


def _least(options: Sequence[Mapping[int, float]], budget: int) -> float:
  """The least sum of one loss from each mapping (cost -> loss) within a budget."""
  unit = np.gcd.reduce([budget, *(cost for option in options for cost in option)])
  least = np.zeros(budget // unit + 1)
  for option in options:
    new = np.full(len(least), np.inf)
    for cost, loss in option.items():
      if cost <= budget:
        spent = cost // unit
        new[spent:] = np.minimum(new[spent:], least[: len(least) - spent] + loss)
    least = new
  return float(least[-1])
