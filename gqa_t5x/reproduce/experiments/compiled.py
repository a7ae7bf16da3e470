"""What the TPU compiler says of the paper's models: stages that need no TPU."""

from typing import Any

from gqa_t5x.reproduce.experiments import commands, paper
from gqa_t5x.reproduce.experiments.models import Model
from gqa_t5x.reproduce.experiments.scales import PAPER
from gqa_t5x.reproduce.runner.stages import Stage

FOLDER = 'compiled'
SLICE, PARTITIONS = 'v4:2x2x2', 8  # GQA, section 3.1: eight TPUv4 chips
FIGURE6_LENGTHS = (2048, 512)


# Slices that uptrain GQA-8-XXL -> (devices a copy of the model, microbatches of a
# batch). From what the paper may have had to the smallest of each generation.
TRAININGS = {
  'v3:8x16': (8, 4),
  'v3:4x8': (8, 8),
  'v3:4x4': (8, 32),
  'v3:2x2': (8, 256),
  'v4:2x2x1': (4, 1024),
  'v5e:2x4': (8, 256),
  'v5p:2x2x1': (4, 128),
  'v6e:2x2': (4, 256),
}


def stages(output_dir: Any) -> list[Stage]:
  """Lists the times of table 1 and figure 6, and uptraining on TPU slices."""
  decoded = [(model, lengths) for model in PAPER.models for lengths in paper.LENGTHS]
  decoded += [(Model('xxl', K), FIGURE6_LENGTHS) for K in paper.FIGURE6_HEADS]
  return [
    *(decoding(output_dir, *what) for what in decoded),
    *(uptraining(output_dir, slice_name) for slice_name in TRAININGS),
  ]


def decoding(output_dir: Any, model: Model, lengths: tuple[int, int]) -> Stage:
  """The row of decoding, with the largest batch that fits, by the paper's rule.

  Args:
    output_dir: folder of all results.
    model: its size and heads count.
    lengths: tokens of inputs and outputs.
  """
  inputs, outputs = lengths
  heads = f'{model.num_kv_heads} key/value heads'
  name = f'{model.size}_{model.num_kv_heads}'
  if model.kv_head_dim:
    heads, name = f'{heads} of {model.kv_head_dim}', f'{name}x{model.kv_head_dim}'
  return _stage(
    f'decoding of {model.size}, {heads}, {inputs} to {outputs}',
    output_dir / FOLDER / f'{name}_{inputs}_{outputs}.json',
    topology=SLICE,
    size=model.size,
    num_kv_heads=model.num_kv_heads,
    kv_head_dim=model.kv_head_dim,
    input_length=inputs,
    output_length=outputs,
    model_partitions=PARTITIONS,
    search=True,
  )


def uptraining(output_dir: Any, slice_name: str) -> Stage:
  """The row of a step of uptraining GQA-8-XXL, on a key of TRAININGS."""
  partitions, microbatches = TRAININGS[slice_name]
  macros = {
    'gin.MODEL_PARTITIONS': partitions,
    'gin.NUM_MICROBATCHES': microbatches,
  }
  return _stage(
    f'uptraining on {slice_name}',
    output_dir / FOLDER / f'{slice_name.replace(":", "_")}.json',
    topology=slice_name,
    gin_file='gin/uptrain_gqa8.gin',
    **macros,
  )


def _stage(what: str, result: Any, **flags: Any) -> Stage:
  command = commands.module('gqa_t5x.tpu_compile', **flags, json=result)
  return Stage(f'compile {what}', result, command)
