"""Examples for a model: pairs of token ids, T5's span corruption, batches by length.

Letters: B batch, S input length, T target length.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from gqa_t5x.conversion import input_sums
from gqa_t5x.errors import BadInput

SHORTEST = 16  # tokens; lengths are padded to powers of two from here


class Example(NamedTuple):
  """Ids of an input and of its target, each with its end marker."""

  inputs: list[int]
  targets: list[int]


class Batch(NamedTuple):
  """Rows of one padded length.

  Attributes:
    rows: which of all examples they are; the rest of the batch is padding.
    arrays: int32 `[B, length]`, one array each of what was given; 0 is padding.
  """

  rows: list[int]
  arrays: list[np.ndarray]


def bucket(length: int) -> int:
  """Returns the length to which a sequence is padded: a power of two, at least 16."""
  return max(SHORTEST, 1 << (max(length, 1) - 1).bit_length())


def batches(
  columns: Sequence[Sequence[Sequence[int]]], batch_size: int
) -> Iterator[Batch]:
  """Puts sequences that are padded to the same lengths together, longest first.

  What needs most memory comes first. All batches have the same number of rows: a
  compiled program serves all of one bucket.

  Args:
    columns: for each array of a batch, the ids of every example.
    batch_size: B, at most; fewer where there are fewer examples in all.
  """
  if batch_size < 1:
    raise BadInput(f'batch_size={batch_size} must be at least 1')
  count = len(columns[0])
  size = min(batch_size, 1 << max(count - 1, 0).bit_length())
  lengths = [tuple(bucket(len(c[i])) for c in columns) for i in range(count)]
  for shape in sorted(set(lengths), reverse=True):
    same = [i for i in range(count) if lengths[i] == shape]
    for start in range(0, len(same), size):
      rows = same[start : start + size]
      arrays = []
      for column, length in zip(columns, shape, strict=True):
        array = np.zeros((size, length), np.int32)
        for row, i in enumerate(rows):
          array[row, : len(column[i])] = column[i]
        arrays.append(array)
      yield Batch(rows, arrays)


def add_up(
  found: Sequence[Example],
  batch_size: int,
  sums: Callable[..., dict[str, Any]],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Adds up what `sums` returns for inputs and targets; and says of how many."""
  columns, totals = [[e.inputs for e in found], [e.targets for e in found]], {}
  with tqdm(total=len(found), desc='Calibrating', unit='text', disable=None) as bar:
    for batch in batches(columns, batch_size):
      input_sums.add_sums(totals, sums(*batch.arrays))
      bar.update(len(batch.rows))
  tokens = {stack: int(totals[stack]) for stack in ('encoder', 'decoder')}
  return totals, {'num_texts': len(found), 'num_tokens': tokens}


def of_text(
  ids: Sequence[int],
  length: int | None,
  first_sentinel: int,
  eos_id: int,
  rng: np.random.Generator | None,
) -> list[Example]:
  """Cuts a text into pieces of at most so many ids, and corrupts spans of each."""
  length, rng = length or max(len(ids), 1), rng or np.random.default_rng(0)
  pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
  return [
    span_corruption(piece, first_sentinel, eos_id, rng)
    for piece in pieces
    if len(piece) > 1
  ]


def span_corruption(
  ids: Sequence[int],
  first_sentinel: int,
  eos_id: int,
  rng: np.random.Generator,
  noise_density: float = 0.15,
  mean_span: float = 3.0,
) -> Example:
  """Replaces random spans of a text by sentinels; the target says what was there.

  Args:
    ids: of the text, at least 2, without an end marker.
    first_sentinel: the id of `<extra_id_0>`; those after it go down.
    eos_id: ends input and target.
    rng: draws the spans.
    noise_density: the share of ids that is replaced.
    mean_span: ids a span, on average.

  Source: T5 (Raffel et al. 2020, section 3.1.4): as many spans as the density asks
  for, their lengths a random partition, and the text begins with what is kept.
  """
  length = len(ids)
  num_noise = min(max(round(length * noise_density), 1), length - 1)
  num_spans = min(max(round(num_noise / mean_span), 1), num_noise, length - num_noise)
  noise = _partition(num_noise, num_spans, rng)
  kept = _partition(length - num_noise, num_spans, rng)
  inputs, targets, at = [], [], 0
  for i, (keep, drop) in enumerate(zip(kept, noise, strict=True)):
    inputs += [*ids[at : at + keep], first_sentinel - i]
    targets += [first_sentinel - i, *ids[at + keep : at + keep + drop]]
    at += keep + drop
  return Example([*inputs, eos_id], [*targets, eos_id])


def _partition(total: int, parts: int, rng: np.random.Generator) -> list[int]:
  """Cuts a number into positive parts, all ways being equally likely."""
  cuts = np.sort(rng.choice(np.arange(1, total), parts - 1, replace=False))
  return np.diff([0, *cuts, total]).astype(int).tolist()
