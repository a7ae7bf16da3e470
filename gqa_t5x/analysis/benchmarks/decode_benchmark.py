"""Times decoding, and says how near it is to what the memory bus allows."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gqa_t5x.analysis.benchmarks import timing, workload
from gqa_t5x.analysis.costs import formulas
from gqa_t5x.analysis.decode_setting import DecodeSetting
from gqa_t5x.decoding import beam_search, generate, sampling
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network

NO_EOS = -1  # No token ends a row, so that all are as long.
FILLED_SHARE = 0.9  # of the free memory, by --batch_size=fill
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
class Setting(DecodeSetting):
  """What is decoded, and by what.

  Attributes:
    system: 'gqa_t5x', or 't5x': T5X's own network and decoding.
  """

  system: str = 'gqa_t5x'

  def nbytes(self) -> int:
    """Memory that it needs, in bytes: parameters, keys, values and logits.

    The encoder's attention counts with logits in float32 and probabilities.
    """
    cfg, rows = self.config, self.batch_size * self.num_beams
    itemsize = jnp.dtype(cfg.dtype).itemsize
    # On CPUs, `generate` keeps the kernels of a step transposed as well.
    twice = self.system == 'gqa_t5x' and jax.default_backend() == 'cpu'
    return (
      formulas.num_parameters(cfg) * itemsize
      + twice * formulas.step_kernels(cfg) * itemsize
      + self.cost.cache_bytes
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
    room = FILLED_SHARE * (timing.free_bytes() or 0)

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
    """Raises BadInput for what cannot be, or does not fit into memory."""
    if self.output_length < 4:
      raise BadInput(
        f'output_length={self.output_length} must be at least 4: a step is timed by the'
        ' slope between two lengths.'
      )
    workload.check_memory(self)

  def describe(self) -> str:
    """Returns what a reader tells settings apart by."""
    return (
      f'{self.size} with {self.num_kv_heads} K/V heads, batch {self.batch_size}, input'
      f' {self.input_length}, output {self.output_length}, {self.dtype}'
    )


class Decoder:
  """A model ready to be timed: its inputs are encoded, its cache is empty."""

  def __init__(
    self,
    cfg: network.T5Config,
    params: Any,
    inputs_BS: jax.Array,
    length: int,
    num_beams: int,
  ):
    """Encodes the inputs.

    Args:
      cfg: the model.
      params: its parameters.
      inputs_BS: tokens.
      length: positions of the self-attention cache.
      num_beams: 1 decodes greedily.
    """
    self._module = network.Transformer(cfg)
    self._length, self._num_beams = length, num_beams
    self._params, self._inputs = params, inputs_BS
    self._cache, self._kept = self.prepare()

  def prepare(self) -> Any:
    """Encodes the inputs and computes cross K and V."""
    return _prepare(self._module, self._params, self._inputs, self._length)

  def decode(self, steps: int) -> Any:
    """Decodes so many tokens of each input; returns (tokens, scores)."""
    return _decode(
      self._module,
      self._num_beams,
      self._length,
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
      prompts, cache, tokens_to_logits, NO_EOS, max_decode_steps=steps
    )
  return beam_search.beam_search(
    prompts,
    cache,
    tokens_to_logits,
    NO_EOS,
    num_decodes=num_beams,
    max_decode_step=steps,
  )


def measure(
  chosen: Sequence[Setting],
  repeats: int,
  command: str,
  baseline: Callable[..., Any] | None = None,
) -> Iterator[dict[str, Any]]:
  """Yields rows of kind 'decode_benchmark'.

  Args:
    chosen, repeats, command: as in `benchmark.run`.
    baseline: makes what the settings of system 't5x' time, as `Decoder` does ours.
  """
  stream = timing.stream_gb_per_s()

  def make(setting):
    cfg = setting.config
    # None of them is padding or an end marker.
    inputs_BS = np.random.default_rng(0).integers(
      2, cfg.vocab_size, (setting.batch_size, setting.input_length), np.int32
    )
    return (baseline if setting.system == 't5x' else Decoder)(
      cfg,
      workload.random_params(cfg, cfg.dtype),
      jnp.asarray(inputs_BS),
      setting.output_length,
      setting.num_beams,
    )

  for together, decoders in timing.in_groups(chosen, make):
    T = min(setting.output_length for setting in together)
    counts = max(T // 4, 1), T
    steps = timing.slopes([decoder.decode for decoder in decoders], counts, repeats)
    encodes = [timing.median_seconds(one.prepare, repeats) for one in decoders]
    for setting, step, encode in zip(together, steps, encodes, strict=True):
      yield _row(setting, step, encode, stream, command)


def _row(
  setting: Setting, seconds: float, encode_seconds: float, stream: float, command: str
) -> dict[str, Any]:
  """Returns a row; `python -m gqa_t5x.benchmark decode --help` explains its keys."""
  rows, step = setting.batch_size * setting.num_beams, setting.cost
  rate = workload.matmul_rate(setting.size, rows, setting.dtype)
  floor = max(step.bytes / (1e9 * stream), step.flops / (1e9 * rate))
  total = encode_seconds + setting.output_length * seconds
  return workload.common_keys('decode_benchmark', command, setting) | {
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
