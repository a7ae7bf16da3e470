"""The checkpoint that an export reads: tensors, sizes, and what shapes do not show."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from etils import epath

from gqa_t5x.checkpoints import folders, tree
from gqa_t5x.checkpoints.config import ModelConfig
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.model import network


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

  def network_config(self, dtype: str = 'float32') -> network.T5Config:
    """The network that computes this model, with activations of `dtype`."""
    sizes, config = self.architecture, self.config
    K = sizes.num_kv_heads
    return network.T5Config(
      vocab_size=sizes.vocab_size,
      emb_dim=sizes.emb_dim,
      num_heads=sizes.num_heads,
      num_encoder_layers=sizes.num_layers['encoder'],
      num_decoder_layers=sizes.num_layers['decoder'],
      head_dim=sizes.head_dim,
      mlp_dim=sizes.mlp_dim,
      dtype=np.dtype(dtype),
      mlp_activations=('gelu', 'linear'),
      dropout_rate=0.0,
      encoder_num_kv_heads=K['encoder'],
      self_attention_num_kv_heads=K['self_attention'],
      cross_attention_num_kv_heads=K['cross_attention'],
      relpos_num_buckets=config.relpos_num_buckets,
      relpos_max_distance=config.relpos_max_distance,
      layer_norm_epsilon=config.layer_norm_epsilon,
    )


def open_source(path: epath.PathLike) -> Source:
  """Opens a checkpoint folder of T5X or Hugging Face, or the latest of a model_dir.

  Raises:
    BadInput: there is none, or a part is missing, damaged, or of another model.
  """
  folder = folders.find_checkpoint(epath.Path(path))
  params = tree.parameters(folders.open_checkpoint(folder))
  architecture = tree.read_architecture({name: t.shape for name, t in params.items()})
  return Source(folder, params, architecture, folders.read_config(folder))
