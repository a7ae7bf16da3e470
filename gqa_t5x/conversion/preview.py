"""Says in words what a conversion would do, one line for layers that are alike."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from gqa_t5x.checkpoints.lazy_tensor import TensorSpec
from gqa_t5x.checkpoints.tree import PARAM_STATES, TARGET
from gqa_t5x.conversion.plan import Plan

_LAYER = re.compile(r'layers_(\d+)')


def describe_plan(
  plan: Plan, tensors: Mapping[str, TensorSpec], method: str, dropped: Sequence[str]
) -> Iterator[str]:
  """Lists what is converted, kept and dropped, and what that saves.

  Args:
    plan: the conversion.
    tensors: of the source, path -> shape and dtype.
    method: its name.
    dropped: names of what the source has and the result has not.

  Yields:
    Lines of text.
  """
  outputs = {p: spec for unit in plan.units for p, spec in unit.outputs.items()}
  kept = [path for path in sorted(outputs) if outputs[path] is tensors.get(path)]
  changed = sorted(outputs.keys() - set(kept))
  yield f'Converted: {len(changed)} tensors, {_nbytes(outputs, changed):,} bytes'
  yield from _lines(
    {p: f'{_shape(tensors[p])} -> {_shape(outputs[p])}  {method}' for p in changed}
  )
  for line in group_layers(plan.log):
    yield f'  moments of {line}'
  yield f'Kept: {len(kept)} tensors, {_nbytes(outputs, kept):,} bytes'
  yield from _lines({path: _shape(tensors[path]) for path in kept})
  if moments := sum(path.startswith(PARAM_STATES) for path in kept):
    yield f'  moments of these, {moments} tensors'
  yield f'Dropped: {", ".join(dropped) if dropped else "nothing"}'
  before, after = _nbytes(tensors, tensors), _nbytes(outputs, outputs)
  yield (
    f'Checkpoint: {before:,} -> {after:,} bytes uncompressed, {before - after:,} saved'
  )


def _lines(entries: Mapping[str, str]) -> Iterator[str]:
  """Lines of all but the moments."""
  shown = {p: text for p, text in entries.items() if not p.startswith(PARAM_STATES)}
  for line in group_layers(shown):
    yield f'  {line}'


def describe_sizes(plan: Plan) -> str:
  """One line: parameters and decode cache, before and after."""
  before, after = plan.source, plan.target
  cache = [
    f'{before.cache_bytes_per_token(kind):,} -> {after.cache_bytes_per_token(kind):,}'
    for kind in ('self_attention', 'cross_attention')
  ]
  return (
    f'{before.num_parameters():,} -> {after.num_parameters():,} parameters; decode'
    f' cache in bfloat16 {cache[0]} bytes per output token, {cache[1]} bytes per input'
    ' token'
  )


def group_layers(entries: Mapping[str, str]) -> list[str]:
  """Joins the lines that differ in the number of the layer only.

  Args:
    entries: path -> text, {"decoder/layers_0/mlp/wo/kernel": "[5, 6]", ...}.

  Returns:
    Lines, in the order of their first entry: "decoder/layers_{0..23}/...  [5, 6]".
  """
  layers: dict[tuple[str, str], list[int]] = {}
  for path, text in entries.items():
    path = path.removeprefix(TARGET)
    numbers = layers.setdefault((_LAYER.sub('layers_{}', path), text), [])
    numbers += map(int, _LAYER.findall(path))
  return [
    f'{pattern.replace("{}", _numbers(sorted(numbers)))}  {text}'
    for (pattern, text), numbers in layers.items()
  ]


def _numbers(numbers: list[int]) -> str:
  """[3] -> "3", [0, 1, 2] -> "{0..2}", [0, 2] -> "{0,2}"."""
  if len(numbers) < 2:
    return ''.join(map(str, numbers))
  if numbers[-1] - numbers[0] == len(numbers) - 1:
    return f'{{{numbers[0]}..{numbers[-1]}}}'
  return f'{{{",".join(map(str, numbers))}}}'


def _shape(spec: TensorSpec) -> str:
  return str(list(spec.shape))


def _nbytes(specs: Mapping[str, TensorSpec], paths) -> int:
  return sum(math.prod(specs[p].shape) * specs[p].dtype.itemsize for p in paths)
