"""The units of a conversion: what each attention module becomes, with its moments."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gqa_t5x.checkpoints import tree
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, TensorSpec, Unit
from gqa_t5x.conversion import adafactor_moments, input_statistics, methods
from gqa_t5x.conversion.kernels import ALL_KERNELS, LATENT_KERNELS, AttentionModule
from gqa_t5x.conversion.output_refit import HEADS, RESIDUAL, SumsFile, refit

Tensors = Mapping[str, LazyTensor]
Shapes = Mapping[str, tuple[int, ...]]
Notes = dict[str, str]  # Path of a changed parameter -> what is done to its moments.


@dataclasses.dataclass(frozen=True)
class ModuleSpec:
  """What becomes of one attention module.

  Attributes:
    kind: of attention, a key of tree.KINDS.
    method: a key of methods.METHODS.
    reorder: whether its heads are reordered, and with them its position bias, the
      parameter `bias`, if it has one of its own.
  """

  module: AttentionModule
  kind: str
  method: str
  reorder: bool
  bias: str | None


def convert_module(
  tensors: Tensors,
  spec: ModuleSpec,
  statistics: input_statistics.StatisticsFile | None,
  shapes: Shapes,
) -> tuple[Unit, Notes]:
  """The work on one attention module: its kernels and their Adafactor moments.

  Args:
    tensors: of the whole checkpoint.
    shapes: of all parameters after the conversion.
  """
  module, reorder = spec.module, spec.reorder
  method = methods.METHODS[spec.method]
  rule = 'reset' if reorder else method.adafactor
  uses_inputs = reorder or method.uses_inputs
  names = ALL_KERNELS if reorder else method.kernels
  read = {name: f'{module.path}/{name}/kernel' for name in names}
  read |= {'bias': spec.bias} if spec.bias else {}
  written = read
  if module.is_latent:
    names = ('key', 'value', *LATENT_KERNELS)
    written = {name: f'{module.path}/{name}/kernel' for name in names}
  origins = {
    path: path if tree.TARGET + path in tensors else read['query']
    for path in written.values()
  }
  if uses_inputs and statistics:
    statistics.check(module.path, width=shapes[read['query']][0])
  outputs, notes = _outputs(tensors, origins, shapes, rule)

  def compute():
    kernels = {name: tensors[tree.TARGET + p].read() for name, p in read.items()}
    kernels = {n: k.astype(_at_least_float32(k.dtype)) for n, k in kernels.items()}
    inputs = None
    if uses_inputs and statistics:
      statistics.check_kernels(module.path, kernels)
      inputs = statistics.read(module.path)
    elif uses_inputs:
      inputs = input_statistics.from_norms(tensors, spec.kind, module.path)
    grouping = 'similarity' if reorder else 'contiguous'
    new = methods.convert_module(kernels, module, spec.method, inputs, grouping)
    results = {tree.TARGET + path: new[name] for name, path in written.items()}
    return results | _moments(tensors, origins, shapes, rule, module)

  return Unit(outputs, compute), notes


def refit_outputs(
  tensors: Tensors, module: str, sums: SumsFile, shapes: Shapes
) -> tuple[Unit, Notes]:
  """The work on one attention module, by its path, whose output kernel is refitted.

  Args are otherwise those of `convert_module`.
  """
  path = f'{module}/out/kernel'
  sums.check(module, shapes[path])
  origins = {path: path}
  outputs, notes = _outputs(tensors, origins, shapes, 'reset')

  def compute():
    names = ('key', 'out')
    kernels = {n: tensors[f'{tree.TARGET}{module}/{n}/kernel'].read() for n in names}
    sums.check_kernels(module, kernels)
    arrays = sums.arrays(module)
    out = refit(kernels['out'].astype(np.float64), arrays[HEADS], arrays[RESIDUAL])
    results = {tree.TARGET + path: out.astype(outputs[tree.TARGET + path].dtype)}
    return results | _moments(tensors, origins, shapes, 'reset')

  X, D = shapes[path]
  scratch = 8 * 2 * X * (X + D)  # Of the regression, in float64; LAPACK has copies.
  return Unit(outputs, compute, scratch), notes


def copy(path: str, tensor: LazyTensor) -> Unit:
  """A tensor that stays as it is."""
  return Unit({path: tensor}, lambda: {path: tensor.checked(path).read()})


def _outputs(
  tensors: Tensors, origins: Mapping[str, str], shapes: Shapes, rule: str
) -> tuple[dict[str, TensorSpec], Notes]:
  """What parameters and their moments become.

  Args:
    origins: path of each parameter -> that of the source's parameter which it has its
      dtype, and the state of its moments, of.
    rule: as of `adafactor_moments.convert_moments`.
  """
  outputs, notes = {}, {}
  for path, origin in origins.items():
    source = tensors[tree.TARGET + origin]
    dtype = _at_least_float32(source.dtype)
    outputs[tree.TARGET + path] = TensorSpec(shapes[path], dtype)
    if moments := _adafactor_moments(tensors, origin):
      old = {n: moment.shape for n, moment in moments.items()}
      new = adafactor_moments.converted_shapes(old, source.shape, shapes[path])
      specs = {n: TensorSpec(new[n], moments[n].dtype) for n in moments}
      outputs |= _in_state(path, specs)
      own = {n: m.shape for n, m in _adafactor_moments(tensors, path).items()}
      notes[path] = adafactor_moments.describe(own, new, rule)
  return outputs, notes


def _moments(
  tensors: Tensors,
  origins: Mapping[str, str],
  shapes: Shapes,
  rule: str,
  module: AttentionModule | None = None,  # None only of the rule "reset".
) -> dict[str, np.ndarray]:
  """The moments of parameters; arguments as of `_outputs`."""
  results: dict[str, np.ndarray] = {}
  for path, origin in origins.items():
    if moments := _adafactor_moments(tensors, origin):
      converted = adafactor_moments.convert_moments(
        {n: moment.read() for n, moment in moments.items()},
        module,
        tensors[tree.TARGET + origin].shape,
        shapes[path],
        rule,
      )
      results |= _in_state(path, converted)
  return results


def _at_least_float32(dtype: np.dtype) -> np.dtype:
  """The dtype of a kernel that is changed: 16 bits would round a mean once more."""
  return np.promote_types(dtype, np.float32)


def _adafactor_moments(tensors: Tensors, parameter: str) -> dict[str, LazyTensor]:
  """Name -> Adafactor's moment of a parameter; empty where there are none."""
  prefix = f'{tree.PARAM_STATES}{parameter}/'
  found = {name: tensors.get(prefix + name) for name in adafactor_moments.NAMES}
  return {} if None in found.values() else found


def _in_state(parameter: str, moments: Mapping[str, Any]) -> dict[str, Any]:
  """Name -> moment of a parameter, under their paths in the tree."""
  return {f'{tree.PARAM_STATES}{parameter}/{name}': m for name, m in moments.items()}
