"""What the TPU compiler says of the paper's models: stages that need no TPU."""

import dataclasses
from typing import Any

from gqa_t5x.reproduce.experiments import paper
from gqa_t5x.reproduce.experiments.lab import Lab, num_kv_heads
from gqa_t5x.reproduce.experiments.scales import PAPER
from gqa_t5x.reproduce.runner.stages import Stage

FOLDER = 'compiled'
SLICE, PARTITIONS = 'v4:2x2x2', 8  # GQA, section 3.1: eight TPUv4 chips
LENGTHS = tuple(dict.fromkeys(task[1:] for task in paper.TASKS.values()))
FIGURE6_LENGTHS = (2048, 512)


@dataclasses.dataclass(frozen=True)
class Training:
  """How uptraining is laid out on a slice.

  Attributes:
    slice_name: of tpu_compile.
    partitions: devices a copy of the model.
    microbatches: that a batch is cut into.
  """

  slice_name: str
  partitions: int
  microbatches: int


# From what the paper may have had to the smallest slice of each generation that holds
# GQA-8-XXL.
TRAININGS = (
  Training('v3:8x16', 8, 4),
  Training('v3:4x8', 8, 8),
  Training('v3:4x4', 8, 32),
  Training('v3:2x2', 8, 256),
  Training('v4:2x2x1', 4, 1024),
  Training('v5e:2x4', 8, 256),
  Training('v5p:2x2x1', 4, 128),
  Training('v6e:2x2', 4, 256),
)


def stages(lab: Lab) -> None:
  """Adds the times of table 1 and figure 6, and uptraining on TPU slices.

  Args:
    lab: of either scale; the models are the paper's.
  """
  for model in PAPER.models:
    for lengths in LENGTHS:
      decoding(lab, model.size, num_kv_heads(model), lengths)
  for heads in paper.FIGURE6_HEADS:
    decoding(lab, 'xxl', heads, FIGURE6_LENGTHS)
  for training in TRAININGS:
    uptraining(lab, training)


def decoding(lab: Lab, size: str, heads: int, lengths: tuple[int, int]) -> Any:
  """The row of decoding, with the largest batch that fits, by the paper's rule.

  Args:
    lab: to add the stage to.
    size: of the model.
    heads: K.
    lengths: of inputs and outputs.
  """
  inputs, outputs = lengths
  flags = {
    'topology': SLICE,
    'size': size,
    'num_kv_heads': heads,
    'input_length': inputs,
    'output_length': outputs,
    'model_partitions': PARTITIONS,
    'search': True,
  }
  title = f'compile decoding of {size}, {heads} key/value heads, {inputs} to {outputs}'
  return _add(lab, title, f'{size}_{heads}_{inputs}_{outputs}', flags)


def uptraining(lab: Lab, training: Training) -> Any:
  """The row of a step of uptraining GQA-8-XXL.

  Args:
    lab: to add the stage to.
    training: where, and how it is laid out.
  """
  flags = {
    'topology': training.slice_name,
    'gin_file': 'gin/uptrain_gqa8.gin',
    'gin.MODEL_PARTITIONS': training.partitions,
    'gin.NUM_MICROBATCHES': training.microbatches,
  }
  name = training.slice_name.replace(':', '_')
  return _add(lab, f'compile uptraining on {training.slice_name}', name, flags)


def _add(lab: Lab, title: str, name: str, flags: dict[str, Any]) -> Any:
  result = lab.output_dir / FOLDER / f'{name}.json'
  words = [
    f'--{key}' if value is True else f'--{key}={value}' for key, value in flags.items()
  ]
  command = ('-m', 'gqa_t5x.tpu_compile', *words, f'--json={result}')
  return lab.add(Stage(title, result, command))
