"""What a checkpoint loses and gains with fewer key/value heads, on a user's texts."""

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from gqa_t5x.analysis.benchmarks import decode_benchmark
from gqa_t5x.analysis.costs import formulas
from gqa_t5x.analysis.tpu.chips import CHIPS
from gqa_t5x.conversion import methods
from gqa_t5x.errors import BadInput
from gqa_t5x.inference.examples import Example
from gqa_t5x.inference.model import Model
from gqa_t5x.model.network import T5Config
from gqa_t5x.model.quantize import QUANTIZATIONS

UNCONVERTED = '-'
_BFLOAT16 = 2  # bytes


class Choice(NamedTuple):
  """Key/value heads, how they are made, and their size, if it is not the head size."""

  num_kv_heads: int
  method: str
  kv_head_dim: int | None = None


COLUMNS = {
  'num_kv_heads': 'K',
  'kv_head_dim': 'R',
  'method': 'method',
  'quantize': 'int8',
  'loss': 'loss',
  'loss_increase': 'more',
  'accuracy': 'accuracy',
  'equal_tokens': 'equal tokens',
  'cache_bytes_per_input_token': 'B/input token',
  'cache_bytes_per_output_token': 'B/output token',
  'largest_batch': 'batch',
  'chip_ms_per_step': 'ms (chip)',
  'ms_per_step': 'ms (here)',
}


def choices(
  cfg: T5Config, words: Sequence[str], method_names: Sequence[str], latent: bool
) -> list[Choice]:
  """Returns what is compared, first the model as it is.

  Args:
    cfg: of the model.
    words: numbers of heads; 'all' is the model as it is, which is compared anyway.
    method_names: keys of `methods.METHODS`.
    latent: whether one head as large as K together is compared with K heads, by each
      method that can make it.

  Raises:
    BadInput: heads that do not divide, an unknown method, or `latent` where no method
      can make it.
  """
  num_heads, H = cfg.self_kv, cfg.head_dim
  forms = {name: methods.get_method(name).any_size for name in method_names}
  if latent and (cfg.kv_size != H or not any(forms.values())):
    raise BadInput(
      '--latent: the model has the latent form already'
      if cfg.kv_size != H
      else '--latent: none of these methods can make it; add svd to --methods'
    )
  divisors = [k for k in range(1, num_heads + 1) if num_heads % k == 0]
  found = [Choice(num_heads, UNCONVERTED)]
  for word in words:
    if word == 'all':
      continue
    if not word.isdecimal() or int(word) not in divisors:
      known = ', '.join(map(str, divisors))
      raise BadInput(f'num_kv_heads={word}; choose from {known}, all')
    K = int(word)
    if num_heads == K:
      continue
    for name, any_size in forms.items():
      found.append(Choice(K, name))
      if latent and any_size and K > 1:
        found.append(Choice(1, name, K * H))
  return list(dict.fromkeys(found))


def quality(
  model: Model,
  chosen: Sequence[Choice],
  calibration: Sequence[Any],
  evaluation: Sequence[Example],
  batch_size: int,
) -> Iterator[dict[str, Any]]:
  """Yields loss and accuracy of each choice right after conversion, as a row.

  Args:
    calibration: texts or pairs, for methods that use statistics of the model's inputs.
    evaluation: others, of `Model.examples`.
  """
  with tempfile.TemporaryDirectory() as folder:
    statistics = os.path.join(folder, 'statistics.npz')
    for choice in chosen:
      K, method, R = choice
      one, recipe = model, {}
      if method != UNCONVERTED:
        if methods.get_method(method).uses_inputs:
          if not os.path.exists(statistics):
            model.calibrate(calibration, statistics, batch_size)
          recipe = {'statistics': statistics}
        one = model.convert(K, method, kv_head_dim=R, **recipe)
      yield choice._asdict() | one.evaluate(evaluation, batch_size)


def int8_quality(
  model: Model, evaluation: Sequence[Example], batch_size: int, max_length: int
) -> Iterator[dict[str, Any]]:
  """Yields a row of the model as it is, and of each quantization.

  It has loss and accuracy on the examples, and the share of tokens of greedy decodes of
  their inputs that are the model's own at the same place (`equal_tokens`).
  """
  # Without its tokenizer, so that it decodes to ids.
  floats = Model(model.config, model.params, model._model_config, None)
  inputs = [example.inputs for example in evaluation]
  first = None
  for what in (None, *QUANTIZATIONS):
    one = floats.quantize(what) if what else floats
    row = {'quantize': what or UNCONVERTED, **one.evaluate(evaluation, batch_size)}
    decodes = one.generate(
      inputs, max_length=max_length, batch_size=batch_size, progress=False
    )
    first = first or (row, decodes)
    row['loss_increase'] = row['loss'] - first[0]['loss']
    row['equal_tokens'] = _equal_tokens(first[1], decodes)
    yield row


def _equal_tokens(decodes: Sequence[list[int]], others: Sequence[list[int]]) -> float:
  equal = longest = 0
  for one, other in zip(decodes, others, strict=True):
    equal += sum(a == b for a, b in zip(one, other, strict=False))
    longest += max(len(one), len(other))
  return equal / max(longest, 1)


