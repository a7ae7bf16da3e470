"""Validation loss and decoding time of checkpoints, as rows of a JSON file."""

import functools
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from gqa_t5x import files
from gqa_t5x.checkpoints import folders
from gqa_t5x.checkpoints.tree import Architecture
from gqa_t5x.decoding import generate
from gqa_t5x.model import network
from gqa_t5x.reproduce.experiments.gin_files import macro
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.studies import MINIATURE
from gqa_t5x.reproduce.results.rows import Row, environment

COMMAND = 'python -m gqa_t5x.reproduce run uptrain'
DATA = 'gin/local/span_corruption.gin'
EVAL_BATCHES = 40
# Decoding: long inputs and a large batch, so that the cache is what a step reads.
DECODE_BATCH, DECODE_INPUT = 32, 512
DECODE_STEPS = (16, 64)
REPEATS = 7


def write(output_dir: str) -> None:
  """Evaluates every model of the miniature, times decoding, and writes the rows.

  Args:
    output_dir: folder of the checkpoints.
  """
  plan = Planner(MINIATURE, output_dir)
  lengths, batch_size = macro(DATA, 'TASK_FEATURE_LENGTHS'), macro(DATA, 'BATCH_SIZE')
  batches = list(validation_batches(lengths, batch_size, EVAL_BATCHES))
  rows, parameters = [], {}
  for model in tqdm.tqdm(
    MINIATURE.models, desc='evaluate', unit='model', mininterval=0
  ):
    values, architecture = folders.read_params(plan.path_of(model))
    loss, accuracy = validation_loss(values, architecture, batches)
    parameters.setdefault(model.num_kv_heads, (values, architecture))
    rows.append(
      {
        'kind': 'uptrain',
        'source': 'measured',
        'command': COMMAND,
        'size': model.size,
        'method': model.method,
        'num_kv_heads': model.num_kv_heads,
        'pretrain_steps': plan.pretrain_steps,
        'uptrain_steps': plan.step(model.alpha) - plan.pretrain_steps,
        'validation_loss': loss,
        'validation_accuracy': accuracy,
        'parameters': architecture.num_parameters(),
        # In float32.
        'cache_bytes_per_token': 2
        * architecture.cache_bytes_per_token('self_attention'),
        'batch_size': batch_size,
        'input_length': lengths['inputs'],
        'output_length': lengths['targets'],
        **environment(),
      }
    )
  files.write_json(plan.rows, rows + decode_rows(parameters))


def validation_batches(
  lengths: Mapping[str, int], batch_size: int, num_batches: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the packed validation batches that T5X's training evaluation begins with.

  Args:
    lengths: tokens of inputs and targets.
    batch_size: examples a batch.
    num_batches: at most so many.
  """
  import seqio

  import gqa_t5x.data.tasks  # noqa: F401 (registers the task)

  dataset = seqio.get_dataset(
    macro(DATA, 'MIXTURE_OR_TASK_NAME'),
    lengths,
    dataset_split='validation',
    shuffle=False,
    seed=42,
    feature_converter=seqio.EncDecFeatureConverter(pack=True),
  )
  batched = dataset.batch(batch_size, drop_remainder=True).take(num_batches)
  yield from batched.as_numpy_iterator()


@functools.lru_cache
def _module(num_kv_heads: int, vocab_size: int) -> network.Transformer:
  config = network.config('tiny', num_kv_heads=num_kv_heads, vocab_size=vocab_size)
  return network.Transformer(config)


def _module_of(architecture: Architecture) -> network.Transformer:
  return _module(architecture.num_kv_heads['self_attention'], architecture.vocab_size)


@functools.partial(jax.jit, static_argnums=0)
def _sums(module, values, batch):
  """Sums of cross-entropy, correct tokens and tokens over a batch."""
  weights = batch['decoder_loss_weights']
  inputs = {k: v for k, v in batch.items() if k != 'decoder_loss_weights'}
  logits = module.apply({'params': values}, **inputs, enable_dropout=False)
  targets = batch['decoder_target_tokens']
  log_probs = jax.nn.log_softmax(logits)
  losses = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  correct = jnp.argmax(logits, axis=-1) == targets
  return jnp.stack([jnp.sum(x * weights) for x in (losses, correct, 1.0)])


def validation_loss(
  values: dict[str, Any],
  architecture: Architecture,
  batches: list[dict[str, np.ndarray]],
) -> tuple[float, float]:
  """Returns cross-entropy (nats per token) and accuracy, both per target token."""
  module = _module_of(architecture)
  total = sum(np.asarray(_sums(module, values, b), np.float64) for b in batches)
  return float(total[0] / total[2]), float(total[1] / total[2])


def decode_rows(
  parameters: Mapping[int, tuple[dict[str, Any], Architecture]],
) -> list[Row]:
  """Times one decode step for each number of K/V heads.

  By the slope between two numbers of steps, so that set-up costs drop out; the
  models take turns, and the median over the turns counts.

  Args:
    parameters: num_kv_heads -> (parameter tree, sizes).

  Returns:
    One row a model, with `ms_per_step` for the whole batch.
  """
  rng = np.random.default_rng(0)
  runs = {}
  for num_kv_heads, (values, architecture) in parameters.items():
    tokens = rng.integers(3, architecture.vocab_size, (DECODE_BATCH, DECODE_INPUT))
    module = _module_of(architecture)
    cache, kept = jax.jit(generate.prepare, static_argnums=(0, 3))(
      module, values, tokens, max(DECODE_STEPS)
    )
    arguments = (module, values, kept, cache, tokens)
    for steps in DECODE_STEPS:
      jax.block_until_ready(_decode(*arguments, steps))
    runs[num_kv_heads] = arguments
  slopes = {num_kv_heads: [] for num_kv_heads in runs}
  for _ in range(REPEATS):
    for num_kv_heads, arguments in runs.items():
      short, long = (_seconds(arguments, steps) for steps in DECODE_STEPS)
      slopes[num_kv_heads].append((long - short) / (DECODE_STEPS[1] - DECODE_STEPS[0]))
  return [
    {
      'kind': 'decode',
      'source': 'measured',
      'command': COMMAND,
      'size': 'tiny',
      'num_kv_heads': num_kv_heads,
      'batch_size': DECODE_BATCH,
      'input_length': DECODE_INPUT,
      'output_length': DECODE_STEPS[1],
      'ms_per_step': 1e3 * statistics.median(values),
      **environment(),
    }
    for num_kv_heads, values in slopes.items()
  ]


@functools.partial(jax.jit, static_argnums=0)
def _decode(module, values, kept, cache, tokens, steps):
  """Decodes greedily without stopping at the end marker; one program for all steps."""

  def decode_one(_, state):
    token_B, cache = state
    logits_BV, cache = generate.step(
      module, values, kept, cache, tokens, token_B, max(DECODE_STEPS)
    )
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache

  first = jnp.zeros(DECODE_BATCH, jnp.int32)
  return jax.lax.fori_loop(0, steps, decode_one, (first, cache))[0]


def _seconds(arguments: tuple[Any, ...], steps: int) -> float:
  tick = time.perf_counter()
  jax.block_until_ready(_decode(*arguments, steps))
  return time.perf_counter() - tick
