"""What a model computes beyond what the shapes of its tensors show, kept in a file.

  gqa_t5x_config.json   in the folder of a converted checkpoint, and in the MODEL_DIR of
                        a run that trains it on

T5X does not look at it. A checkpoint without it is a T5 as published.
"""

import dataclasses
import json
from typing import Any

from etils import epath

from gqa_t5x import files
from gqa_t5x.errors import BadInput

NAME = 'gqa_t5x_config.json'
ACTIVATIONS = ('relu', 'gelu', 'silu')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Values that change what a model computes; those of T5 as published by default.

  Attributes:
    relpos_num_buckets, relpos_max_distance: of relative positions (tokens).
    layer_norm_epsilon: added to the mean square.
    decoder_start_token_id: what the decoder reads first.
    eos_token_id: the end marker.
    mlp_activation: of the MLP, a function of `flax.linen`; None: T5's, which is gelu
      (its tanh form) where the MLP is gated, and relu where it is not.
  """

  relpos_num_buckets: int = 32
  relpos_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  decoder_start_token_id: int = 0
  eos_token_id: int = 1
  mlp_activation: str | None = None


def read(folder: epath.Path) -> ModelConfig | None:
  """Reads the file of a checkpoint, or of the run that it is of; None without one.

  Raises:
    BadInput: it is damaged, or of a later version.
  """
  for file in (folder / NAME, folder.parent / NAME):
    if file.exists():
      return _parse(file)
  return None


def write(folder: epath.Path, config: ModelConfig) -> None:
  """Writes the file; of a model as published there is none."""
  if config == ModelConfig():
    (folder / NAME).unlink(missing_ok=True)
  else:
    files.write_json(folder / NAME, dataclasses.asdict(config))


def _parse(file: epath.Path) -> ModelConfig:
  try:
    values: dict[str, Any] = json.loads(file.read_bytes())
    unknown = values.keys() - ModelConfig.__dataclass_fields__.keys()
    wrong = {name for name, x in values.items() if not _is_valid(name, x)}
  except (ValueError, AttributeError) as error:
    raise BadInput(f'{file} is truncated or damaged: {error}') from error
  if unknown or wrong:
    raise BadInput(f'{file} has bad values: {", ".join(sorted(unknown | wrong))}')
  return ModelConfig(**values)


def _is_valid(name: str, value: Any) -> bool:
  if name == 'mlp_activation':
    return value is None or value in ACTIVATIONS
  return type(value) in (int, float)