@dataclasses.dataclass(frozen=True)
class _Setting(decode_benchmark.Setting):
  """A setting of the decode benchmark, of a configuration that has no name."""

  cfg: T5Config | None = None

  @property
  def config(self) -> T5Config:
    return self.cfg


def decode_times(
  cfg: T5Config,
  heads: Sequence[tuple[int, int | None]],
  lengths: tuple[int, int],
  batch_size: int,
  repeats: int,
) -> Iterator[float]:
  """Yields milliseconds of a decode step; those that fit in memory take turns.

  Args:
    heads: numbers of key/value heads, and their size if it is not the head size.
    lengths: of inputs and of outputs.
  """
  settings = [
    _Setting(
      size='checkpoint',
      num_kv_heads=K,
      batch_size=batch_size,
      input_length=lengths[0],
      output_length=lengths[1],
      dtype=str(jnp.dtype(cfg.dtype)),
      num_beams=1,
      kv_head_dim=R,
      cfg=with_heads(cfg, K, R),
    )
    for K, R in heads
  ]
  for setting in settings:
    setting.check()
  steps = {'gqa_t5x': decode_benchmark.steps_alone}  # Nothing is asked of the encoder.
  for _, seconds, _ in decode_benchmark.times(settings, repeats, steps):
    yield 1e3 * seconds


def with_heads(cfg: T5Config, K: int, kv_head_dim: int | None) -> T5Config:
  """Returns the configuration with K key/value heads, of a size, in the decoder."""
  heads = {'self_attention_num_kv_heads': K, 'cross_attention_num_kv_heads': K}
  return dataclasses.replace(cfg, **heads, kv_head_dim=kv_head_dim or cfg.kv_head_dim)


def costs(
  cfg: T5Config,
  choice: Choice,
  chip: str | None,
  lengths: tuple[int, int],
  batch_size: int,
) -> dict[str, Any]:
  """Returns what a choice costs by formula, in bfloat16.

  Returns:
    Bytes of the cache a token of the input, and of the output; and on a chip, a key of
    `CHIPS`: the largest batch beside the parameters (the encoder's activations not
    counted), and milliseconds a step at the chip's peaks.
  """
  K, _, R = choice
  cfg = dataclasses.replace(with_heads(cfg, K, R), dtype=jnp.bfloat16)
  per_token = 2 * cfg.num_decoder_layers * K * cfg.kv_size * _BFLOAT16
  row = {
    'cache_bytes_per_input_token': per_token,
    'cache_bytes_per_output_token': per_token,
  }
  if chip is None:
    return row
  step = formulas.decode_step(cfg, batch_size, *lengths, param_itemsize=_BFLOAT16)
  peak = CHIPS[chip]
  room = (peak.usable or peak.memory) - _BFLOAT16 * formulas.num_parameters(cfg)
  seconds = max(step.bytes / peak.bandwidth, step.flops / peak.flops)
  return row | {
    'largest_batch': max(0, int(room // (per_token * sum(lengths)))),
    'chip_ms_per_step': 1e3 * seconds,
  }


def recommendation(rows: Sequence[Mapping[str, Any]], tolerance: float) -> str:
  """Returns one sentence: the smallest cache within `tolerance` nats, or what to do.

  Args:
    rows: the model as it is first.
  """
  whole, *others = rows
  if not others:
    return 'Nothing was compared: give fewer heads.'
  good = [r for r in others if r['loss_increase'] <= tolerance]
  if not good:
    best = min(others, key=lambda r: r['loss_increase'])
    return (
      f'None is within {tolerance} nats: the least, {_name(best)}, loses'
      f' {best["loss_increase"]:.3f}; uptrain it first (docs/conversion.md).'
    )
  best = min(good, key=lambda r: (_cache(r), r['loss_increase']))
  less = _cache(whole) // _cache(best)
  faster = ''
  if best.get('ms_per_step'):
    faster = f', and a step takes {best["ms_per_step"] / whole["ms_per_step"]:.0%}'
  return (
    f'Take {_name(best)}: its loss is {best["loss_increase"]:+.3f} nats before any'
    f' uptraining, its cache 1/{less}{faster}.'
  )


def _name(row: Mapping[str, Any]) -> str:
  R = row['kv_head_dim']
  return f'K = {row["num_kv_heads"]}{f", R = {R}" if R else ""} by {row["method"]}'


def _cache(row: Mapping[str, Any]) -> int:
  return row['cache_bytes_per_input_token']


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the rows as a table of text; what is not there is left out."""
  keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
  lines = [[COLUMNS[key] for key in keys]]
  lines += [[_cell(key, row.get(key)) for key in keys] for row in rows]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join(
    '  '.join(f'{cell:>{w}}' for cell, w in zip(line, widths, strict=True))
    for line in lines
  )


def _cell(key: str, value: Any) -> str:
  if value is None:
    return ''
  if not isinstance(value, float):
    return f'{value:,}' if isinstance(value, int) else str(value)
  return f'{value:.3g}' if key.endswith('ms_per_step') else f'{value:.3f}'
