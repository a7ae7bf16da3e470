"""FLOPs of the matrix products in a compiled program."""

import functools
import math
import re

import numpy as np

from gqa_t5x.analysis.hlo.parse import Computation, Instruction, Shape

# What counts where an instruction does not say it.
WINDOW = {'pad': 0, 'stride': 1, 'lhs_dilate': 1, 'rhs_dilate': 1}


def of_product(computation: Computation, i: Instruction) -> float:
  """Returns the FLOPs of a matrix product, 2 a multiply-add; of all else 0."""
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
  for d in range(len(lhs) - 2):
    sizes = (
      left.dims[lhs.index(str(d))],
      right.dims[kernel.index(str(d))],
      i.shape.dims[out.index(str(d))],
    )
    products *= _valid(sizes, *_window(i.attribute('window') or '', d))
  return products


def _window(text: str, d: int) -> list[int]:
  """Returns low padding, stride, and dilations of both sides in a dimension."""
  found = {name: re.search(rf'{name}=([\w\-]+)', text) for name in WINDOW}
  return [
    int(said[1].split('x')[d].split('_')[0]) if said else WINDOW[name]
    for name, said in found.items()
  ]


@functools.cache
def _valid(
  sizes: tuple[int, int, int], pad: int, stride: int, lhs_dilate: int, rhs_dilate: int
) -> int:
  """Returns how many pairs of output and kernel positions meet an element.

  The sizes are those of the array, of the kernel and of the output.
  """
  size, kernel, out = sizes
  starts = np.arange(out) * stride - pad
  total = 0
  for k in range(kernel):
    places = starts + k * rhs_dilate
    inside = (places >= 0) & (places < size * lhs_dilate)
    total += int(np.sum(inside & (places % lhs_dilate == 0)))
  return total
