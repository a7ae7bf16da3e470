"""One shared key (or value) head for a group of heads; queries and outputs absorb it.

MHA does not change under K_i -> K_i R_i, Q_i -> Q_i R_i^-T, nor under V_i -> V_i S_i,
O_i -> S_i^-1 O_i, for any invertible R_i and S_i: the basis of each head is arbitrary.
So a shared head is sought together with what the queries (or outputs) absorb. With k_i
the key of head i of a group, and kcat = [k_1 ... k_G], a `Sharing` replaces

  q_i k_i^T  by  (q_i A_i) (kcat F)^T    for keys,
  v_i O_i    by  (vcat F) (A_i^T O_i)    for values,

where F is [G*H, R] and A_i [H, R]. With R = H, queries and outputs absorb A_i; in the
latent form (DeepSeek-V2, arXiv 2405.04434), of any other R, it is a kernel of its own.

and its error is, with S = E[kcat^T kcat] and M_i = E[q_i^T q_i] (values: O_i O_i^T),

  residual = sum_i E |q_i k_i^T - q_i A_i (kcat F)^T|^2
           = sum_i tr M_i (E_i - F A_i^T)^T S (E_i - F A_i^T),  E_i selecting head i.

`svd`, `refit` and `procrustes` solve for the sharing of one group, in float64, from

  S_GHGH   [G, H, G, H], second moments of its keys (values), concatenated,
  M_GHH    [G, H, H], second moments of the queries (outputs) of each head,

and `share_heads` applies one of them to the kernels of a module. With C = E[x^T x] of a
module's inputs (input_statistics.py), keys have E[k_i^T k_j] = K_i^T C K_j, and queries
and values likewise; of outputs only the kernel counts: O_i O_i^T.

Letters: G heads of a group, J of any selection of heads, Q query heads that read one of
them, N all query heads, D width, H head size, R size of the shared head.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from gqa_t5x.conversion.input_statistics import InputStatistics
from gqa_t5x.conversion.kernels import (
  ALL_KERNELS,
  LATENT_KERNELS,
  AttentionModule,
  Kernels,
  group_kernels,
  heads_of,
)

# Directions with less than this share of the largest variance count as absent.
_NEGLIGIBLE = 1e-12
_PROCRUSTES_SWEEPS = 50
_PROCRUSTES_TOLERANCE = 1e-10


@dataclasses.dataclass(frozen=True)
class Sharing:
  """How a group of heads comes to share one.

  Attributes:
    merge_GHR: F by head: the shared kernel is sum_i K_i merge[i].
    absorb_GHR: A: queries become Q_i absorb[i], outputs absorb[i]^T O_i.
  """

  merge_GHR: np.ndarray
  absorb_GHR: np.ndarray


# (S_GHGH, M_GHH) -> the sharing of one group.
Solver = Callable[[np.ndarray, np.ndarray], Sharing]


def key_moments(
  kernels: Kernels, inputs: InputStatistics, head_dim: int
) -> tuple[np.ndarray, np.ndarray]:
  """Second moments of the keys, and of the queries that meet them.

  Returns:
    S [J, H, J, H] = E[k_i^T k_j] and M [J, H, H] = sum over a head's queries of
    E[q^T q].
  """
  query_JQDH = heads_of(kernels, 'query', head_dim)
  moved_JQDH = _apply(inputs.query, query_JQDH)
  M_JHH = (np.swapaxes(query_JQDH, 2, 3) @ moved_JQDH).sum(axis=1)
  return _cross(heads_of(kernels, 'key', head_dim), inputs.key), M_JHH


def value_moments(
  kernels: Kernels, inputs: InputStatistics, head_dim: int
) -> tuple[np.ndarray, np.ndarray]:
  """Second moments of the values, and the weight that their outputs give them.

  Returns:
    S [J, H, J, H] = E[v_i^T v_j] and M [J, H, H] = sum over a head's outputs of O O^T.
  """
  out_JQHD = heads_of(kernels, 'out', head_dim)
  M_JHH = (out_JQHD @ np.swapaxes(out_JQHD, 2, 3)).sum(axis=1)
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


def _spectrum(S_GHGH: np.ndarray, M_GHH: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Solves the eigenproblem behind `svd`.

  Returns:
    Eigenvalues [G*H], falling, and eigenvectors [G*H, G*H] (columns) of W S W with
    W = blockdiag(M_i^1/2). The eigenvalues after the R-th are what sharing loses.
  """
  G, H, _ = M_GHH.shape
  values, vectors = np.linalg.eigh(weigh(S_GHGH, M_GHH).reshape(G * H, G * H))
  return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def weigh(S_GHGH: np.ndarray, M_GHH: np.ndarray) -> np.ndarray:
  """W S W with W = blockdiag(M_i^1/2), [G, H, G, H]: S as the residual sees it."""
  root_GHH, (G, H, _) = _sqrt(M_GHH), M_GHH.shape

  def times_root(matrix):
    return (root_GHH @ matrix.reshape(G, H, G * H)).reshape(G * H, G * H)

  both = times_root(times_root(S_GHGH).T)
  return ((both + both.T) / 2).reshape(G, H, G, H)


