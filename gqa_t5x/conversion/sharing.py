"""Methods that rewrite all four kernels: heads are merged, Q and O absorb the rest.

The maths of one group is in shared_heads.py; here it meets the kernels.
"""

from collections.abc import Callable

import numpy as np

from gqa_t5x.conversion import head_moments, shared_heads
from gqa_t5x.conversion.input_statistics import InputMoments
from gqa_t5x.conversion.kernels import (
  ALL_KERNELS,
  AttentionModule,
  Kernels,
  group_kernels,
  heads_of,
)
from gqa_t5x.conversion.shared_heads import Sharing

# (S [G, H, G, H], M [G, H, H]) -> the sharing of one group.
Solver = Callable[[np.ndarray, np.ndarray], Sharing]

svd: Solver = shared_heads.svd


def refit(S_GHGH: np.ndarray, M_GHH: np.ndarray) -> Sharing:
  """The mean of the heads, absorbed as well as can be."""
  return shared_heads.refit(S_GHGH, shared_heads.mean(*M_GHH.shape[:2]))


def procrustes(S_GHGH: np.ndarray, M_GHH: np.ndarray) -> Sharing:
  """The mean of the heads after rotations; asks only for the keys' moments."""
  del M_GHH
  return shared_heads.procrustes(S_GHGH)


def convert(
  solve: Solver,
  rms: str,
  kernels: Kernels,
  module: AttentionModule,
  inputs: InputMoments,
) -> dict[str, np.ndarray]:
  """Converts a module, one group at a time.

  Args:
    solve: finds the sharing of a group.
    rms: what becomes of the RMS of the shared kernels, which Adafactor's steps scale
      with: "as is"; "restored" to that of the old kernels; or restored and "absorbed",
      so that the function does not change.
    kernels: all four.
    module: head counts.
    inputs: second moments of the module's inputs.

  Returns:
    All four kernels, in their dtypes.
  """
  H, new = module.head_dim, {name: [] for name in ALL_KERNELS}
  for index in range(module.num_kv_heads):
    group = group_kernels(kernels, module, index)
    query_GRDH, out_GRHD = heads_of(group, 'query', H), heads_of(group, 'out', H)
    D = query_GRDH.shape[2]
    key_DH, absorb_GHH = _merge(
      solve, rms, heads_of(group, 'key', H), *head_moments.key_moments(group, inputs, H)
    )
    query_GRDH = query_GRDH @ absorb_GHH[:, None]
    new['key'].append(key_DH)
    new['query'].append(query_GRDH.transpose(2, 0, 1, 3).reshape(D, -1))
    value_DH, absorb_GHH = _merge(
      solve,
      rms,
      heads_of(group, 'value', H),
      *head_moments.value_moments(group, inputs, H),
    )
    new['value'].append(value_DH)
    new['out'].append(
      (np.swapaxes(absorb_GHH, 1, 2)[:, None] @ out_GRHD).reshape(-1, D)
    )
  return {
    name: np.concatenate(parts, axis=int(name != 'out')).astype(kernels[name].dtype)
    for name, parts in new.items()
  }


def _merge(
  solve: Solver,
  rms: str,
  heads_GDH: np.ndarray,
  S_GHGH: np.ndarray,
  M_GHH: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """The shared kernel [D, H] of a group, and what its heads absorb, [G, H, H]."""
  sharing = solve(S_GHGH, M_GHH)
  shared_DH = np.einsum('gdh,ghi->di', heads_GDH, sharing.merge_GHH, optimize=True)
  absorb_GHH = sharing.absorb_GHH
  size = np.sqrt(np.mean(shared_DH**2))
  if rms == 'as is' or not size:
    return shared_DH, absorb_GHH
  ratio = np.sqrt(np.mean(heads_GDH**2)) / size
  return shared_DH * ratio, absorb_GHH / (ratio if rms == 'absorbed' else 1.0)


def spectra(
  kernels: Kernels, module: AttentionModule, inputs: InputMoments
) -> dict[str, np.ndarray]:
  """The eigenvalues behind `svd`, from which the loss of any head size follows.

  Args:
    kernels: all four.
    module: head counts.
    inputs: second moments of the module's inputs.

  Returns:
    "key" and "value" -> [K, G*H], falling. With H of them kept, the others' sum is the
    residual, and its share of the whole what is lost.
  """
  H = module.head_dim
  sides = {'key': head_moments.key_moments, 'value': head_moments.value_moments}
  return {
    name: np.stack(
      [
        shared_heads.spectrum(*side(group_kernels(kernels, module, group), inputs, H))[
          0
        ]
        for group in range(module.num_kv_heads)
      ]
    )
    for name, side in sides.items()
  }
