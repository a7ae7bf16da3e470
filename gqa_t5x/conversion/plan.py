"""Turns the tree of a whole model: which tensors change, how, and what they become.

`plan_conversion` looks at shapes only and finds every fault before a byte is read; the
plan's units then do the work one attention module at a time. `convert_params` is the
same thing for a tree that is in memory.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, TensorSpec, Unit
from gqa_t5x.checkpoints.tree import (
  PARAM_STATES,
  TARGET,
  Architecture,
  flatten,
  parameters,
  read_architecture,
  unflatten,
)
from gqa_t5x.conversion import adafactor_moments, input_statistics
from gqa_t5x.conversion.kernels import ALL_KERNELS, AttentionModule
from gqa_t5x.conversion.methods import (
  METHODS,
  check_grouping,
  convert_module,
  get_method,
)
from gqa_t5x.errors import BadInput

Tensors = Mapping[str, LazyTensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Plan:
  """A conversion, ready to run.

  Attributes:
    source: the model before.
    target: the model after.
    units: the work; their outputs together are the whole new checkpoint.
    log: path of each changed kernel -> what is done to its moments.
  """

  source: Architecture
  target: Architecture
  units: list[Unit]
  log: dict[str, str]

  @property
  def outputs(self) -> dict[str, TensorSpec]:
    """Path -> tensor of the result; one that is copied is the source's own."""
    return {path: spec for unit in self.units for path, spec in unit.outputs.items()}

  @property
  def nbytes(self) -> int:
    """Bytes of the result, uncompressed."""
    return sum(unit.nbytes for unit in self.units)


def choose_num_kv_heads(
  source: Architecture,
  num_kv_heads: int | None,
  self_attention_num_kv_heads: int | None = None,
  cross_attention_num_kv_heads: int | None = None,
  encoder_num_kv_heads: int | None = None,
) -> dict[str, int]:
  """Decides how many key/value heads each kind of attention gets.

  Args:
    source: the model before.
    num_kv_heads: for decoder self- and cross-attention; None leaves both.
    self_attention_num_kv_heads: if given, for decoder self-attention instead.
    cross_attention_num_kv_heads: if given, for cross-attention instead.
    encoder_num_kv_heads: for the encoder; None leaves it.

  Returns:
    K by kind of attention, the keys of KINDS.

  Raises:
    BadInput: a number does not divide the heads there are, or exceeds them.
  """
  wishes = {
    'encoder': ('encoder_num_kv_heads', encoder_num_kv_heads),
    'self_attention': ('self_attention_num_kv_heads', self_attention_num_kv_heads),
    'cross_attention': ('cross_attention_num_kv_heads', cross_attention_num_kv_heads),
  }
  chosen = {}
  for kind, (name, wish) in wishes.items():
    if wish is None and kind != 'encoder':
      name, wish = 'num_kv_heads', num_kv_heads
    heads = source.num_kv_heads[kind]
    if wish is not None and wish != heads:
      _check_heads(source.num_heads, heads, name, wish)
    chosen[kind] = heads if wish is None else wish
  return chosen


def _check_heads(num_heads: int, source_heads: int, name: str, wish: int) -> None:
  choices = [k for k in range(1, source_heads + 1) if source_heads % k == 0]
  if wish in choices:
    return
  choose = f'choose one of {", ".join(map(str, choices))}'
  if 0 < wish <= num_heads and num_heads % wish == 0:  # it fits N, but not S
    there = f"the checkpoint's {source_heads} key/value heads"
    if wish > source_heads:
      raise BadInput(f'{name}={wish} is more than {there}; {choose}')
    raise BadInput(f'{there} are not divisible by {name}={wish}; {choose}')
  raise BadInput(f'num_heads={num_heads} is not divisible by {name}={wish}; {choose}')


