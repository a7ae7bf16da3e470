"""How every attention module is converted: method, grouping, moments of the inputs."""

from collections.abc import Mapping

import numpy as np

from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, TensorSpec, Unit
from gqa_t5x.checkpoints.tree import PARAM_STATES, TARGET, norms_before
from gqa_t5x.conversion import adafactor_moments
from gqa_t5x.conversion.input_statistics import InputMoments, open_statistics
from gqa_t5x.conversion.kernels import ALL_KERNELS, AttentionModule
from gqa_t5x.conversion.methods import (
  METHODS,
  check_grouping,
  convert_module,
  get_method,
)
from gqa_t5x.errors import BadInput

Tensors = Mapping[str, LazyTensor]


class Recipe:
  """Turns attention modules into units of work, all in the same way."""

  def __init__(self, method: str, grouping: str, statistics: str | None):
    """Looks everything up and opens the statistics.

    Args:
      method: a name in methods.METHODS.
      grouping: "contiguous", or "similarity": heads of cross-attention are reordered,
        those of self-attention, which a position bias tells apart, are not.
      statistics: file of `python -m gqa_t5x.calibrate`; None: the scales of the layer
        norms in front of a module stand in, as if its inputs were white before them.

    Raises:
      BadInput: unknown names, statistics that cannot be read or are not used.
    """
    self._name, self._method = method, get_method(method)
    check_grouping(grouping)
    self._grouping = grouping
    if statistics and not (self._method.uses_inputs or grouping == 'similarity'):
      users = ', '.join(name for name, m in METHODS.items() if m.uses_inputs)
      raise BadInput(
        f'statistics={statistics} was given, but method={method} uses none; leave it'
        f' out, or choose one of {users}'
      )
    self._statistics = open_statistics(statistics) if statistics else None

  def unit(
    self,
    tensors: Tensors,
    module: AttentionModule,
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
  ) -> tuple[Unit, dict[str, str]]:
    """The work on one attention module: its kernels and their moments.

    Args:
      tensors: the whole source.
      module: which module, and its head counts.
      kind: of attention, a key of architecture.KINDS.
      shapes: of all parameters after the conversion.

    Returns:
      The unit, and path of each changed kernel -> what is done to its moments.
    """
    # Self-attention has a position bias: its heads keep their order.
    reorder = self._grouping == 'similarity' and kind == 'cross_attention'
    names = ALL_KERNELS if reorder else self._method.kernels
    rule = 'reset' if reorder else self._method.moments
    uses_inputs = reorder or self._method.uses_inputs
    paths = {name: f'{module.path}/{name}/kernel' for name in names}
    if uses_inputs and self._statistics:
      self._statistics.check(module.path, width=shapes[paths['query']][0])
    outputs, notes, all_moments = {}, {}, {}
    for path in paths.values():
      outputs[TARGET + path] = TensorSpec(shapes[path], tensors[TARGET + path].dtype)
      moments = {n: tensors.get(p) for n, p in _moment_paths(path).items()}
      if None in moments.values():
        continue
      old = {n: moment.shape for n, moment in moments.items()}
      new = adafactor_moments.converted_shapes(old, shapes[path])
      for n, moment_path in _moment_paths(path).items():
        outputs[moment_path] = TensorSpec(new[n], moments[n].dtype)
      all_moments[path] = moments
      notes[path] = adafactor_moments.describe(old, new, rule)

    def compute():
      results = {}
      converted = convert_module(
        {name: tensors[TARGET + path].read() for name, path in paths.items()},
        module,
        self._name,
        self._inputs(tensors, module, kind) if uses_inputs else None,
        'similarity' if reorder else 'contiguous',
      )
      for name, path in paths.items():
        results[TARGET + path] = converted[name]
      for path, moments in all_moments.items():
        arrays = {n: moment.read() for n, moment in moments.items()}
        old = tensors[TARGET + path].shape
        arrays = adafactor_moments.convert_moments(
          arrays, module, old, shapes[path], rule
        )
        results |= {p: arrays[n] for n, p in _moment_paths(path).items()}
      return results

    return Unit(outputs, compute), notes

  def _inputs(
    self, tensors: Tensors, module: AttentionModule, kind: str
  ) -> InputMoments:
    """Second moments of a module's inputs, measured or from the weights alone."""
    if self._statistics:
      return self._statistics.moments(module.path)
    query, key = (
      np.square(tensors[TARGET + norm].read(), dtype=np.float64)
      for norm in norms_before(kind, module.path)
    )
    return InputMoments(query=query, key=key, value=key)


def _moment_paths(parameter: str) -> dict[str, str]:
  return {name: f'{PARAM_STATES}{parameter}/{name}' for name in adafactor_moments.NAMES}
