"""One attention module: its head counts, and how its four kernels split by head.

  query [D, N*H]   key [D, S*H]   value [D, S*H]   out [N*H, D]

Letters: D width, N query heads, S source key/value heads, K new key/value heads,
G = S / K source heads per new head, R = N / S query heads per source head, H head size.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

Kernels = Mapping[str, np.ndarray]
ALL_KERNELS = ('query', 'key', 'value', 'out')


@dataclasses.dataclass(frozen=True)
class AttentionModule:
  """Head counts of the attention module that is converted, and its place.

  Attributes:
    path: its place in the tree, e.g. "decoder/layers_0/self_attention".
    num_heads: N, query heads.
    source_num_kv_heads: S, key/value heads before conversion.
    num_kv_heads: K, key/value heads after conversion; divides S.
    head_dim: H.
    seed: for methods that draw random numbers.
  """

  path: str
  num_heads: int
  source_num_kv_heads: int
  num_kv_heads: int
  head_dim: int
  seed: int = 0


def split_groups(kernel: np.ndarray, module: AttentionModule) -> np.ndarray:
  """Splits the columns of a K or V kernel by head, and the heads by group.

  Args:
    kernel: [..., S*H].
    module: gives S, K and H.

  Returns:
    A view [..., K, G, H].
  """
  num_groups = module.num_kv_heads
  group_size = module.source_num_kv_heads // num_groups
  shape = (*kernel.shape[:-1], num_groups, group_size, module.head_dim)
  return np.asarray(kernel).reshape(shape)


def join_heads(kernel_DKH: np.ndarray) -> np.ndarray:
  """[..., K, H] -> [..., K*H], the layout of T5X's 2-D kernels."""
  return kernel_DKH.reshape(*kernel_DKH.shape[:-2], -1)


def heads_of(kernels: Kernels, name: str, head_dim: int) -> np.ndarray:
  """A kernel by source key/value head, in float64.

  Args:
    kernels: query [D, N*H], key [D, S*H], value [D, S*H], out [N*H, D].
    name: which.
    head_dim: H.

  Returns:
    key, value: [S, D, H]; query: [S, R, D, H]; out: [S, R, H, D].
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
    kernels: query [D, N*H], key [D, J*H], value [D, J*H], out [N*H, D].
    order_J: new position -> source key/value head; its query heads go along.

  Returns:
    The kernels in the new order.
  """
  J = len(order_J)

  def columns(kernel):
    return kernel.reshape(len(kernel), J, -1)[:, order_J].reshape(kernel.shape)

  def rows(kernel):
    return kernel.reshape(J, -1)[order_J].reshape(kernel.shape)

  return {n: rows(k) if n == 'out' else columns(k) for n, k in kernels.items()}


def group_kernels(kernels: Kernels, module: AttentionModule, group: int) -> Kernels:
  """The kernels of the heads that one new head stands for.

  Args:
    kernels: of the whole module.
    module: gives K.
    group: 0 ... K-1.

  Returns:
    Views of the same names.
  """

  def block(kernel, axis):
    width = kernel.shape[axis] // module.num_kv_heads
    window = slice(group * width, (group + 1) * width)
    return kernel[:, window] if axis else kernel[window]

  return {name: block(k, 0 if name == 'out' else 1) for name, k in kernels.items()}
