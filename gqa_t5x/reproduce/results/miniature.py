"""Validation loss and decoding time of the miniature's models, as rows."""

import dataclasses
from collections.abc import Mapping

import tqdm

from gqa_t5x import files
from gqa_t5x.analysis.benchmarks import decode_benchmark, timing
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
    loss, accuracy = validation.loss(params, architecture, batches)
    vocab_sizes[model.num_kv_heads] = architecture.vocab_size
    found.append(
      {
        **shared,
        'method': model.method,
        'num_kv_heads': model.num_kv_heads,
        'uptrain_steps': plan.step(model.alpha) - plan.pretrain_steps,
        'validation_loss': loss,
        'validation_accuracy': accuracy,
        'parameters': architecture.num_parameters(),
        'cache_bytes_per_token': architecture.cache_bytes_per_token(
          'self_attention', itemsize=4
        ),
      }
    )
  files.write_json(plan.rows, found + decode_rows(vocab_sizes))


@dataclasses.dataclass(frozen=True)
class _Decoding(decode_benchmark.Setting):
  """Decoding of a model with a vocabulary of its own size."""

  vocab_size: int = 0

  @property
  def config(self) -> network.T5Config:
    heads, V = self.num_kv_heads, self.vocab_size
    return network.config(self.size, num_kv_heads=heads, vocab_size=V)


def decode_rows(vocab_sizes: Mapping[int, int]) -> list[Row]:
  """Times one decode step for each number of K/V heads, with random parameters.

  Args:
    vocab_sizes: num_kv_heads -> V.

  Returns:
    One row a model, with `ms_per_step` for the whole batch.
  """
  # Long inputs and a large batch, so that the cache is what a step reads.
  settings = [
    _Decoding('tiny', K, 32, 512, DECODE_STEPS[1], 'float32', num_beams=1, vocab_size=V)
    for K, V in vocab_sizes.items()
  ]
  runs = [decode_benchmark.Runner(setting).decode for setting in settings]
  names = ('size', 'num_kv_heads', 'batch_size', 'input_length', 'output_length')
  return [
    {
      **rows.measured('decode', COMMAND),
      **{name: getattr(setting, name) for name in names},
      'ms_per_step': 1e3 * seconds,
    }
    for setting, seconds in zip(
      settings, timing.slopes(runs, DECODE_STEPS, REPEATS), strict=True
    )
  ]