def plan_conversion(
  tensors: Tensors,
  *,
  num_kv_heads: int | None,
  method: str,
  seed: int = 0,
  grouping: str = 'contiguous',
  statistics: str | None = None,
  **kinds,
) -> Plan:
  """Plans the conversion of a checkpoint.

  Args:
    tensors: path -> tensor; "target/decoder/..." are the parameters,
      "state/param_states/decoder/.../v_row" Adafactor's moments (all or none), anything
      else is copied.
    num_kv_heads: K for decoder self- and cross-attention.
    method: a name in methods.METHODS.
    seed: for methods that draw random numbers.
    grouping: "contiguous", or "similarity": heads of cross-attention are reordered,
      those of self-attention, which a position bias tells apart, are not.
    statistics: file of `python -m gqa_t5x.calibrate`, for methods that use statistics
      of the modules' inputs; None: the scales of the layer norms in front of a module
      stand in, as if its inputs were white before them.
    **kinds: self_attention_num_kv_heads, cross_attention_num_kv_heads,
      encoder_num_kv_heads, as in `choose_num_kv_heads`.

  Returns:
    The plan; nothing has been read yet.

  Raises:
    BadInput: unknown method or grouping, statistics of another model or for a
      method that uses none, heads that do not divide, parameters that are not floating
      point, or a tree that is not a T5.1.1's (every missing, extra and mismatched key
      is listed).

  Source: GQA paper (arXiv 2305.13245), sections 2.1 and 2.2.
  """
  recipe = _Recipe(method, grouping, statistics)
  source = _read_source(tensors)
  new_heads = choose_num_kv_heads(source, num_kv_heads, **kinds)
  target = dataclasses.replace(source, num_kv_heads=new_heads)
  units, log, shapes = [], {}, target.shapes()
  for kind, path in source.attention_modules():
    if new_heads[kind] == source.num_kv_heads[kind]:
      continue
    module = AttentionModule(
      path=path,
      num_heads=source.num_heads,
      source_num_kv_heads=source.num_kv_heads[kind],
      num_kv_heads=new_heads[kind],
      head_dim=source.head_dim,
      seed=seed,
    )
    unit, notes = recipe.unit(tensors, module, kind, shapes)
    units.append(unit)
    log |= notes
  changed = {path for unit in units for path in unit.outputs}
  copied = [_copy_unit(p, t) for p, t in tensors.items() if p not in changed]
  return Plan(source, target, units + copied, log)


class _Recipe:
  """Turns attention modules into units of work, all in the same way."""

  def __init__(self, method: str, grouping: str, statistics: str | None):
    """Looks everything up and opens the statistics; arguments of `plan_conversion`."""
    self._name, self._method = method, get_method(method)
    check_grouping(grouping)
    self._grouping = grouping
    if statistics and not (self._method.uses_inputs or grouping == 'similarity'):
      users = ', '.join(name for name, m in METHODS.items() if m.uses_inputs)
      raise BadInput(
        f'statistics={statistics} was given, but method={method} uses none; leave it'
        f' out, or choose one of {users}'
      )
    self._file = input_statistics.open_statistics(statistics) if statistics else None

  def unit(
    self, tensors: Tensors, module: AttentionModule, kind: str, shapes: Shapes
  ) -> tuple[Unit, dict[str, str]]:
    """The work on one attention module: its kernels and their Adafactor moments.

    Args:
      tensors: the whole source.
      module: which module, and its head counts.
      kind: of attention, a key of tree.KINDS.
      shapes: of all parameters after the conversion.

    Returns:
      The unit, and path of each changed kernel -> what is done to its moments.
    """
    # Self-attention has a position bias: its heads keep their order.
    reorder = self._grouping == 'similarity' and kind == 'cross_attention'
    names = ALL_KERNELS if reorder else self._method.kernels
    rule = 'reset' if reorder else self._method.adafactor
    uses_inputs = reorder or self._method.uses_inputs
    paths = {name: f'{module.path}/{name}/kernel' for name in names}
    if uses_inputs and self._file:
      self._file.check(module.path, width=shapes[paths['query']][0])
    outputs, notes = {}, {}
    for path in paths.values():
      outputs[TARGET + path] = TensorSpec(shapes[path], tensors[TARGET + path].dtype)
      if moments := _adafactor_moments(tensors, path):
        old = {n: moment.shape for n, moment in moments.items()}
        new = adafactor_moments.converted_shapes(old, shapes[path])
        outputs |= _in_state(
          path, {n: TensorSpec(new[n], moments[n].dtype) for n in moments}
        )
        notes[path] = adafactor_moments.describe(old, new, rule)

    def compute():
      kernels = {name: tensors[TARGET + path].read() for name, path in paths.items()}
      inputs = self._inputs(tensors, module, kind) if uses_inputs else None
      grouping = 'similarity' if reorder else 'contiguous'
      new = convert_module(kernels, module, self._name, inputs, grouping)
      results = {TARGET + path: new[name] for name, path in paths.items()}
      for name, path in paths.items():
        if moments := _adafactor_moments(tensors, path):
          old = {n: moment.read() for n, moment in moments.items()}
          results |= _in_state(
            path,
            adafactor_moments.convert_moments(
              old, module, kernels[name].shape, shapes[path], rule
            ),
          )
      return results

    return Unit(outputs, compute), notes

  def _inputs(
    self, tensors: Tensors, module: AttentionModule, kind: str
  ) -> input_statistics.InputStatistics:
    if self._file:
      return self._file.read(module.path)
    return input_statistics.from_norms(tensors, kind, module.path)


