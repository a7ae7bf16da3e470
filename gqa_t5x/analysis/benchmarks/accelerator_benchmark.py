"""What to measure in a few minutes with an accelerator, and what the rows say.

`python -m gqa_t5x.benchmark accelerator --help` is for its users.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from gqa_t5x.analysis.benchmarks import (
  decode_benchmark,
  train_benchmark,
  workload,
)
from gqa_t5x.analysis.costs import formulas
from gqa_t5x.errors import BadInput, first_line
from gqa_t5x.model import sizes

HEADS, LARGEST, BEAMS, INT8 = 'heads', 'largest batch', 'beams', 'int8'
TRAINING, BESIDE_T5X, WITH_ENCODER = 'training', 'beside T5X', 'with encoder'
COLUMNS = {'part': 'part', **decode_benchmark.COLUMNS, 'matmul_fraction': 'of products'}
T5X = 't5x'  # a system
TARGET = 0.7  # of a streaming read
# Of the free memory, for the largest batch: the next where one turns out too much.
SHARES = (decode_benchmark.FILLED_SHARE, 0.75, 0.6)
# Models that are trained, and compared with T5X's network, beside a large one.
SMALLER = {'xxl': ('large', 'base')}


@dataclasses.dataclass(frozen=True)
class Part:
  """One row.

  Attributes:
    name: HEADS, LARGEST, ...; rows of one name differ in heads or system.
    setting: of decode_benchmark or train_benchmark.
    shares: of the free memory, of which the first that works gives the batch; none: the
      batch is the setting's.
  """

  name: str
  setting: Any
  shares: tuple[float, ...] = ()

  def chosen(self) -> Any:
    """Returns the setting, with the largest batch if that is wanted.

    On a CPU, for a trial of the command, that is twice the batch at most.
    """
    if not self.shares:
      return self.setting
    filled = self.setting.filled(self.shares[0])
    if jax.default_backend() == 'cpu':
      most = min(filled.batch_size, 2 * self.setting.batch_size)
      filled = dataclasses.replace(filled, batch_size=most)
    return filled


def parts(
  size: str, batch_size: int, input_length: int, output_length: int
) -> list[Part]:
  """Returns all that is wanted of a model, the most wanted first.

  In bfloat16; on a CPU, which has none, in float32.
  """
  dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  trained, compared = SMALLER.get(size, (size, size))
  lengths = batch_size, input_length, output_length

  def decode(K, **changes):
    setting = decode_benchmark.Setting(size, K, *lengths, dtype, 1)
    return dataclasses.replace(setting, **changes)

  def train(K):
    S, T = min(512, input_length), min(128, input_length)
    rows = max(1, batch_size // 2)
    return train_benchmark.Setting(trained, K, rows, S, T, dtype)

  all_heads = _heads(size)
  few, *others = all_heads[1:2] + all_heads[:1] + all_heads[2:]
  beams = {'batch_size': max(1, batch_size // 8), 'num_beams': 4}
  base = decode(_heads(compared)[0], size=compared)
  return [
    *(Part(HEADS, decode(K)) for K in all_heads),
    *(Part(LARGEST, decode(K), SHARES) for K in all_heads),
    Part(BEAMS, decode(few, **beams)),
    *(Part(INT8, decode(few, quantize=q)) for q in ('weights', 'weights_and_cache')),
    Part(TRAINING, train(_heads(trained)[0])),
    Part(BESIDE_T5X, dataclasses.replace(base, system=T5X)),
    Part(BESIDE_T5X, base),
    # If there is time.
    *(Part(BEAMS, decode(K, **beams)) for K in others),
    *(Part(TRAINING, train(K)) for K in _heads(trained)[1:]),
    Part(WITH_ENCODER, decode(few)),
  ]


def _heads(size: str) -> list[int]:
  """Returns the K that are compared: all heads, an eighth of them, one."""
  N = sizes.SIZES[size]['num_heads']
  return list(dict.fromkeys((N, max(1, N // 8), 1)))


def measure(
  chosen: Sequence[Part],
  repeats: int,
  command: str,
  deadline: float,
  t5x: Callable[[], Any],
  failed: list[Part],
) -> Iterator[dict[str, Any]]:
  """Yields rows of decode and train benchmarks, with a `part` and its `seconds`.

  Each is printed, and so is why a part has none: it is bad input for this machine, is
  not expected to end by the deadline, or fails, which costs the others nothing.

  Args:
    chosen: of `parts`.
    repeats, command: as of `decode_benchmark.measure`.
    deadline: of `time.monotonic`.
    t5x: called for T5X's part, returns the `others` of `decode_benchmark.measure`; may
      raise BadInput.
    failed: parts that fail are added to it.
  """
  first = chosen[0].setting
  widths = first.config.emb_dim, first.config.mlp_dim
  # Kept: it is no part of what the first row takes.
  workload.matmul_rate(*widths, first.batch_size, first.dtype)
  todo, slowest = collections.deque(chosen), None
  while todo:
    part, begun = todo.popleft(), time.monotonic()
    try:
      setting = part.chosen()
      left = deadline - begun
      needed = _expected(part, setting, repeats, slowest) if slowest else 0
      if needed > left:
        _say(part, f'left out: it takes about {needed:.0f} s, and {left:.0f} are left')
        continue
      row = _row(part, setting, repeats, command, t5x)
    except BadInput as error:
      _say(part, f'left out: {error}')
      continue
    except Exception as error:  # What goes wrong in one part may be right in others.
      _say(part, f'failed: {first_line(error)}')
      if 'RESOURCE_EXHAUSTED' in str(error) and len(part.shares) > 1:
        todo.appendleft(dataclasses.replace(part, shares=part.shares[1:]))
      else:
        failed.append(part)
      continue
    row |= {'part': part.name, 'seconds': time.monotonic() - begun}
    if slowest is None or row['seconds'] > slowest[0]:
      slowest = row['seconds'], part, setting, row
    _say(part, _text(row))
    yield row


def _row(part, setting, repeats, command, t5x) -> dict[str, Any]:
  setting.check()
  if part.name == TRAINING:
    (row,) = train_benchmark.measure([setting], repeats, command)
    return row
  others = t5x() if setting.system == T5X else {}
  if part.name != WITH_ENCODER:
    others = others | {'gqa_t5x': decode_benchmark.steps_alone}
  (row,) = decode_benchmark.measure([setting], repeats, command, others)
  return row


def _expected(part, setting, repeats, slowest) -> float:
  """Returns the seconds that a part may take, from the slowest before it.

  That is as long, compilation included, and twice what its calls take more at the rates
  of the machine.
  """
  seconds, other_part, other, row = slowest
  more = _least(part, setting, repeats, row) - _least(other_part, other, repeats, row)
  return seconds + 2 * max(0, more)


def _least(part, setting, repeats, row) -> float:
  """Returns the seconds that the calls of a part take at the least."""
  flops_per_s = 1e9 * row['matmul_gflop_per_s']
  if part.name == TRAINING:
    return (repeats + 1) * setting.cost.flops / flops_per_s
  T, step, encoding = setting.output_length, setting.cost, 0
  seconds = step.flops / flops_per_s
  if 'stream_gb_per_s' in row:
    seconds = max(seconds, step.bytes / (1e9 * row['stream_gb_per_s']))
  if part.name == WITH_ENCODER:
    encoding = formulas.prepare_flops(
      setting.config, setting.batch_size, setting.input_length
    )
  return (repeats + 1) * ((T // 4 + T) * seconds + encoding / flops_per_s)


def _say(part: Part, text: str) -> None:
  setting = part.setting
  system = ", T5X's network" if setting.system == T5X else ''
  name = f'{part.name}: {setting.size}, {setting.num_kv_heads} K/V heads{system}'
  print(f'{name}: {text}', flush=True)


def _text(row: dict[str, Any]) -> str:
  said = f'batch {row["batch_size"]}, {row["ms_per_step"]:.3g} ms a step'
  if 'roofline_fraction' in row:
    said += f', {row["roofline_fraction"]:.0%} of a streaming read'
  return f'{said} ({row["seconds"]:.0f} s)'


def verdicts(rows: Sequence[dict[str, Any]], size: str) -> list[str]:
  """Returns a line for each target: met, missed or not known, and by which rows."""
  return [_near_the_roofline(rows, size), _fewer_heads_are_no_slower(rows)]


def _near_the_roofline(rows, size) -> str:
  found = {
    row['num_kv_heads']: row['roofline_fraction']
    for row in rows
    if row['part'] == HEADS
  }
  missing = [K for K in _heads(size) if K not in found]
  said = [f'{K} heads {share:.1%}' for K, share in found.items()]
  said += [f'{K} heads not measured' for K in missing]
  missed = any(share < TARGET for share in found.values())
  verdict = 'missed' if missed else 'not known' if missing else 'met'
  return f'target, {TARGET:.0%} of a streaming read: {verdict} ({", ".join(said)})'


def _fewer_heads_are_no_slower(rows) -> str:
  """Of rows of one part; the largest batches differ, so that tokens count."""
  slower, pairs = [], 0
  for name in dict.fromkeys(row['part'] for row in rows if row['part'] != INT8):
    ours = [row for row in rows if row['part'] == name and row['system'] != T5X]
    ours.sort(key=lambda row: -row['num_kv_heads'])
    for more, fewer in itertools.pairwise(ours):
      pairs += 1
      if fewer['tokens_per_s'] < more['tokens_per_s']:
        heads = f'{fewer["num_kv_heads"]} heads against {more["num_kv_heads"]}'
        share = fewer['tokens_per_s'] / more['tokens_per_s']
        slower.append(f'{name}, {heads}: {share:.1%} of the tokens a second')
  verdict = 'missed' if slower else 'met' if pairs else 'not known'
  said = '; '.join(slower) or f'{pairs} pairs of rows'
  return f'target, no row where fewer heads are slower: {verdict} ({said})'