def svd(S_GHGH: np.ndarray, M_GHH: np.ndarray, rank: int | None = None) -> Sharing:
  """The sharing with the least residual there is: a weighted low-rank approximation.

  With a rank R, at most G*H, the shared head has R numbers instead of H: the latent
  form, where one head of all may be as large as several.

  A basis of the shared head is free. Here, keys (values) and what meets them get the
  square root of each direction's strength: of all bases, the product then changes
  least when all kernels change by a small part of their norm, as a step of training
  changes them.

  Returns:
    The sharing; its residual is the sum of the eigenvalues after the R-th.
  """
  G, H, _ = M_GHH.shape
  R = rank or H
  values, vectors = _spectrum(S_GHGH, M_GHH)
  kept_R = values[:R] > _NEGLIGIBLE * max(values[0], np.finfo(float).tiny)
  strength_R = np.where(kept_R, np.sqrt(values[:R]), 1.0)
  scale_R = np.where(kept_R, strength_R**-0.5, 0.0)
  merge_GHR = _sqrt(M_GHH) @ (vectors[:, :R].reshape(G, H, R) * scale_R)
  absorb_GHR = np.tensordot(S_GHGH, merge_GHR, ([2, 3], [0, 1])) / strength_R
  return Sharing(merge_GHR, absorb_GHR)


def refit(S_GHGH: np.ndarray, M_GHH: np.ndarray) -> Sharing:
  """The mean of the heads, and the best that queries (outputs) can absorb for it.

  Returns:
    F_i = I / G, A_i = E_i^T S F (F^T S F)^-1: the least-squares fit of k_i to the
    shared key.
  """
  G, H, _ = M_GHH.shape
  merge_GHH = np.broadcast_to(np.eye(H) / G, (G, H, H))
  cross_GHH = np.tensordot(S_GHGH, merge_GHH, 2)
  shared_HH = np.tensordot(merge_GHH, cross_GHH, ((0, 1), (0, 1)))
  inverse_HH = np.linalg.pinv(shared_HH, rcond=_NEGLIGIBLE, hermitian=True)
  return Sharing(merge_GHH, cross_GHH @ inverse_HH)


def procrustes(S_GHGH: np.ndarray, M_GHH: np.ndarray) -> Sharing:
  """Rotates the heads of a group towards each other, then takes their mean.

  Generalised orthogonal Procrustes: rotations R_i that maximise
  sum_{i, j} tr(R_i^T S_ij R_j), one head after the other until nothing moves. M_GHH
  is not used.

  Returns:
    merge R_i / G, absorb R_i.

  Source: Align Attention Heads Before Merging Them (arXiv 2412.20677).
  """
  del M_GHH
  G = len(S_GHGH)
  turn_GHH = np.stack([_nearest_rotation(S_GHGH[i, :, 0]) for i in range(G)])
  agreement = -np.inf
  for _ in range(_PROCRUSTES_SWEEPS):
    for i in range(G):
      others_HH = np.tensordot(S_GHGH[i], turn_GHH, 2)
      turn_GHH[i] = _nearest_rotation(others_HH - S_GHGH[i, :, i] @ turn_GHH[i])
    before = agreement
    agreement = np.sum(turn_GHH * np.tensordot(S_GHGH, turn_GHH, 2))
    if agreement <= before * (1 + _PROCRUSTES_TOLERANCE):
      break
  return Sharing(turn_GHH / G, turn_GHH)


