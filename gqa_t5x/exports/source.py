"""The checkpoint that an export reads: tensors, sizes, and what shapes do not show."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from etils import epath

from gqa_t5x.checkpoints import folders, tree
from gqa_t5x.checkpoints.config import ModelConfig
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network, sizes


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint of any layout; nothing is read of it but names and shapes.

  Attributes:
    folder: where it, or at least its tokenizer, is; None of a model in memory.
    params: path ("decoder/layers_0/mlp/wo/kernel") -> tensor, all parameters.
    architecture: sizes and head counts.
    config: what the shapes do not show.
    step: of training; 0 of a Hugging Face folder, which has none.
  """

  folder: epath.Path | None
  params: Mapping[str, LazyTensor]
  architecture: tree.Architecture
  config: ModelConfig
  step: int

  @property
  def name(self) -> str:
    """What messages call it."""
    return str(self.folder or 'The model')

  def read(self, path: str) -> np.ndarray:
    """Reads one parameter, as float32."""
    return self.params[path].read().astype(np.float32)

  def network_config(self, dtype: str = 'float32') -> network.T5Config:
    """The network that computes this model, with activations of `dtype`."""
    fields = sizes.from_checkpoint(self.architecture, self.config)
    return network.T5Config(**fields, dtype=np.dtype(dtype))

  def with_all_heads(self) -> 'Source':
    """The same function with as many key/value heads as query heads, of the same size.

    A head is repeated for its queries; of one of the latent form, each gets what it
    reads.
    """
    N, H = self.architecture.num_heads, self.architecture.head_dim
    params = dict(self.params)
    for kind, path in self.architecture.attention_modules():
      K, R = self.architecture.num_kv_heads[kind], self.architecture.kv_size(kind)
      for name in (f'{path}/key', f'{path}/value'):
        kernel = params[f'{name}/kernel']
        if R != H:
          up = params.pop(f'{name}_up/kernel')
          params[f'{name}/kernel'] = _mapped_up(kernel, up, K)
        elif K < N:
          params[f'{name}/kernel'] = _repeated(kernel, K, N // K)
    architecture = dataclasses.replace(
      self.architecture, num_kv_heads=dict.fromkeys(tree.KINDS, N), kv_head_dim=None
    )
    return dataclasses.replace(self, params=params, architecture=architecture)


def _repeated(kernel: LazyTensor, K: int, repeats: int) -> LazyTensor:
  """A kernel `[D, K*H]` with each head that often, side by side, once it is read."""
  D, width = kernel.shape

  def read() -> np.ndarray:
    heads_DKH = kernel.read().reshape(D, K, width // K)
    return np.repeat(heads_DKH, repeats, axis=1).reshape(D, width * repeats)

  return LazyTensor((D, width * repeats), kernel.dtype, read)


def _mapped_up(kernel: LazyTensor, up: LazyTensor, K: int) -> LazyTensor:
  """A kernel `[D, K*R]` times each query head's map of `[R, N*H]`, once it is read."""
  D, width = kernel.shape[0], up.shape[1]

  def read() -> np.ndarray:
    heads_DKR, up_RKX = (
      tensor.read().astype(np.float32).reshape(tensor.shape[0], K, -1)
      for tensor in (kernel, up)
    )
    heads_DKX = np.einsum('DKR,RKX->DKX', heads_DKR, up_RKX, optimize=True)
    return heads_DKX.reshape(D, width).astype(kernel.dtype)

  return LazyTensor((D, width), kernel.dtype, read)


def open_source(path: epath.PathLike) -> Source:
  """Opens a checkpoint folder of T5X or Hugging Face, or the latest of a model_dir.

  Raises:
    BadInput: there is none, or a part is missing, damaged, or of another model.
  """
  folder = folders.find_checkpoint(epath.Path(path))
  tensors = folders.open_checkpoint(folder)
  params = tree.parameters(tensors)
  architecture = tree.read_architecture({name: t.shape for name, t in params.items()})
  if 'state/step' not in tensors:
    raise BadInput(f'{folder} has no tensor state/step: it is not of T5X')
  step = int(tensors['state/step'].read())
  return Source(folder, params, architecture, folders.read_config(folder), step)
