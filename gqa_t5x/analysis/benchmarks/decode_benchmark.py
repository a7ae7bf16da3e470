"""Times decoding, and says how near it is to what the memory bus allows."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gqa_t5x.analysis.benchmarks import random_model, settings, timing
from gqa_t5x.analysis.benchmarks.settings import BadSetting
from gqa_t5x.analysis.costs import formulas
from gqa_t5x.decoding import beam_search, generate, sampling
from gqa_t5x.model import network, sizes

NEVER = -1  # No token ends a row.
FILL = 0.9  # of the free memory, by --batch_size=fill
LISTS = {
  'size': settings.SIZE,
  'num_kv_heads': settings.NUM_KV_HEADS,
  'batch_size': ('8', 'Inputs decoded together; fill: as many as fit, by eights.'),
  'input_length': ('512', 'Tokens of each input.'),
  'output_length': ('64', 'Tokens decoded; positions of the self-attention cache.'),
  'dtype': ('float32', 'Of parameters, activations and cache: float32 or bfloat16.'),
  'num_beams': ('1', 'Beams of each input; 1 is greedy.'),
}
COLUMNS = {
  'model': 'model',
  'num_kv_heads': 'K',
  'batch_size': 'batch',
  'input_length': 'input',
  'num_beams': 'beams',
  'ms_per_step': 'ms/step',
  'gb_per_s': 'GB/s',
  'roofline_fraction': 'of stream',
  'roofline_time_fraction': 'of roofline',
  'seconds_per_sample': 's/sample',
}


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is decoded.

  Attributes:
    size: a key of sizes.SIZES.
    num_kv_heads: K of decoder self- and cross-attention.
    batch_size: B, inputs.
    input_length: S, tokens.
    output_length: T, tokens; positions of the self-attention cache.
    dtype: of parameters, activations and cache: a key of settings.DTYPES.
    num_beams: 1 decodes greedily.
    system: 'gqa_t5x', or 't5x': T5X's own network and decoding.
  """

  size: str
  num_kv_heads: int
  batch_size: int
  input_length: int
  output_length: int
  dtype: str
  num_beams: int
  system: str = 'gqa_t5x'

  @property
  def config(self) -> network.T5Config:
    """The model's configuration; its errors are BadSetting."""
    return settings.config(self.size, self.num_kv_heads, self.dtype)

  def nbytes(self) -> int:
    """Memory that it needs, in bytes: parameters, keys, values and logits.

    The encoder's attention counts with logits in float32 and probabilities.
    """
    cfg, rows = self.config, self.batch_size * self.num_beams
    itemsize = jnp.dtype(cfg.dtype).itemsize
    twice = self.system == 'gqa_t5x' and jax.default_backend() == 'cpu'  # decoding.py
    return (
      sum(formulas.parameters(cfg).values()) * itemsize
      + twice * formulas.step_kernels(cfg) * itemsize
      + formulas.cross_kv_bytes(cfg, self.batch_size, self.input_length)
      + formulas.self_cache_bytes(cfg, rows, self.output_length)
      + 4 * rows * cfg.vocab_size
      + self.encoded_together * cfg.num_heads * self.input_length**2 * (4 + itemsize)
    )

  @property
  def encoded_together(self) -> int:
    """How many inputs are encoded at a time; it divides the batch."""
    if self.system == 't5x':
      return self.batch_size
    return generate.encoded_together(self.batch_size, self.input_length)

  def filled(self) -> 'Setting':
    """Returns the setting with the largest batch that fits, a multiple of 8."""
    room = FILL * (timing.free_bytes() or 0)

    def eights(n):
      return dataclasses.replace(self, batch_size=8 * n)

    most = 1
    while eights(2 * most).nbytes() <= room:
      most *= 2
    for step in (2**i for i in reversed(range(most.bit_length()))):
      if eights(most + step).nbytes() <= room:
        most += step
    return eights(most)

  def check(self) -> None:
    """Raises BadSetting for what cannot be, or does not fit into memory."""
    settings.check_positive(self, 'batch_size', 'input_length', 'num_beams')
    if self.output_length < 4:
      raise BadSetting(
        f'output_length={self.output_length} must be at least 4: a step is timed by the'
        ' slope between two lengths.'
      )
    settings.check_memory(self)

  def describe(self) -> str:
    """Returns what a reader tells settings apart by."""
    return (
      f'{self.size} with {self.num_kv_heads} K/V heads, batch {self.batch_size}, input'
      f' {self.input_length}, output {self.output_length}, {self.dtype}'
    )