def share_heads(
  solve: Callable[..., Sharing],
  rms: str,
  kernels: Kernels,
  module: AttentionModule,
  inputs: InputStatistics,
) -> dict[str, np.ndarray]:
  """Merges the heads of a module; queries and outputs absorb what differs.

  In the latent form `key_up` and `value_up` do that, and queries and outputs stay. The
  shared kernels keep the RMS of the old ones, and the RMS of the others follows. That
  is a scale to train at: Adafactor's steps are in proportion to a kernel's RMS, as long
  as it is above 0.001.

  Args:
    solve: `svd`, `refit` or `procrustes`: finds the sharing of a group; `svd` for a
      module of the latent form, with its rank.
    rms: what becomes of the RMS of the shared kernels, which Adafactor's steps scale
      with: "as is"; "restored" to that of the old kernels; or restored and "absorbed",
      so that the function does not change.
    kernels, module, inputs: as of `methods.convert_module`.

  Returns:
    All four kernels, in their dtypes; of the latent form key, value, key_up, value_up.
  """
  H = module.head_dim
  names = ALL_KERNELS
  if module.is_latent:
    solve = functools.partial(solve, rank=module.kv_head_dim)
    names = ('key', 'value', *LATENT_KERNELS)
  new: dict[str, list[np.ndarray]] = {name: [] for name in names}
  for index in range(module.num_kv_heads):
    group = group_kernels(kernels, module, index)
    for side, moments in _MOMENTS.items():
      sharing = solve(*moments(group, inputs, H))
      shared_DR, absorb_GHR = _merge(sharing, rms, heads_of(group, side, H))
      new[side].append(shared_DR)
      if module.is_latent:
        new[f'{side}_up'].append(_map_up(absorb_GHR, group))
      else:
        name, absorbed = _absorb(side, absorb_GHR, group, H)
        new[name].append(absorbed)
  return {
    name: np.concatenate(parts, axis=int(name != 'out')).astype(
      kernels.get(name, kernels['key']).dtype
    )
    for name, parts in new.items()
  }


_MOMENTS = {'key': key_moments, 'value': value_moments}


def _absorb(
  side: str, absorb_GHR: np.ndarray, group: Kernels, head_dim: int
) -> tuple[str, np.ndarray]:
  """Returns "query" or "out", which meets keys or values, and its new kernel."""
  if side == 'key':
    query_GQDR = heads_of(group, 'query', head_dim) @ absorb_GHR[:, None]
    D = query_GQDR.shape[2]
    return 'query', query_GQDR.transpose(2, 0, 1, 3).reshape(D, -1)
  out_GQHD = heads_of(group, 'out', head_dim)
  out_GQRD = np.swapaxes(absorb_GHR, 1, 2)[:, None] @ out_GQHD
  return 'out', out_GQRD.reshape(-1, out_GQRD.shape[-1])


def _map_up(absorb_GHR: np.ndarray, group: Kernels) -> np.ndarray:
  """`key_up` or `value_up` of a group, [R, G*Q*H]: A_i^T for each query of head i."""
  G, H, R = absorb_GHR.shape
  queries = group['query'].shape[1] // (G * H)
  return np.repeat(absorb_GHR, queries, axis=0).transpose(2, 0, 1).reshape(R, -1)


def _merge(
  sharing: Sharing, rms: str, heads_GDH: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The shared kernel [D, R] of a group, and what its heads absorb, [G, H, R]."""
  shared_DR = np.einsum('gdh,ghr->dr', heads_GDH, sharing.merge_GHR, optimize=True)
  absorb_GHR = sharing.absorb_GHR
  size = np.sqrt(np.mean(shared_DR**2))
  if rms == 'as is' or not size:
    return shared_DR, absorb_GHR
  ratio = np.sqrt(np.mean(heads_GDH**2)) / size
  return shared_DR * ratio, absorb_GHR / (ratio if rms == 'absorbed' else 1.0)


def spectra(
  kernels: Kernels, module: AttentionModule, inputs: InputStatistics
) -> dict[str, np.ndarray]:
  """The eigenvalues behind `svd`, from which the loss of any head size follows.

  Returns:
    "key" and "value" -> [K, G*H], falling. With H of them kept, the others' sum is the
    residual, and its share of the whole what is lost.
  """
  H = module.head_dim
  groups = [group_kernels(kernels, module, i) for i in range(module.num_kv_heads)]
  return {
    name: np.stack([_spectrum(*moments(group, inputs, H))[0] for group in groups])
    for name, moments in _MOMENTS.items()
  }


def _sqrt(M_GHH: np.ndarray) -> np.ndarray:
  """Square roots of symmetric positive semi-definite matrices."""
  values_GH, vectors_GHH = np.linalg.eigh(M_GHH)
  roots_GH = np.sqrt(np.maximum(values_GH, 0.0))
  return (vectors_GHH * roots_GH[:, None, :]) @ np.swapaxes(vectors_GHH, 1, 2)


def _nearest_rotation(matrix_HH: np.ndarray) -> np.ndarray:
  """The orthogonal R that maximises tr(R^T matrix)."""
  left, _, right = np.linalg.svd(matrix_HH)
  return left @ right
