"""The maths of one shared key (or value) head for a group of heads.

MHA does not change under K_i -> K_i R_i, Q_i -> Q_i R_i^-T, nor under V_i -> V_i S_i,
O_i -> S_i^-1 O_i, for any invertible R_i and S_i: the basis of each head is arbitrary.
So a shared head is sought together with what the queries (or outputs) absorb. With k_i
the key of head i of a group, and kcat = [k_1 ... k_G], a `Sharing` replaces

  q_i k_i^T  by  (q_i A_i) (kcat F)^T    for keys,
  v_i O_i    by  (vcat F) (A_i^T O_i)    for values,

and its error is, with S = E[kcat^T kcat] and M_i = E[q_i^T q_i] (values: O_i O_i^T),

  residual = sum_i E |q_i k_i^T - q_i A_i (kcat F)^T|^2
           = sum_i tr M_i (E_i - F A_i^T)^T S (E_i - F A_i^T),  E_i selecting head i.

Everything here is float64. Letters: G heads of a group, H head size.
"""

import dataclasses

import numpy as np

# Directions with less than this share of the largest variance count as absent.
_NEGLIGIBLE = 1e-12
_PROCRUSTES_SWEEPS = 50
_PROCRUSTES_TOLERANCE = 1e-10


@dataclasses.dataclass(frozen=True)
class Sharing:
  """How a group of heads comes to share one.

  Attributes:
    merge_GHH: F by head: the shared kernel is sum_i K_i merge[i].
    absorb_GHH: A: queries become Q_i absorb[i], outputs absorb[i]^T O_i.
  """

  merge_GHH: np.ndarray
  absorb_GHH: np.ndarray


