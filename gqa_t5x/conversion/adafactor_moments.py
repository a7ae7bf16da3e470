"""Adafactor's moments must follow the kernels, in the layout of their new shapes.

T5X's Adafactor decides by shape alone how it keeps the second moments of a 2-D kernel:
if both dimensions are at least 128, as two vectors (`v_row` along the smaller
dimension, `v_col` along the larger), else as a full matrix `v`. The conversion makes
K and V kernels narrower, so the layout can change: for T5.1.1-XXL from 64 to 8 heads
`v_row` and `v_col` swap, and every MQA kernel (64 columns) is unfactored. The kernels
that the latent form adds have moments in the state that the query's are.

Letters: D width, S source key/value heads, K new ones, H head size.
"""

from collections.abc import Mapping

import numpy as np

from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.checkpoints.tree import PARAM_STATES
from gqa_t5x.conversion.kernels import AttentionModule, join_heads, split_groups

# T5X's Adafactor.min_dim_size_to_factor.
_MIN_DIM_SIZE_TO_FACTOR = 128
NAMES = ('m', 'v', 'v_col', 'v_row')
_UNUSED = (1,)  # the shape of a moment that Adafactor does not use

Moments = Mapping[str, np.ndarray]
Shape = tuple[int, ...]


def _factored_axes(shape: Shape) -> tuple[int, int] | None:
  """Which axis of a kernel `v_row` and `v_col` run along; None: there is a full `v`.

  Source: t5x/adafactor.py, Adafactor._factored_dims.
  """
  if len(shape) != 2 or min(shape) < _MIN_DIM_SIZE_TO_FACTOR:
    return None
  return (1, 0) if shape[0] > shape[1] else (0, 1)


def initial(params: Mapping[str, Shape]) -> dict[str, LazyTensor]:
  """The moments with which Adafactor starts, for a checkpoint that has none.

  T5X restores no checkpoint for training that lacks them.

  Args:
    params: path -> shape of each parameter.

  Returns:
    "state/param_states/decoder/.../v_row" and so on: float32 zeros.
  """
  shapes = {
    f'{PARAM_STATES}{path}/{name}': shape
    for path, of_param in params.items()
    for name, shape in _initial_shapes(tuple(of_param)).items()
  }
  return {
    path: LazyTensor(s, np.dtype(np.float32), lambda s=s: np.zeros(s, np.float32))
    for path, s in shapes.items()
  }


def _initial_shapes(shape: Shape) -> dict[str, Shape]:
  """Of the moments of a parameter: without momentum, factored where T5X does."""
  return converted_shapes(dict.fromkeys(NAMES, _UNUSED), shape, shape)


def converted_shapes(
  moments: Mapping[str, Shape], shape: Shape, new: Shape
) -> dict[str, Shape]:
  """Shapes of the moments of a kernel of shape `new`, from those of one of `shape`.

  Where one is not factored that could be, factoring is switched off, and stays so, as
  momentum does. Those that are not used are (1,).
  """
  switched_off = moments['v'] != _UNUSED and _factored_axes(shape)
  axes = None if switched_off else _factored_axes(new)
  return {
    'm': _UNUSED if moments['m'] == _UNUSED else new,
    'v': _UNUSED if axes else new,
    'v_col': (new[axes[1]],) if axes else _UNUSED,
    'v_row': (new[axes[0]],) if axes else _UNUSED,
  }


def layout_problem(moments: Mapping[str, Shape], shape: Shape) -> str | None:
  """Says what is wrong with the moments of a kernel of this shape, if anything.

  A stale layout would otherwise be a broadcast error in training or pass unseen.
  """
  if set(moments) != set(NAMES):
    return f"has {sorted(moments)}, expected Adafactor's {list(NAMES)}"
  expected = converted_shapes(moments, shape, shape)
  wrong = [n for n in NAMES if tuple(moments[n]) != expected[n]]
  if wrong:
    found = ', '.join(f'{n} {tuple(moments[n])}' for n in wrong)
    wanted = ', '.join(f'{n} {expected[n]}' for n in wrong)
    return f'has {found}, expected {wanted} for a kernel of shape {shape}'
  return None


def convert_moments(
  moments: Moments, module: AttentionModule, shape: Shape, new: Shape, rule: str
) -> dict[str, np.ndarray]:
  """Converts the Adafactor moments of one kernel.

  Rule "sum" (for mean pooling): the gradients of heads that become one add up, so the
  second moments are summed over each group, not averaged. That is an argument (it
  takes the gradients of the heads of a group as uncorrelated), not a measurement. The
  momentum `m` holds steps already scaled by Adafactor, so it is averaged, like the
  kernel. Rule "first" takes the first head's. Rule "reset" is Adafactor's own start,
  for other kernels than those of K and V, too.

  Args:
    moments: m, v, v_col, v_row as T5X keeps them, [1] for those not used.
    module: gives S, K and H.
    shape: of the kernel before, [D, S*H].
    new: of the kernel after; [D, K*H] unless the rule is "reset".
    rule: "sum", "first" or "reset".

  Returns:
    The four moments, laid out as Adafactor would for the new shape, in their dtypes.

  Source: t5x/adafactor.py.
  """
  old = {n: tuple(a.shape) for n, a in moments.items()}
  shapes = converted_shapes(old, shape, new)
  result = {n: np.zeros(shapes[n], moments[n].dtype) for n in NAMES}
  if rule == 'reset':
    return result
  if shapes['m'] != _UNUSED:
    result['m'] = _pool(moments['m'], module, 'mean' if rule == 'sum' else 'first')
  axes = _factored_axes(shape)
  if moments['v'].shape != _UNUSED:
    result['v'] = _pool(moments['v'], module, rule)
    return {n: a.astype(moments[n].dtype) for n, a in result.items()}
  stats = {axes[0]: moments['v_row'], axes[1]: moments['v_col']}
  stat_D, stat_C = stats[0].astype(np.float64), stats[1].astype(np.float64)
  # v_row and v_col are means of one matrix over its columns and its rows, so both have
  # the same mean: the sum over the columns of new heads rescales the other one.
  pooled_C = _pool(stat_C, module, rule)
  if stat_C.mean() > 0:
    stat_D = stat_D * (pooled_C.mean() / stat_C.mean())
  new_axes = _factored_axes(new)
  if new_axes is None:
    mean = stat_D.mean()
    result['v'] = np.outer(stat_D, pooled_C) / (mean if mean > 0 else 1.0)
  else:
    new_stats = (stat_D, pooled_C)
    result['v_row'], result['v_col'] = (new_stats[axis] for axis in new_axes)
  return {n: a.astype(moments[n].dtype) for n, a in result.items()}


def describe(shapes: Mapping[str, Shape], new: Mapping[str, Shape], rule: str) -> str:
  """One phrase for the log: what was done to the moments, if any, of one kernel."""
  done = {'sum': 'summed over each group', 'first': "of each group's first head"}
  before, after = (
    ' '.join(f'{n} {tuple(of[n])}' for n in of if of[n] != _UNUSED)
    for of in (shapes, new)
  )
  return f'{before or "none"} -> {after}, {done.get(rule, "reset to zero")}'


def _pool(moment: np.ndarray, module: AttentionModule, rule: str) -> np.ndarray:
  """[..., S*H] -> [..., K*H], float64."""
  split_DKGH = split_groups(moment, module).astype(np.float64)
  pool = {
    'sum': lambda x: x.sum(axis=-2),
    'mean': lambda x: x.mean(axis=-2),
    'first': lambda x: x[..., 0, :],
  }[rule]
  return join_heads(pool(split_DKGH))
