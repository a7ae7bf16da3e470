"""Output kernels, refitted to what a module said before its conversion.

After a conversion the heads of a module say something else than before, c' [T, N*H] of
T tokens instead of c. By ridge regression its output kernel moves from O' to where
c' O is closest to y = c O_old, the output of the original module on the same inputs:

  O = O' + (E[c'^T c'] + ridge)^-1 E[c'^T (y - c' O')].

`output_sums` collects the two means, and `gqa_t5x.calibrate` writes them to a file.

Letters: X = N*H numbers of all heads, D width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x.conversion import module_arrays
from gqa_t5x.errors import BadInput

RIDGE = 1e-3  # of the mean of the diagonal
HEADS, RESIDUAL = 'heads', 'residual'
_WHAT = 'output sums'

# HEADS -> E[c'^T c'] [X, X], RESIDUAL -> E[c'^T (y - c' O')] [X, D].
OutputSums = Mapping[str, np.ndarray]


def refit(
  out_XD: np.ndarray,
  heads_XX: np.ndarray,
  residual_XD: np.ndarray,
  ridge: float = RIDGE,
) -> np.ndarray:
  """Moves an output kernel to where its module comes closest to the original.

  Args:
    out_XD: O'.
    heads_XX, residual_XD: the means, or sums, over the same tokens.
    ridge: how much it is held where it is, of the mean of the diagonal of `heads_XX`.

  Returns:
    O, float64 [X, D].
  """
  regular_XX = np.array(heads_XX, np.float64)
  held = (
    ridge * np.mean(np.diag(regular_XX)) or 1.0
  )  # Heads that say nothing: as it is.
  regular_XX[np.diag_indices_from(regular_XX)] += held
  return out_XD + np.linalg.solve(regular_XX, np.asarray(residual_XD, np.float64))


class SumsFile(module_arrays.ArraysFile):
  """A file of output sums."""

  def check(self, module: str, shape: tuple[int, int]) -> None:
    """Raises BadInput unless it has a module whose output kernel is of this shape."""
    expected = {HEADS: (shape[0], shape[0]), RESIDUAL: shape}
    for name, wanted in expected.items():
      if (found := self.shape(module, name)) != wanted:
        raise BadInput(
          f'{self.path}: the {name} sums of {module} are of shape {found}, expected'
          f' {wanted}: they are of another checkpoint'
        )


def open_sums(path: epath.PathLike) -> SumsFile:
  """Opens a file of output sums; reads its index alone.

  Raises:
    BadInput: it is missing, damaged, or something else.
  """
  return SumsFile.open(path, _WHAT)


def write_sums(
  path: epath.PathLike, sums: Mapping[str, OutputSums], info: Mapping[str, Any]
) -> None:
  """Writes the file, whole or not at all; arguments are those of `module_arrays.write`.

  Raises:
    BadInput: there are fewer tokens than a regression needs, or a sum is not finite.
      Nothing is left behind.
  """
  for module, of_module in sums.items():
    stack, X = module.partition('/')[0], len(of_module[HEADS])
    if (tokens := info['num_tokens'][stack]) < X:
      raise BadInput(
        f'the texts have {tokens:,} tokens for the {stack}, and to refit the outputs of'
        f' {module} takes {X:,} at least, as many as its heads have numbers; give more'
        ' texts'
      )
  module_arrays.write(path, _WHAT, sums, info)