def spectrum(S_GHGH: np.ndarray, M_GHH: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Solves the eigenproblem behind `svd`.

  Args:
    S_GHGH: second moments of the concatenated keys (values) of the group.
    M_GHH: second moments of the queries (outputs) of each head.

  Returns:
    Eigenvalues [G*H], falling, and eigenvectors [G*H, G*H] (columns) of R S R with
    R = blockdiag(M_i^1/2). The eigenvalues after the H-th are what sharing loses.
  """
  G, H, _ = M_GHH.shape
  values, vectors = np.linalg.eigh(weigh(S_GHGH, M_GHH).reshape(G * H, G * H))
  return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def weigh(S_GHGH: np.ndarray, M_GHH: np.ndarray) -> np.ndarray:
  """R S R with R = blockdiag(M_i^1/2), [G, H, G, H]: moments as the residual sees them.

  Args:
    S_GHGH: second moments of the concatenated keys (values).
    M_GHH: second moments of the queries (outputs) of each head.
  """
  root_GHH, (G, H, _) = _sqrt(M_GHH), M_GHH.shape

  def times_root(matrix):
    return (root_GHH @ matrix.reshape(G, H, G * H)).reshape(G * H, G * H)

  both = times_root(times_root(S_GHGH).T)
  return ((both + both.T) / 2).reshape(G, H, G, H)


def svd(S_GHGH: np.ndarray, M_GHH: np.ndarray) -> Sharing:
  """The sharing with the least residual there is: a weighted low-rank approximation.

  A basis of the shared head is free. Here, keys (values) and what meets them get the
  square root of each direction's strength: of all bases, the product then changes
  least when all kernels change by a small part of their norm, as a step of training
  changes them.

  Args:
    S_GHGH: second moments of the keys (values) of the group.
    M_GHH: second moments of the queries (outputs) of each head.

  Returns:
    The sharing; `residual` is the sum of the eigenvalues after the H-th.
  """
  G, H, _ = M_GHH.shape
  values, vectors = spectrum(S_GHGH, M_GHH)
  kept_H = values[:H] > _NEGLIGIBLE * max(values[0], np.finfo(float).tiny)
  strength_H = np.where(kept_H, np.sqrt(values[:H]), 1.0)
  scale_H = np.where(kept_H, strength_H**-0.5, 0.0)
  merge_GHH = _sqrt(M_GHH) @ (vectors[:, :H].reshape(G, H, H) * scale_H)
  absorb_GHH = np.tensordot(S_GHGH, merge_GHH, ([2, 3], [0, 1])) / strength_H
  return Sharing(merge_GHH, absorb_GHH)


def refit(S_GHGH: np.ndarray, merge_GHH: np.ndarray) -> Sharing:
  """The best that queries (outputs) can absorb for a given shared head.

  Args:
    S_GHGH: second moments of the keys (values) of the group.
    merge_GHH: how the heads are merged, for instance I / G for the mean.

  Returns:
    A_i = E_i^T S F (F^T S F)^-1, the least-squares fit of k_i to the shared key.
  """
  cross_GHH = np.tensordot(S_GHGH, merge_GHH, 2)
  shared_HH = np.tensordot(merge_GHH, cross_GHH, ((0, 1), (0, 1)))
  inverse_HH = np.linalg.pinv(shared_HH, rcond=_NEGLIGIBLE, hermitian=True)
  return Sharing(merge_GHH, cross_GHH @ inverse_HH)


def mean(G: int, H: int) -> np.ndarray:
  """The merge of mean pooling: I / G for each head, [G, H, H]."""
  return np.broadcast_to(np.eye(H) / G, (G, H, H)).copy()


def procrustes(S_GHGH: np.ndarray) -> Sharing:
  """Rotates the heads of a group towards each other, then takes their mean.

  Generalised orthogonal Procrustes: rotations R_i that maximise
  sum_{i, j} tr(R_i^T S_ij R_j), one head after the other until nothing moves.

  Args:
    S_GHGH: second moments of the keys (values) of the group.

  Returns:
    merge R_i / G, absorb R_i.

  Source: Align Attention Heads Before Merging Them (arXiv 2412.20677).
  """
  G = len(S_GHGH)
  R_GHH = np.stack([_nearest_rotation(S_GHGH[i, :, 0]) for i in range(G)])
  agreement = -np.inf
  for _ in range(_PROCRUSTES_SWEEPS):
    for i in range(G):
      others_HH = np.tensordot(S_GHGH[i], R_GHH, 2)
      R_GHH[i] = _nearest_rotation(others_HH - S_GHGH[i, :, i] @ R_GHH[i])
    before = agreement
    agreement = np.sum(R_GHH * np.tensordot(S_GHGH, R_GHH, 2))
    if agreement <= before * (1 + _PROCRUSTES_TOLERANCE):
      break
  return Sharing(R_GHH / G, R_GHH)


def residual(S_GHGH: np.ndarray, M_GHH: np.ndarray, sharing: Sharing) -> float:
  """The expected squared error of a sharing, summed over the heads of the group.

  Args:
    S_GHGH: second moments of the keys (values) of the group.
    M_GHH: second moments of the queries (outputs) of each head.
    sharing: any.

  Returns:
    Squared logits (keys) or squared outputs (values), per pair or position.
  """
  G, H, _ = M_GHH.shape
  S = S_GHGH.reshape(G * H, G * H)
  total = 0.0
  for i in range(G):
    error = -(sharing.merge_GHH @ sharing.absorb_GHH[i].T)  # [G, H, H]
    error[i] += np.eye(H)
    error = error.reshape(G * H, H)
    total += np.sum(M_GHH[i] * (error.T @ S @ error))
  return float(total)


def _sqrt(M_GHH: np.ndarray) -> np.ndarray:
  """Square roots of symmetric positive semi-definite matrices."""
  values_GH, vectors_GHH = np.linalg.eigh(M_GHH)
  roots_GH = np.sqrt(np.maximum(values_GH, 0.0))
  return (vectors_GHH * roots_GH[:, None, :]) @ np.swapaxes(vectors_GHH, 1, 2)


def _nearest_rotation(matrix_HH: np.ndarray) -> np.ndarray:
  """The orthogonal R that maximises tr(R^T matrix)."""
  left, _, right = np.linalg.svd(matrix_HH)
  return left @ right
