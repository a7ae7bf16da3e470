"""Turns the tree of a whole model: which tensors change, how, and what they become.

`plan_conversion` looks at shapes only and finds every fault before a byte is read; the
plan's units then do the work one attention module at a time. `convert_params` is the
same thing for a tree that is in memory.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gqa_t5x.checkpoints import tree
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, TensorSpec, Unit
from gqa_t5x.conversion import adafactor_moments, input_statistics, methods
from gqa_t5x.conversion.kernels import ALL_KERNELS, AttentionModule
from gqa_t5x.errors import BadInput

Tensors = Mapping[str, LazyTensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """How many key/value heads each kind of attention gets, and how.

  Attributes:
    num_kv_heads: of decoder self- and cross-attention; None leaves them.
    self_attention_num_kv_heads: of decoder self-attention alone.
    cross_attention_num_kv_heads: of cross-attention alone.
    encoder_num_kv_heads: of the encoder; None leaves it.
    method: a key of methods.METHODS.
    grouping: "contiguous", or "similarity": heads are reordered, but for those of
      self-attention where one position bias, which tells them apart, serves all layers.
    statistics: file of `python -m gqa_t5x.calibrate`, for methods that use statistics
      of the modules' inputs; None: the scales of the layer norms in front of a module
      stand in, as if its inputs were white before them.
    seed: for methods that draw random numbers.
  """

  num_kv_heads: int | None = None
  self_attention_num_kv_heads: int | None = None
  cross_attention_num_kv_heads: int | None = None
  encoder_num_kv_heads: int | None = None
  method: str = 'mean'
  grouping: str = 'contiguous'
  statistics: str | None = None
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
  """A conversion of the model `source` to `target`, ready to run.

  Attributes:
    units: the work; their outputs together are the whole new checkpoint.
    log: path of each changed kernel -> what is done to its moments.
  """

  recipe: Recipe
  source: tree.Architecture
  target: tree.Architecture
  units: list[Unit]
  log: dict[str, str]

  @property
  def outputs(self) -> dict[str, TensorSpec]:
    """The tensors of the result, by path; one that is copied is the source's own."""
    return {path: spec for unit in self.units for path, spec in unit.outputs.items()}

  @property
  def nbytes(self) -> int:
    """Bytes of the result, uncompressed."""
    return sum(unit.nbytes for unit in self.units)


def plan_conversion(tensors: Tensors, recipe: Recipe) -> Plan:
  """Plans the conversion of a checkpoint; nothing but names and shapes is read.

  Args:
    tensors: by path; "target/decoder/..." are the parameters,
      "state/param_states/decoder/.../v_row" Adafactor's moments (all or none), anything
      else is copied.
    recipe: what is to become of the heads.

  Raises:
    BadInput: unknown method or grouping, statistics of another model or for a
      method that uses none, heads that do not divide, parameters that are not floating
      point, or a tree that is not a T5's (every missing, extra and mismatched key
      is listed).

  Source: GQA paper (arXiv 2305.13245), sections 2.1 and 2.2.
  """
  statistics = _open_statistics(recipe)
  source = _read_source(tensors)
  new_heads = _choose_num_kv_heads(source, recipe)
  target = dataclasses.replace(source, num_kv_heads=new_heads)
  units, log, shapes = [], {}, target.shapes()
  checked = {path: tensor.checked(path) for path, tensor in tensors.items()}
  for kind, path in source.attention_modules():
    if new_heads[kind] == source.num_kv_heads[kind]:
      continue
    module = AttentionModule(
      path=path,
      source_num_kv_heads=source.num_kv_heads[kind],
      num_kv_heads=new_heads[kind],
      head_dim=source.head_dim,
      seed=recipe.seed,
    )
    bias = None if kind == 'cross_attention' else source.bias_path(path)
    may_reorder = bias is None or source.bias_per_layer
    reorder = may_reorder and recipe.grouping == 'similarity'
    spec = _ModuleSpec(module, kind, recipe, reorder, bias if reorder else None)
    unit, notes = _module_unit(checked, spec, statistics, shapes)
    units.append(unit)
    log |= notes
  changed = {path for unit in units for path in unit.outputs}
  copied = [_copy_unit(p, t) for p, t in tensors.items() if p not in changed]
  return Plan(recipe, source, target, units + copied, log)


def _open_statistics(recipe: Recipe) -> input_statistics.StatisticsFile | None:
  """Looks method and grouping up; opens the statistics, if they are used."""
  method, statistics = methods.get_method(recipe.method), recipe.statistics
  methods.check_grouping(recipe.grouping)
  if not statistics:
    return None
  if not method.uses_inputs and recipe.grouping != 'similarity':
    users = ', '.join(name for name, m in methods.METHODS.items() if m.uses_inputs)
    raise BadInput(
      f'statistics={statistics} was given, but method={recipe.method} uses none; leave'
      f' it out, or choose one of {users}'
    )
  return input_statistics.open_statistics(statistics)


