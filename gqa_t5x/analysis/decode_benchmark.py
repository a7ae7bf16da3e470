"""Times decoding, and says how near it is to what the memory bus allows."""

import dataclasses
import functools
import platform
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gqa_t5x import beam_search, decoding, network, sampling
from gqa_t5x.analysis import costs, timing

NEVER = -1  # No token ends a row.
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


class BadSetting(ValueError):
  """What cannot be measured; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is decoded.

  Attributes:
    size: a key of network.SIZES.
    num_kv_heads: K of decoder self- and cross-attention.
    batch_size: B, inputs.
    input_length: S, tokens.
    output_length: T, tokens; positions of the self-attention cache.
    dtype: of parameters, activations and cache: a key of DTYPES.
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
    try:
      return network.t5_1_1_config(
        self.size, num_kv_heads=self.num_kv_heads, dtype=DTYPES[self.dtype]
      )
    except ValueError as error:
      raise BadSetting(f'size={self.size}: {error}') from error

  def nbytes(self) -> int:
    """Memory that it needs, in bytes: parameters, keys, values and logits."""
    cfg, rows = self.config, self.batch_size * self.num_beams
    itemsize = jnp.dtype(cfg.dtype).itemsize
    twice = self.system == 'gqa_t5x' and jax.default_backend() == 'cpu'  # decoding.py
    return (
      sum(costs.parameters(cfg).values()) * itemsize
      + twice * costs.step_kernels(cfg) * itemsize
      + costs.cross_kv_bytes(cfg, self.batch_size, self.input_length)
      + costs.self_cache_bytes(cfg, rows, self.output_length)
      + 4 * rows * cfg.vocab_size
    )

  def check(self) -> None:
    """Raises BadSetting for what cannot be, or does not fit into memory."""
    for name in ('batch_size', 'input_length', 'num_beams'):
      if getattr(self, name) < 1:
        raise BadSetting(f'{name}={getattr(self, name)} must be at least 1.')
    if self.output_length < 4:
      raise BadSetting(
        f'output_length={self.output_length} must be at least 4: a step is timed by the'
        ' slope between two lengths.'
      )
    needed, free = self.nbytes(), timing.free_bytes()
    if free is not None and needed > free:
      raise BadSetting(
        f'{self.describe()} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are'
        ' free; choose a smaller batch_size, input_length or size.'
      )

  def describe(self) -> str:
    """Returns what a reader tells settings apart by."""
    return (
      f'{self.size} with {self.num_kv_heads} K/V heads, batch {self.batch_size}, input'
      f' {self.input_length}, output {self.output_length}, {self.dtype}'
    )


def random_params(cfg: network.T5Config, seed: int = 0) -> dict[str, Any]:
  """Returns parameters of a model's shapes in its dtype, made on the device.

  Uniform numbers of the initialisers' size: values play no part in what a step costs.

  Args:
    cfg: the configuration.
    seed: of the numbers.
  """
  tokens = jnp.ones((1, 1), jnp.int32)
  module = network.Transformer(cfg)
  shapes = jax.eval_shape(
    lambda: module.init(
      jax.random.PRNGKey(0), tokens, tokens, tokens, enable_dropout=False
    )['params']
  )
  leaves, treedef = jax.tree.flatten(shapes)

  @functools.partial(jax.jit, static_argnums=1)
  def make(key, shape):
    scale = (3 / shape[0]) ** 0.5
    return jax.random.uniform(key, shape, cfg.dtype, -scale, scale)

  keys = jax.random.split(jax.random.PRNGKey(seed), len(leaves))
  values = [make(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(treedef, values)


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
    self._module = network.Transformer(cfg)
    self._params = random_params(cfg)
    self._inputs = random_inputs(setting)
    self._prepare = jax.jit(decoding.prepare, static_argnums=(0, 3))
    self._cache, self._kept = self.prepare()

  def prepare(self) -> Any:
    """Encodes the inputs and computes cross K and V."""
    return self._prepare(
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(module, num_beams, length, params, kept, cache, inputs, steps):
  def tokens_to_logits(state):
    token_R = state.cur_token[:, 0]
    return decoding.step(module, params, kept, state.cache, inputs, token_R, length)

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
  settings: Sequence[Setting],
  repeats: int,
  command: str,
  on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
  """Measures settings; those that fit into memory together take turns.

  Args:
    settings: what is decoded; `check` them first.
    repeats: times of which the median counts.
    command: what a user types to get these rows.
    on_row: called with each row.

  Returns:
    Rows of kind 'decode_benchmark', in the order of the settings.
  """
  stream = timing.stream_gb_per_s()
  rows = []
  for together in _fitting(settings):
    runners = [_runner(setting) for setting in together]
    T = min(setting.output_length for setting in together)
    counts = max(T // 4, 1), T
    steps = timing.slopes([runner.decode for runner in runners], counts, repeats)
    for runner, seconds in zip(runners, steps, strict=True):
      encode = timing.median_seconds(runner.prepare, min(repeats, 5))
      rows.append(_row(runner.setting, seconds, encode, stream, command))
      on_row(rows[-1])
    del runners
  return rows


def _runner(setting: Setting) -> Any:
  if setting.system == 't5x':
    from gqa_t5x.analysis import t5x_runner

    return t5x_runner.Runner(setting)
  return Runner(setting)


def _fitting(settings: Sequence[Setting]) -> list[list[Setting]]:
  """Cuts a list into neighbours that use at most half of the free memory together."""
  room = (timing.free_bytes() or 0) // 2
  groups: list[list[Setting]] = []
  used = 0
  for setting in settings:
    used += setting.nbytes()
    if not groups or used > room:
      groups.append([])
      used = setting.nbytes()
    groups[-1].append(setting)
  return groups


@functools.cache
def _matmul_rate(rows: int, size: str, dtype: str) -> float:
  dims = network.SIZES[size]
  D, F = dims['emb_dim'], dims['mlp_dim']
  return timing.matmul_gflop_per_s(rows, ((D, F), (F, D)), DTYPES[dtype])


def _row(
  setting: Setting, seconds: float, encode_seconds: float, stream: float, command: str
) -> dict[str, Any]:
  """Returns a row; see docs/performance.md for its keys."""
  cfg = setting.config
  rows = setting.batch_size * setting.num_beams
  step = costs.decode_step(
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
  return {
    'kind': 'decode_benchmark',
    'source': 'measured',
    'command': command,
    **dataclasses.asdict(setting),
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
    'device': timing.device_name(),
    'versions': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'flax': flax.__version__,
    },
  }
