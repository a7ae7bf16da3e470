"""Turns the tree of a whole model: which tensors change, how, and what they become.

`plan_conversion` looks at shapes only and finds every fault before a byte is read; the
plan's units then do the work one attention module at a time. `convert_params` is the
same thing for a tree that is in memory.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gqa_t5x.checkpoints import tree
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, TensorSpec, Unit
from gqa_t5x.conversion import (
  adafactor_moments,
  input_statistics,
  methods,
  output_refit,
  units,
)
from gqa_t5x.conversion.kernels import AttentionModule
from gqa_t5x.conversion.units import Tensors
from gqa_t5x.errors import BadInput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """How many key/value heads each kind of attention gets, and how.

  Attributes:
    num_kv_heads: of decoder self- and cross-attention; None leaves them.
    self_attention_num_kv_heads: of decoder self-attention alone.
    cross_attention_num_kv_heads: of cross-attention alone.
    encoder_num_kv_heads: of the encoder; None leaves it.
    kv_head_dim: size of the decoder's key/value heads; None: the head size, or what a
      checkpoint of the latent form has.
    method: a key of methods.METHODS.
    grouping: "contiguous", or "similarity": heads are reordered, but for those of
      self-attention where one position bias, which tells them apart, serves all layers.
    statistics: file of `python -m gqa_t5x.calibrate`, for methods that use statistics
      of the modules' inputs; None: the scales of the layer norms in front of a module
      stand in, as if its inputs were white before them.
    seed: for methods that draw random numbers.
    refit_outputs: file of output sums of `python -m gqa_t5x.calibrate`. With it the
      output kernels are all that changes, and nothing else of this is given.
  """

  num_kv_heads: int | None = None
  self_attention_num_kv_heads: int | None = None
  cross_attention_num_kv_heads: int | None = None
  encoder_num_kv_heads: int | None = None
  kv_head_dim: int | None = None
  method: str = 'mean'
  grouping: str = 'contiguous'
  statistics: str | None = None
  seed: int = 0
  refit_outputs: str | None = None

  @property
  def name(self) -> str:
    """What is done, in a word."""
    return 'refit_outputs' if self.refit_outputs else self.method


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
      method that uses none, heads that do not divide or of a size that cannot be,
      parameters that are not floating point, or a tree that is not a T5's (every
      missing, extra and mismatched key is listed).

  Source: GQA paper (arXiv 2305.13245), sections 2.1 and 2.2.
  """
  statistics = _open_statistics(recipe)
  source = _read_source(tensors)
  if recipe.refit_outputs:
    return _plan_refit(tensors, recipe, source)
  new_heads = _choose_num_kv_heads(source, recipe)
  kv_head_dim = _choose_kv_head_dim(source, new_heads, recipe)
  if statistics and kv_head_dim:
    statistics.check_tokens(kv_head_dim, f'kv_head_dim={kv_head_dim}')
  target = dataclasses.replace(source, num_kv_heads=new_heads, kv_head_dim=kv_head_dim)
  work, log, shapes = [], {}, target.shapes()
  checked = {path: tensor.checked(path) for path, tensor in tensors.items()}
  for kind, path in source.attention_modules():
    before, after = (
      (model.num_kv_heads[kind], model.kv_size(kind)) for model in (source, target)
    )
    if before == after:
      continue
    module = AttentionModule(
      path=path,
      source_num_kv_heads=source.num_kv_heads[kind],
      num_kv_heads=new_heads[kind],
      head_dim=source.head_dim,
      seed=recipe.seed,
      kv_head_dim=target.kv_size(kind),
    )
    bias = None if kind == 'cross_attention' else source.bias_path(path)
    may_reorder = bias is None or source.bias_per_layer
    reorder = may_reorder and recipe.grouping == 'similarity'
    bias = bias if reorder else None
    spec = units.ModuleSpec(module, kind, recipe.method, reorder, bias)
    unit, notes = units.convert_module(checked, spec, statistics, shapes)
    work.append(unit)
    log |= notes
  return Plan(recipe, source, target, work + _copies(tensors, work), log)


def _plan_refit(tensors: Tensors, recipe: Recipe, source: tree.Architecture) -> Plan:
  """Plans to change the output kernels alone, of the modules that have sums."""
  sums, shapes = output_refit.open_sums(recipe.refit_outputs), source.shapes()
  checked = {path: tensor.checked(path) for path, tensor in tensors.items()}
  work, log = [], {}
  for module in sums.modules:
    if f'{module}/out/kernel' not in shapes:
      raise BadInput(
        f'{sums.path} has sums of {module}, which is not in this checkpoint: they are'
        ' of another one'
      )
    unit, notes = units.refit_outputs(checked, module, sums, shapes)
    work.append(unit)
    log |= notes
  return Plan(recipe, source, source, work + _copies(tensors, work), log)


def _copies(tensors: Tensors, work: list[Unit]) -> list[Unit]:
  changed = {path for unit in work for path in unit.outputs}
  return [units.copy(p, t) for p, t in tensors.items() if p not in changed]


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


def _choose_kv_head_dim(
  source: tree.Architecture, new_heads: Mapping[str, int], recipe: Recipe
) -> int | None:
  """R of the decoder, None for the head size; BadInput if it cannot be made."""
  R, H = recipe.kv_head_dim, source.head_dim
  kinds = ('self_attention', 'cross_attention')
  if source.kv_head_dim is not None:
    others = any(new_heads[kind] != source.num_kv_heads[kind] for kind in kinds)
    if others or R not in (None, source.kv_head_dim):
      heads = ' and '.join(str(source.num_kv_heads[kind]) for kind in kinds)
      raise BadInput(
        f'the checkpoint is of the latent form: {heads} key/value heads of'
        f' {source.kv_head_dim} numbers in self- and cross-attention, and those cannot'
        ' become others; convert the one that it was made from'
      )
    return source.kv_head_dim
  if R in (None, H):
    return None
  if not methods.get_method(recipe.method).any_size:
    makers = ', '.join(name for name, m in methods.METHODS.items() if m.any_size)
    raise BadInput(
      f'kv_head_dim={R} is not the head size, {H}, and method={recipe.method} makes'
      f' heads of that size alone; choose method={makers}, or leave kv_head_dim out'
    )
  if recipe.grouping != 'contiguous':
    raise BadInput(
      f'grouping={recipe.grouping} is for heads of the head size, {H}; leave it out, or'
      f' leave kv_head_dim={R} out'
    )
  for kind in kinds:
    G = source.num_kv_heads[kind] // new_heads[kind]
    if not isinstance(R, int) or not 1 <= R <= G * H:
      raise BadInput(
        f'kv_head_dim={R} must be a whole number from 1 to {G * H}: in'
        f' {kind.replace("_", "-")} a new head stands for {G} of {H} numbers each'
      )
  return R


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
    A new nested dict; changed kernels are NumPy arrays, key and value [D, K*H] or, of
    the latent form, [D, K*R]; all other leaves are the arrays that came in.
  """
  tensors = {tree.TARGET + p: LazyTensor.of(a) for p, a in tree.flatten(params)}
  plan = plan_conversion(tensors, Recipe(**recipe))
  result = {p: a for unit in plan.units for p, a in unit.compute().items()}
  paths = dict.fromkeys((*tensors, *result))  # New ones come last.
  return tree.unflatten({path: result[path] for path in paths})['target']