def _choose_num_kv_heads(source: tree.Architecture, recipe: Recipe) -> dict[str, int]:
  """K by kind of attention; BadInput if it does not divide the heads there are."""
  chosen = {}
  for kind, heads in source.num_kv_heads.items():
    name = f'{kind}_num_kv_heads'
    wish = getattr(recipe, name)
    if wish is None and kind != 'encoder':
      name, wish = 'num_kv_heads', recipe.num_kv_heads
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


@dataclasses.dataclass(frozen=True)
class _ModuleSpec:
  """What becomes of one attention module.

  Attributes:
    reorder: whether its heads are reordered, and with them its position bias, the
      parameter `bias`, if it has one of its own.
  """

  module: AttentionModule
  kind: str
  recipe: Recipe
  reorder: bool
  bias: str | None


def _module_unit(
  tensors: Tensors,
  spec: _ModuleSpec,
  statistics: input_statistics.StatisticsFile | None,
  shapes: Shapes,
) -> tuple[Unit, dict[str, str]]:
  """The work on one attention module: its kernels and their Adafactor moments.

  Args:
    shapes: of all parameters after the conversion.

  Returns:
    The unit, and path of each changed kernel -> what is done to its moments.
  """
  module, recipe, reorder = spec.module, spec.recipe, spec.reorder
  method = methods.METHODS[recipe.method]
  names = ALL_KERNELS if reorder else method.kernels
  rule = 'reset' if reorder else method.adafactor
  uses_inputs = reorder or method.uses_inputs
  paths = {name: f'{module.path}/{name}/kernel' for name in names}
  paths |= {'bias': spec.bias} if spec.bias else {}
  if uses_inputs and statistics:
    statistics.check(module.path, width=shapes[paths['query']][0])
  outputs, notes = {}, {}
  for path in paths.values():
    dtype = _at_least_float32(tensors[tree.TARGET + path].dtype)
    outputs[tree.TARGET + path] = TensorSpec(shapes[path], dtype)
    if moments := _adafactor_moments(tensors, path):
      old = {n: moment.shape for n, moment in moments.items()}
      new = adafactor_moments.converted_shapes(old, shapes[path])
      specs = {n: TensorSpec(new[n], moments[n].dtype) for n in moments}
      outputs |= _in_state(path, specs)
      notes[path] = adafactor_moments.describe(old, new, rule)

  def compute():
    kernels = {name: tensors[tree.TARGET + p].read() for name, p in paths.items()}
    kernels = {n: k.astype(_at_least_float32(k.dtype)) for n, k in kernels.items()}
    inputs = None
    if uses_inputs and statistics:
      inputs = statistics.read(module.path)
    elif uses_inputs:
      inputs = input_statistics.from_norms(tensors, spec.kind, module.path)
    grouping = 'similarity' if reorder else 'contiguous'
    new = methods.convert_module(kernels, module, recipe.method, inputs, grouping)
    results = {tree.TARGET + path: new[name] for name, path in paths.items()}
    for name, path in paths.items():
      if moments := _adafactor_moments(tensors, path):
        converted = adafactor_moments.convert_moments(
          {n: moment.read() for n, moment in moments.items()},
          module,
          kernels[name].shape,
          shapes[path],
          rule,
        )
        results |= _in_state(path, converted)
    return results

  return Unit(outputs, compute), notes


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


def _copy_unit(path: str, tensor: LazyTensor) -> Unit:
  return Unit({path: tensor}, lambda: {path: tensor.checked(path).read()})


def _read_source(tensors: Tensors) -> tree.Architecture:
  """Reads the sizes of the model, and checks that all of it can be converted."""
  params = tree.parameters(tensors)
  source = tree.read_architecture({path: t.shape for path, t in params.items()})
  # T5X kept bfloat16 as uint16 before June 2021, and no longer reads it either.
  wrong = [
    f'{tree.TARGET}{path} is {tensor.dtype}'
    for path, tensor in params.items()
    if tensor.dtype.kind in 'biuc'
  ]
  if wrong:
    raise BadInput(f'parameters must be floating point: {", ".join(wrong)}')
  _check_moments(tensors, source)
  return source


def _check_moments(tensors: Tensors, source: tree.Architecture) -> None:
  """Raises unless there are no moments, or Adafactor's for every parameter."""
  found: dict[str, dict] = {}
  for path, tensor in tensors.items():
    if path.startswith(tree.PARAM_STATES):
      parameter, _, name = path.removeprefix(tree.PARAM_STATES).rpartition('/')
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


def convert_params(params: Mapping[str, Any], **recipe) -> dict[str, Any]:
  """Converts a tree of parameters in memory.

  Args:
    params: nested mappings down to arrays, T5X's names:
      {"decoder": {"layers_0": {"self_attention": {"key": {"kernel": [D, S*H]}}}}}.
    **recipe: as of a Recipe.

  Returns:
    A new nested dict; changed kernels are NumPy arrays, key and value [D, K*H]; all
    other leaves are the arrays that came in.
  """
  tensors = {tree.TARGET + p: LazyTensor.of(a) for p, a in tree.flatten(params)}
  plan = plan_conversion(tensors, Recipe(**recipe))
  result = {p: a for unit in plan.units for p, a in unit.compute().items()}
  return tree.unflatten({path: result[path] for path in tensors})['target']
