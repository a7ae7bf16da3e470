"""Validation loss and decoding time of the miniature's models, as rows."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import tqdm

from gqa_t5x import files
from gqa_t5x.analysis.benchmarks import decode_benchmark, timing, workload
from gqa_t5x.checkpoints import folders
from gqa_t5x.model import network
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.studies import MINIATURE
from gqa_t5x.reproduce.results import rows, validation
from gqa_t5x.reproduce.results.rows import Row

COMMAND = 'python -m gqa_t5x.reproduce run uptrain'
EVAL_BATCHES = 40
DECODE_STEPS = (16, 64)
REPEATS = 7


def write(output_dir: str) -> None:
  """Evaluates every model, times decoding, and writes the rows.

  Args:
    output_dir: folder of the checkpoints.
  """
  plan = Planner(MINIATURE, output_dir)
  batches = list(validation.batches(plan, EVAL_BATCHES))
  shared = rows.common(plan, 'uptrain', COMMAND)
  found, vocab_sizes = [], {}
  for model in tqdm.tqdm(
    MINIATURE.models, desc='evaluate', unit='model', mininterval=0
  ):
    params, architecture = folders.read_params(plan.path_of(model))
    loss, accuracy = validation.loss(params, architecture, batches, model.size)
    vocab_sizes[model.num_kv_heads] = architecture.vocab_size
    cache_bytes = architecture.cache_bytes_per_token('self_attention')
    found.append(
      {
        **shared,
        'method': model.method.name,
        'num_kv_heads': model.num_kv_heads,
        'uptrain_steps': plan.step(model.alpha) - plan.pretrain_steps,
        'validation_loss': loss,
        'validation_accuracy': accuracy,
        'parameters': architecture.num_parameters(),
        'cache_bytes_per_token': 2 * cache_bytes,  # In float32.
      }
    )
  files.write_json(plan.rows, found + decode_rows(vocab_sizes))


def decode_rows(vocab_sizes: Mapping[int, int]) -> list[Row]:
  """Times one decode step for each number of K/V heads, with random parameters.

  Args:
    vocab_sizes: num_kv_heads -> V.

  Returns:
    One row a model, with `ms_per_step` for the whole batch.
  """
  # Long inputs and a large batch, so that the cache is what a step reads.
  shape = {'batch_size': 32, 'input_length': 512, 'output_length': DECODE_STEPS[1]}
  measures = []
  for num_kv_heads, vocab_size in vocab_sizes.items():
    cfg = network.config('tiny', num_kv_heads=num_kv_heads, vocab_size=vocab_size)
    inputs_BS = np.random.default_rng(0).integers(
      2, vocab_size, (shape['batch_size'], shape['input_length']), np.int32
    )
    _, measure = decode_benchmark.decoder(
      cfg,
      workload.random_params(cfg, cfg.dtype),
      jnp.asarray(inputs_BS),
      shape['output_length'],
      num_beams=1,
    )
    measures.append(measure)
  seconds = timing.slopes(measures, DECODE_STEPS, REPEATS)
  return [
    {
      **rows.measured('decode', COMMAND),
      'size': 'tiny',
      'num_kv_heads': num_kv_heads,
      **shape,
      'ms_per_step': 1e3 * step,
    }
    for num_kv_heads, step in zip(vocab_sizes, seconds, strict=True)
  ]