def random_inputs(setting: Setting) -> jax.Array:
  """Returns int32 tokens `[B, S]`, none of them padding or an end marker."""
  shape = setting.batch_size, setting.input_length
  tokens = np.random.default_rng(0).integers(2, setting.config.vocab_size, shape)
  return jnp.asarray(tokens, jnp.int32)


class Runner:
  """A model ready to be timed: its inputs are encoded, its cache is empty."""

  def __init__(self, setting: Setting):
    """Makes parameters and encodes random inputs.

    Args:
      setting: what is decoded; `check` it first.
    """
    self.setting = setting
    cfg = setting.config
    self._module = random_model.module(setting)
    self._params = random_model.params(cfg, cfg.dtype)
    self._inputs = random_inputs(setting)
    self._cache, self._kept = self.prepare()

  def prepare(self) -> Any:
    """Encodes the inputs and computes cross K and V."""
    return _prepare(
      self._module, self._params, self._inputs, self.setting.output_length
    )

  def decode(self, steps: int) -> Any:
    """Decodes so many tokens of each input; returns (tokens, scores)."""
    return _decode(
      self._module,
      self.setting.num_beams,
      self.setting.output_length,
      self._params,
      self._kept,
      self._cache,
      self._inputs,
      steps,
    )


_prepare = jax.jit(generate.prepare, static_argnums=(0, 3))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(module, num_beams, length, params, kept, cache, inputs, steps):
  def tokens_to_logits(state):
    token_R = state.cur_token[:, 0]
    return generate.step(module, params, kept, state.cache, inputs, token_R, length)

  prompts = jnp.zeros((inputs.shape[0], length), jnp.int32)
  if num_beams == 1:
    return sampling.greedy(
      prompts, cache, tokens_to_logits, NEVER, max_decode_steps=steps
    )
  return beam_search.beam_search(
    prompts,
    cache,
    tokens_to_logits,
    NEVER,
    num_decodes=num_beams,
    max_decode_step=steps,
  )


def measure(
  chosen: Sequence[Setting], repeats: int, command: str
) -> Iterator[dict[str, Any]]:
  """Yields rows of kind 'decode_benchmark'; the arguments are `benchmark.run`'s."""
  stream = timing.stream_gb_per_s()
  for runners in timing.in_groups(chosen, _runner):
    measured = [runner.setting for runner in runners]
    T = min(setting.output_length for setting in measured)
    counts = max(T // 4, 1), T
    steps = timing.slopes([runner.decode for runner in runners], counts, repeats)
    encodes = [timing.median_seconds(runner.prepare, repeats) for runner in runners]
    for setting, step, encode in zip(measured, steps, encodes, strict=True):
      yield _row(setting, step, encode, stream, command)


def _runner(setting: Setting) -> Any:
  if setting.system == 't5x':
    from gqa_t5x.analysis.benchmarks import t5x_runner

    return t5x_runner.Runner(setting)
  return Runner(setting)


@functools.cache
def _matmul_rate(rows: int, size: str, dtype: str) -> float:
  dims = sizes.SIZES[size]
  D, F = dims['emb_dim'], dims['mlp_dim']
  return timing.matmul_gflop_per_s(rows, ((D, F), (F, D)), settings.DTYPES[dtype])


def _row(
  setting: Setting, seconds: float, encode_seconds: float, stream: float, command: str
) -> dict[str, Any]:
  """Returns a row; `python -m gqa_t5x.benchmark decode --help` explains its keys."""
  cfg = setting.config
  rows = setting.batch_size * setting.num_beams
  step = formulas.decode_step(
    cfg,
    setting.batch_size,
    setting.input_length,
    setting.output_length,
    num_beams=setting.num_beams,
    param_itemsize=jnp.dtype(cfg.dtype).itemsize,
  )
  rate = _matmul_rate(rows, setting.size, setting.dtype)
  floor = max(step.bytes / (1e9 * stream), step.flops / (1e9 * rate))
  total = encode_seconds + setting.output_length * seconds
  return settings.row('decode_benchmark', command, setting) | {
    'ms_per_step': 1e3 * seconds,
    'encode_ms': 1e3 * encode_seconds,
    'seconds_per_sample': total / setting.batch_size,
    'tokens_per_s': setting.batch_size / seconds,
    'param_bytes_per_step': step.param_bytes,
    'cache_bytes_per_step': step.cache_bytes,
    'flops_per_step': step.flops,
    'gb_per_s': 1e-9 * step.bytes / seconds,
    'stream_gb_per_s': stream,
    'roofline_fraction': 1e-9 * step.bytes / seconds / stream,
    'matmul_gflop_per_s': rate,
    'roofline_ms': 1e3 * floor,
    'roofline_time_fraction': floor / seconds,
  }