def _adafactor_moments(tensors: Tensors, parameter: str) -> dict[str, LazyTensor]:
  """Name -> Adafactor's moment of a parameter; empty where there are none."""
  prefix = f'{PARAM_STATES}{parameter}/'
  found = {name: tensors.get(prefix + name) for name in adafactor_moments.NAMES}
  return {} if None in found.values() else found


def _in_state(parameter: str, moments: Mapping[str, Any]) -> dict[str, Any]:
  """Name -> moment of a parameter, under their paths in the tree."""
  return {f'{PARAM_STATES}{parameter}/{name}': m for name, m in moments.items()}


def _read_source(tensors: Tensors) -> Architecture:
  """Reads the sizes of the model, and checks that all of it can be converted."""
  source = read_architecture({p: t.shape for p, t in parameters(tensors).items()})
  _check_dtypes(tensors)
  _check_moments(tensors, source)
  return source


def _copy_unit(path: str, tensor: LazyTensor) -> Unit:
  return Unit({path: tensor}, lambda: {path: tensor.read()})


def _check_dtypes(tensors: Tensors) -> None:
  """Raises if a parameter is not floating point.

  T5X kept bfloat16 as uint16 before June 2021, and no longer reads it either.
  """
  wrong = [
    f'{path} is {tensor.dtype}'
    for path, tensor in tensors.items()
    if path.startswith(TARGET) and tensor.dtype.kind in 'biuc'
  ]
  if wrong:
    raise BadInput(f'parameters must be floating point: {", ".join(wrong)}')


def _check_moments(tensors: Tensors, source: Architecture) -> None:
  """Raises unless there are no moments, or Adafactor's for every parameter."""
  found: dict[str, dict] = {}
  for path, tensor in tensors.items():
    if path.startswith(PARAM_STATES):
      parameter, _, name = path.removeprefix(PARAM_STATES).rpartition('/')
      found.setdefault(parameter, {})[name] = tensor.shape
  if not found:
    return
  shapes = source.shapes()
  problems = [f'{p} is missing' for p in sorted(shapes.keys() - found.keys())]
  problems += [f'{p} is extra' for p in sorted(found.keys() - shapes.keys())]
  for parameter in sorted(shapes.keys() & found.keys()):
    if problem := adafactor_moments.layout_problem(found[parameter], shapes[parameter]):
      problems.append(f'{parameter} {problem}')
  if problems:
    raise BadInput(
      "the optimizer state is not that of T5X's Adafactor: " + '; '.join(problems)
    )


def convert_params(
  params: Mapping[str, Any],
  *,
  num_kv_heads: int | None,
  method: str,
  **options,
) -> dict[str, Any]:
  """Converts a tree of parameters in memory.

  Args:
    params: nested mappings down to arrays, T5X's names:
      {"decoder": {"layers_0": {"self_attention": {"key": {"kernel": [D, S*H]}}}}}.
    num_kv_heads: K for decoder self- and cross-attention; None leaves them.
    method: a name in methods.METHODS.
    **options: seed, grouping, statistics and the head counts of single kinds, as in
      `plan_conversion`.

  Returns:
    A new nested dict; changed kernels are NumPy arrays, key and value [D, K*H]; all
    other leaves are the arrays that came in.

  Raises:
    BadInput: as `plan_conversion`.

  Source: GQA paper (arXiv 2305.13245), section 2.1.
  """
  tensors = {TARGET + p: LazyTensor.of(a) for p, a in flatten(params)}
  plan = plan_conversion(tensors, num_kv_heads=num_kv_heads, method=method, **options)
  result = {p: a for unit in plan.units for p, a in unit.compute().items()}
  return unflatten({path: result[path] for path in tensors})['target']
