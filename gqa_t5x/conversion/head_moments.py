"""Second moments of heads, from the kernels and the second moments of their inputs.

With C = E[x^T x] of a module's inputs (input_statistics.py), keys have E[k_i^T k_j] =
K_i^T C K_j, and queries and values likewise; of outputs only the kernel counts:
O_i O_i^T.

Letters: D width, J source key/value heads of a selection, R query heads that read one
source key/value head (1 in a multi-head checkpoint), H head size. Results are float64.
"""

import numpy as np

from gqa_t5x.conversion.input_statistics import InputStatistics
from gqa_t5x.conversion.kernels import Kernels, heads_of


def key_moments(
  kernels: Kernels, inputs: InputStatistics, head_dim: int
) -> tuple[np.ndarray, np.ndarray]:
  """Second moments of the keys, and of the queries that meet them.

  Returns:
    S [J, H, J, H] = E[k_i^T k_j] and M [J, H, H] = sum over a head's queries of
    E[q^T q].
  """
  query_JRDH = heads_of(kernels, 'query', head_dim)
  moved_JRDH = _apply(inputs.query, query_JRDH)
  M_JHH = (np.swapaxes(query_JRDH, 2, 3) @ moved_JRDH).sum(axis=1)
  return _cross(heads_of(kernels, 'key', head_dim), inputs.key), M_JHH


def value_moments(
  kernels: Kernels, inputs: InputStatistics, head_dim: int
) -> tuple[np.ndarray, np.ndarray]:
  """Second moments of the values, and the weight that their outputs give them.

  Returns:
    S [J, H, J, H] = E[v_i^T v_j] and M [J, H, H] = sum over a head's outputs of O O^T.
  """
  out_JRHD = heads_of(kernels, 'out', head_dim)
  M_JHH = (out_JRHD @ np.swapaxes(out_JRHD, 2, 3)).sum(axis=1)
  return _cross(heads_of(kernels, 'value', head_dim), inputs.value), M_JHH


def _apply(C: np.ndarray, kernel_DH: np.ndarray) -> np.ndarray:
  """C times [..., D, H]; a diagonal C is given as [D]."""
  C = np.asarray(C, np.float64)
  return C[:, None] * kernel_DH if C.ndim == 1 else C @ kernel_DH


def _cross(kernel_JDH: np.ndarray, C: np.ndarray) -> np.ndarray:
  """[J, H, J, H]: kernel_i^T C kernel_j for every pair of heads."""
  J, D, H = kernel_JDH.shape
  flat = kernel_JDH.transpose(1, 0, 2).reshape(D, J * H)
  return (flat.T @ _apply(C, flat)).reshape(J, H, J, H)
