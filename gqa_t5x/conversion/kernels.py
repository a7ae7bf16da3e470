"""One attention module: its head counts, and how its four kernels split by head.

  query [D, N*H]   key [D, S*H]   value [D, S*H]   out [N*H, D]

A module of the latent form, whose key/value heads have R numbers, has two more:

  key [D, K*R]   value [D, K*R]   key_up [R, N*H]   value_up [R, N*H]

Letters: D width, N query heads, S source key/value heads, K new key/value heads,
G = S / K source heads per new head, Q = N / S query heads per source head, H head size,
R size of a new key/value head.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

Kernels = Mapping[str, np.ndarray]
ALL_KERNELS = ('query', 'key', 'value', 'out')
LATENT_KERNELS = ('key_up', 'value_up')


@dataclasses.dataclass(frozen=True)
class AttentionModule:
  """Head counts of the attention module that is converted, and its place in the tree.

  `path` is "decoder/layers_0/self_attention" or the like; K divides S; `seed` is for
  methods that draw random numbers.
  """

  path: str
  source_num_kv_heads: int  # S, before conversion
  num_kv_heads: int  # K, after it
  head_dim: int  # H
  seed: int = 0
  kv_head_dim: int | None = None  # R, after it; None is H

  @property
  def is_latent(self) -> bool:
    """Whether the new key/value heads have another size than the query heads."""
    return self.kv_head_dim not in (None, self.head_dim)


def split_groups(kernel: np.ndarray, module: AttentionModule) -> np.ndarray:
  """A K or V kernel [..., S*H] by group and head: a view [..., K, G, H]."""
  num_groups = module.num_kv_heads
  group_size = module.source_num_kv_heads // num_groups
  shape = (*kernel.shape[:-1], num_groups, group_size, module.head_dim)
  return np.asarray(kernel).reshape(shape)


def join_heads(kernel_DKH: np.ndarray) -> np.ndarray:
  """[..., K, H] -> [..., K*H], the layout of T5X's 2-D kernels."""
  return kernel_DKH.reshape(*kernel_DKH.shape[:-2], -1)


def heads_of(kernels: Kernels, name: str, head_dim: int) -> np.ndarray:
  """A kernel by source key/value head, in float64.

  Returns:
    key, value: [S, D, H]; query: [S, Q, D, H]; out: [S, Q, H, D].
  """
  kernel = np.asarray(kernels[name], np.float64)
  S = kernels['key'].shape[1] // head_dim
  if name == 'out':
    return kernel.reshape(S, -1, head_dim, kernel.shape[1])
  D = kernel.shape[0]
  if name == 'query':
    return kernel.reshape(D, S, -1, head_dim).transpose(1, 2, 0, 3)
  return kernel.reshape(D, S, head_dim).transpose(1, 0, 2)


def permute_heads(kernels: Kernels, order_J: np.ndarray) -> dict[str, np.ndarray]:
  """Reorders the heads of a module, which by itself does not change its function.

  Args:
    kernels: of the whole module; `bias`, its table of the position bias [N, buckets],
      too.
    order_J: new position -> source key/value head; its query heads go along.
  """
  J = len(order_J)

  def columns(kernel):
    return kernel.reshape(len(kernel), J, -1)[:, order_J].reshape(kernel.shape)

  def rows(kernel):
    return kernel.reshape(J, -1)[order_J].reshape(kernel.shape)

  by_row = ('out', 'bias')
  return {n: rows(k) if n in by_row else columns(k) for n, k in kernels.items()}


def group_kernels(kernels: Kernels, module: AttentionModule, group: int) -> Kernels:
  """The kernels (views) of the heads that one new head, 0 ... K-1, stands for."""

  def block(kernel, axis):
    width = kernel.shape[axis] // module.num_kv_heads
    window = slice(group * width, (group + 1) * width)
    return kernel[:, window] if axis else kernel[window]

  return {name: block(k, 0 if name == 'out' else 1) for name, k in kernels.items()}
