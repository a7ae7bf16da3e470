"""FLOPs of the matrix products in a compiled program."""

import functools
import math
import re

from gqa_t5x.analysis.hlo import Computation, Instruction, Shape


def of_product(computation: Computation, i: Instruction) -> float:
  """Returns the FLOPs of a dot or a convolution, 2 a multiply-add; else 0.

  Args:
    computation: that it is in.
    i: the instruction.
  """
  if i.opcode == 'dot':
    left = computation.instructions[i.operands[0]].shape
    over = [
      int(d) for d in re.findall(r'\d+', i.attribute('lhs_contracting_dims') or '')
    ]
    return 2 * math.prod(i.shape.dims) * math.prod(left.dims[d] for d in over)
  if i.opcode != 'convolution':
    return 0
  left, right = (computation.instructions[name].shape for name in i.operands[:2])
  return 2 * _convolution_products(i, left, right)


def _convolution_products(i: Instruction, left: Shape, right: Shape) -> int:
  """Returns the multiply-adds of a convolution.

  TPU programs write products with a batch as convolutions over it: of the positions
  that their windows have, few are within the array.
  """
  lhs, kernel, out = re.match(r'(\w+)_(\w+)->(\w+)', i.attribute('dim_labels')).groups()
  groups = int(i.attribute('batch_group_count') or 1)
  products = left.dims[lhs.index('b')] // groups
  products *= right.dims[kernel.index('i')] * right.dims[kernel.index('o')]
  window = _window(i.attribute('window') or '{}', len(lhs) - 2)
  for d, (pad, stride, lhs_dilate, rhs_dilate) in enumerate(window):
    products *= _valid(
      left.dims[lhs.index(str(d))],
      right.dims[kernel.index(str(d))],
      i.shape.dims[out.index(str(d))],
      pad,
      stride,
      lhs_dilate,
      rhs_dilate,
    )
  return products


def _window(text: str, spatial: int) -> list[tuple[int, int, int, int]]:
  """Returns (low padding, stride, dilations of both sides) of each dimension."""

  def values(name: str, default: str) -> list[str]:
    found = re.search(rf'{name}=([\w\-]+)', text)
    return found.group(1).split('x') if found else [default] * spatial

  return [
    (int(pad.split('_')[0]), int(stride), int(lhs), int(rhs))
    for pad, stride, lhs, rhs in zip(
      values('pad', '0_0'),
      values('stride', '1'),
      values('lhs_dilate', '1'),
      values('rhs_dilate', '1'),
      strict=True,
    )
  ]


@functools.cache
def _valid(size, kernel, out, pad, stride, lhs_dilate, rhs_dilate) -> int:
  """Returns how many pairs of output and kernel positions meet an element."""
  total = 0
  for k in range(kernel):
    for o in range(out):
      place = o * stride + k * rhs_dilate - pad
      total += place % lhs_dilate == 0 and 0 <= place // lhs_dilate < size
  return total
