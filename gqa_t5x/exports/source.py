"""The checkpoint that an export reads: tensors, sizes, and what shapes do not show."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from etils import epath

from gqa_t5x.checkpoints import folders, tree
from gqa_t5x.checkpoints.config import ModelConfig
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint of any layout; nothing is read of it but names and shapes.

  Attributes:
    folder: where it is.
    params: path ("decoder/layers_0/mlp/wo/kernel") -> tensor, all parameters.
    architecture: sizes and head counts.
    config: what the shapes do not show.
  """

  folder: epath.Path
  params: Mapping[str, LazyTensor]
  architecture: tree.Architecture
  config: ModelConfig

  def read(self, path: str) -> np.ndarray:
    """Reads one parameter, as float32."""
    return self.params[path].read().astype(np.float32)


def open_source(path: epath.PathLike) -> Source:
  """Opens a checkpoint folder of T5X or Hugging Face, or the latest of a model_dir.

  Raises:
    BadInput: there is none, or a part is missing, damaged, or of another model.
  """
  folder = folders.find_checkpoint(epath.Path(path))
  params = tree.parameters(folders.open_checkpoint(folder))
  architecture = tree.read_architecture({name: t.shape for name, t in params.items()})
  return Source(folder, params, architecture, folders.read_config(folder))
