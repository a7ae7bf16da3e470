"""FLOPs of the matrix products in a compiled program."""

import functools
import math
import re

import numpy as np

from gqa_t5x.analysis.hlo.parse import Computation, Instruction, Shape


def of_product(computation: Computation, i: Instruction) -> float:
  """Returns the FLOPs of a matrix product, 2 a multiply-add; of all else 0.

  Args:
    computation: that it is in.
    i: the instruction.
  """
  if i.opcode == 'custom-call':
    return _kernel(computation, i)
  if i.opcode not in ('dot', 'convolution'):
    return 0
  left, right = (computation.instructions[name].shape for name in i.operands[:2])
  if i.opcode == 'dot':
    summed = math.prod(left.dims[d] for d in i.numbers('lhs_contracting_dims'))
    return 2 * math.prod(i.shape.dims) * summed
  return 2 * _convolution_products(i, left, right)


def _kernel(computation: Computation, i: Instruction) -> float:
  """Returns what a kernel says of itself, or is known to do, or 0."""
  said = re.search(r'"cost_estimate":\{"flops":"(\d+)"', i.aside)
  if said:
    return int(said.group(1))
  if i.name.startswith('online-softmax'):
    # The compiler's own: softmax of the first operand, times the second.
    scores = computation.instructions[i.operands[0]].shape
    return 2 * math.prod(i.shape.dims) * scores.dims[-1]
  return 0


def _convolution_products(i: Instruction, left: Shape, right: Shape) -> int:
  """Returns the multiply-adds of a convolution, as XLA's HloCostAnalysis does.

  TPU programs write products with a batch as convolutions over it, with dilations: of
  the positions that their windows have, few hold an element.
  """
  lhs, kernel, out = re.match(r'(\w+)_(\w+)->(\w+)', i.attribute('dim_labels')).groups()
  batch_groups = int(i.attribute('batch_group_count') or 1)
  products = left.dims[lhs.index('b')] // batch_groups
  # The kernel's input features are those of one feature group.
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
def _valid(
  size: int,
  kernel: int,
  out: int,
  pad: int,
  stride: int,
  lhs_dilate: int,
  rhs_dilate: int,
) -> int:
  """Returns how many pairs of output and kernel positions meet an element."""
  starts = np.arange(out) * stride - pad
  total = 0
  for k in range(kernel):
    places = starts + k * rhs_dilate
    inside = (places >= 0) & (places < size * lhs_dilate)
    total += int(np.sum(inside & (places % lhs_dilate == 0)))
  return total
