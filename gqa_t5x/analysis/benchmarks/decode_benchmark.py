"""Times decoding, and says how near it is to what the memory bus allows."""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gqa_t5x.analysis.benchmarks import timing, workload
from gqa_t5x.analysis.costs import formulas
from gqa_t5x.analysis.models import DecodeSetting
from gqa_t5x.decoding import beam_search, generate, sampling
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network, quantize

INT8 = 'ctranslate2_int8'  # a system
NO_EOS = -1  # No token ends a row, so that all are as long.
FILLED_SHARE = 0.9  # of the free memory, by --batch_size=fill
COLUMNS = {
  'model': 'model',
  'num_kv_heads': 'K',
  'kv_head_dim': 'R',
  'quantize': 'int8',
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
  """What is decoded.

  `system` is 'gqa_t5x', 't5x' for T5X's network and decoding, or 'ctranslate2' or
  INT8 for CTranslate2 with weights in float32 or int8.
  """

  system: str = 'gqa_t5x'

  def nbytes(self) -> int:
    """Memory that it needs, in bytes: parameters, keys, values and logits.

    The encoder's attention counts with logits in float32 and probabilities.
    """
    cfg, B, S = self.config, self.batch_size, self.input_length
    itemsize = jnp.dtype(cfg.dtype).itemsize
    cache_bytes = self.cost.cache_bytes  # First: it refuses numbers below 1.
    ours = self.system == 'gqa_t5x'
    together = generate.encoded_together(B, S) if ours else B
    # On CPUs, `generate` keeps the kernels of a step transposed as well.
    widest = 4 if quantize.of_weights(cfg.quantize) else itemsize
    twice = ours and jax.default_backend() == 'cpu'
    return (
      formulas.param_bytes(cfg, itemsize)
      + twice * formulas.step_kernels(cfg) * widest
      + cache_bytes
      + 4 * B * self.num_beams * cfg.vocab_size
      + together * cfg.num_heads * S**2 * (4 + itemsize)
    )

  def filled(self, share: float = FILLED_SHARE) -> 'Setting':
    """Returns the setting with the largest batch that fits, a multiple of 8.

    `share` of the free memory may be filled.
    """
    self._check_output_length()
    free = timing.free_bytes()
    if free is None:
      raise BadInput(
        'batch_size=fill: how much memory is free is unknown here; give a number.'
      )
    room = share * free

    def eights(n):
      return dataclasses.replace(self, batch_size=8 * n)

    most = bisect.bisect_right(range(1, 2**40), room, key=lambda n: eights(n).nbytes())
    return eights(max(1, most))

  def check(self) -> None:
    """Raises BadInput for what cannot be, or does not fit into memory."""
    self._check_output_length()
    workload.check_memory(self, f'output {self.output_length}')

  def _check_output_length(self) -> None:
    if self.output_length < 4:
      raise BadInput(
        f'output_length={self.output_length} must be at least 4: a step is timed by the'
        ' slope between two lengths.'
      )


def decoder(
  cfg: network.T5Config, params: Any, inputs_BS: jax.Array, length: int, num_beams: int
) -> tuple[Callable[[], Any], Callable[[int, int], float]]:
  """Returns what is measured of a model with a self-attention cache of some length.

  That is (a function that encodes the inputs and computes cross K and V; a measure of
  `timing.slopes`, of a step of decoding them).
  """
  module = network.Transformer(cfg)
  prepare = functools.partial(_prepare, module, params, inputs_BS, length)
  return prepare, _steps(module, num_beams, length, params, *prepare(), inputs_BS)


def steps_alone(
  cfg: network.T5Config, params: Any, inputs_BS: jax.Array, length: int, num_beams: int
) -> tuple[None, Callable[[int, int], float]]:
  """As `decoder`, but nothing is encoded: keys and values are random numbers.

  The encoder takes most of the time of a run, and none of a step.
  """
  module = network.Transformer(cfg)
  cache, kept = jax.eval_shape(
    functools.partial(_prepare, module, params, inputs_BS, length)
  )
  empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
  kept = workload.random_like(kept)
  return None, _steps(module, num_beams, length, params, empty, kept, inputs_BS)


def _steps(module, num_beams, length, params, cache, kept, inputs_BS):
  """Returns the measure of a step after `prepare`."""
  decode = functools.partial(
    _decode, module, num_beams, length, params, kept, cache, inputs_BS
  )
  return functools.partial(timing.slope, decode)


_prepare = jax.jit(generate.prepare, static_argnums=(0, 3))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(module, num_beams, length, params, kept, cache, inputs, steps):
  def tokens_to_logits(state):
    token_R = state.cur_token[:, 0]
    return generate.step(module, params, kept, state.cache, inputs, token_R, length)

  prompts = jnp.zeros((inputs.shape[0], length), jnp.int32)
  run, more = sampling.greedy, {'max_decode_steps': steps}
  if num_beams > 1:
    more = {'num_decodes': num_beams, 'max_decode_step': steps}
    run = beam_search.beam_search
  return run(prompts, cache, tokens_to_logits, NO_EOS, **more)


def measure(
  chosen: Sequence[Setting],
  repeats: int,
  command: str,
  others: Mapping[str, Callable[..., Any]] | None = None,
) -> Iterator[dict[str, Any]]:
  """Yields rows of kind 'decode_benchmark'; see `benchmark.run`.

  `others` make what is timed of settings of other systems, as `decoder` of ours.
  """
  stream = timing.stream_gb_per_s()
  for setting, step, encode in times(chosen, repeats, others):
    yield _row(setting, step, encode, stream, command)


def times(
  chosen: Sequence[Setting],
  repeats: int,
  others: Mapping[str, Callable[..., Any]] | None = None,
) -> Iterator[tuple[Setting, float, float | None]]:
  """Yields (setting, seconds of a decode step, seconds before the first one).

  The latter is None where what is before it is made up (`steps_alone`).
  """

  def make(setting):
    cfg = setting.config
    # None of them is padding or an end marker.
    inputs_BS = np.random.default_rng(0).integers(
      2, cfg.vocab_size, (setting.batch_size, setting.input_length), np.int32
    )
    return (others or {}).get(setting.system, decoder)(
      cfg,
      quantize.prepared(workload.random_params(cfg, cfg.dtype), cfg.quantize),
      jnp.asarray(inputs_BS),
      setting.output_length,
      setting.num_beams,
    )

  for together, decoders in timing.in_groups(chosen, make):
    T = min(setting.output_length for setting in together)
    counts = max(T // 4, 1), T
    steps = timing.slopes([measure for _, measure in decoders], counts, repeats)
    encodes = [
      prepare and timing.median_seconds(prepare, repeats) for prepare, _ in decoders
    ]
    yield from zip(together, steps, encodes, strict=True)


def _row(
  setting: Setting,
  seconds: float,
  encode_seconds: float | None,
  stream: float,
  command: str,
) -> dict[str, Any]:
  """Returns a row; `python -m gqa_t5x.benchmark decode --help` explains its keys."""
  times = {'ms_per_step': 1e3 * seconds, 'tokens_per_s': setting.batch_size / seconds}
  if encode_seconds is not None:
    total = encode_seconds + setting.output_length * seconds
    times['encode_ms'] = 1e3 * encode_seconds
    times['seconds_per_sample'] = total / setting.batch_size
  common = workload.common_keys('decode_benchmark', command, vars(setting))
  if setting.system == INT8:  # What int8 takes at best is not measured here.
    return common | times | {'stream_gb_per_s': stream}
  rows, step = setting.batch_size * setting.num_beams, setting.cost
  cfg = setting.config
  rate = workload.matmul_rate(cfg.emb_dim, cfg.mlp_dim, rows, setting.dtype)
  floor = max(step.bytes / (1e9 * stream), step.flops / (1e9 * rate))
  return {
    **common,
    **times,
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
