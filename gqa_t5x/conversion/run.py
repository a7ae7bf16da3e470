"""Converts a checkpoint from disk to disk: find, plan, check space, write, report."""

import collections
import dataclasses
import os
import re
from collections.abc import Collection, Mapping

import numpy as np
from etils import epath
from tqdm import tqdm

from gqa_t5x import files
from gqa_t5x.checkpoints import (
  config,
  folders,
  t5x_layouts,
  tokenizer_files,
  writer,
)
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, TensorSpec, Unit
from gqa_t5x.checkpoints.tree import PARAM_STATES, TARGET
from gqa_t5x.conversion import adafactor_moments, manifest
from gqa_t5x.conversion.methods import get_method
from gqa_t5x.conversion.plan import Plan, Recipe, plan_conversion
from gqa_t5x.errors import BadInput

_NO_STATE = "The checkpoint has no optimizer state: Adafactor's is added as it starts"
_LAYER = re.compile(r'layers_(\d+)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(Recipe):
  """One conversion, with the flags of `python -m gqa_t5x.convert`, which say more.

  Attributes:
    compression: a key of writer.COMPRESSORS.
    verbose: say of each kernel what became of its Adafactor moments.
  """

  input: str
  output: str | None  # None only of a dry run
  compression: str
  dry_run: bool
  verbose: bool


def convert(request: Request) -> None:
  """Converts, and prints what was done; or, of a dry run, what would be.

  Raises:
    BadInput: bad input; nothing is left behind.
  """
  get_method(request.method)
  source, step, tensors = _open_source(request)
  output = request.output and _absolute(request.output)
  if output:
    files.check_name(output)
  target = _choose_output(source, output, step) if output else None
  given = {n: getattr(request, n) for n in ('statistics', 'refit_outputs')}
  given = {name: path and str(_absolute(path)) for name, path in given.items()}
  plan = plan_conversion(tensors, dataclasses.replace(request, **given))
  if request.dry_run:
    _preview(plan, source, target, tensors)
    return
  plan = _with_optimizer_state(plan)

  model_config = folders.read_config(source)

  def write_records(folder: epath.Path, changed: writer.Changed) -> None:
    record = manifest.make_manifest(
      plan,
      source=str(source),
      tensors=tensors,
      step=step,
      compression=request.compression,
      changed=changed,
    )
    files.write_json(folder / manifest.NAME, record)
    config.write(folder, model_config)
    tokenizer_files.copy(source, folder)

  writer.check_space(target, plan.nbytes)
  with tqdm(
    total=plan.nbytes, unit='B', unit_scale=True, desc='Converting', disable=None
  ) as progress:
    writer.write_checkpoint(
      target,
      plan.units,
      progress.update,
      source=tensors,
      compression=request.compression,
      add_files=write_records,
    )
  _report(request, plan, source, target, tensors)


def _has_optimizer_state(tensors: Collection[str]) -> bool:
  return any(path.startswith(PARAM_STATES) for path in tensors)


def _with_optimizer_state(plan: Plan) -> Plan:
  """Adds the state that T5X needs to train on, where the source has none."""
  if _has_optimizer_state(plan.outputs):
    return plan
  moments = adafactor_moments.initial(plan.target.shapes())
  units = [Unit({p: t}, lambda p=p, t=t: {p: t.read()}) for p, t in moments.items()]
  return dataclasses.replace(plan, units=plan.units + units)


def verify(path: str) -> None:
  """Checks a checkpoint, or a model_dir's latest, against its manifest, and says so.

  Raises:
    BadInput: it has no manifest, or tensors differ from it.
  """
  folder = folders.find_checkpoint(_absolute(path))
  record = manifest.verify(folder)
  print(
    f'{folder} is whole: {len(record["changed"])} tensors made by'
    f' {record["method"]["name"]} have their checksums, all'
    f' {record["result"]["num_tensors"]} their shapes'
  )


def _absolute(text: str) -> epath.Path:
  """A path as T5X wants it: absolute and, if local, without symbolic links.

  A file stays under its own name: in a cache of the Hugging Face hub it is a link.
  """
  path = epath.Path(text)
  if '://' in text:
    return path
  path = path.expanduser()
  if path.is_file():
    return epath.Path(os.path.realpath(path.parent)) / path.name
  return epath.Path(os.path.realpath(path))


def _open_source(request: Request) -> tuple[epath.Path, int, dict[str, LazyTensor]]:
  """The checkpoint's folder, its step (the output's, if it has none), its tensors."""
  given = _absolute(request.input)
  source = folders.find_checkpoint(given)
  if source != given:
    print(f'Reading {source}')
  tensors = folders.open_checkpoint(source)
  if 'state/step' not in tensors:
    raise BadInput(f'{source} has no tensor state/step: it is not of T5X')
  if request.output and not folders.step_is_known(source):
    named = folders.checkpoint_step(_absolute(request.output))
    if named is not None:
      tensors['state/step'] = LazyTensor.of(np.asarray(named, np.int32))
  return source, int(tensors['state/step'].read()), tensors


def _choose_output(source: epath.Path, output: epath.Path, step: int) -> epath.Path:
  """The checkpoint folder to make, of the source's step.

  Raises:
    BadInput: it holds a checkpoint, is the input or inside of it, or its name gives
      another step.
  """
  named = folders.checkpoint_step(output)
  if source in (output, output / f'checkpoint_{step}'):
    raise BadInput(
      f'--input and --output are the same checkpoint, {source}; choose another --output'
    )
  if source in output.parents:
    raise BadInput(
      f'--output={output} is inside the input {source}; choose another --output'
    )
  if named not in (None, step):
    raise BadInput(
      f'--output names step {named}, but {source} is of step {step};'
      f' use --output={output.parent / f"checkpoint_{step}"}'
    )
  target = output if named == step else output / f'checkpoint_{step}'
  present = [] if named == step else folders.list_checkpoints(output)
  if (output / t5x_layouts.MSGPACK).exists():
    present.append(output)
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    present.append(target)
  present = [p for p in present if p != target or not writer.is_unfinished(p)]
  if present:
    raise BadInput(
      f'{present[0]} exists already; choose another --output, or delete it'
    )
  return target


# --- What is said ---------------------------------------------------------------


def _preview(
  plan: Plan,
  source: epath.Path,
  target: epath.Path | None,
  tensors: Mapping[str, TensorSpec],
) -> None:
  """Prints what --dry_run is for: what is converted, kept and dropped, and saved."""
  outputs = plan.outputs
  kept = [path for path in sorted(outputs) if outputs[path] is tensors.get(path)]
  changed = sorted(outputs.keys() - set(kept))
  print(f'Converted: {len(changed)} tensors, {_nbytes(outputs, changed):,} bytes')
  before = {p: _shape(tensors[p]) if p in tensors else 'new' for p in changed}
  _print_parameters(
    {p: f'{before[p]} -> {_shape(outputs[p])}  {plan.recipe.name}' for p in changed}
  )
  for line in _group_layers(plan.log):
    print(f'  moments of {line}')
  print(f'Kept: {len(kept)} tensors, {_nbytes(outputs, kept):,} bytes')
  _print_parameters({path: _shape(tensors[path]) for path in kept})
  if moments := sum(path.startswith(PARAM_STATES) for path in kept):
    print(f'  moments of these, {moments} tensors')
  if not _has_optimizer_state(outputs):
    print(_NO_STATE)
  print(f'Dropped: {", ".join(folders.dataset_state(source)) or "nothing"}')
  before, after = _nbytes(tensors, tensors), plan.nbytes
  print(
    f'Checkpoint: {before:,} -> {after:,} bytes uncompressed, {before - after:,} saved'
  )
  print(_describe_sizes(plan))
  if target is not None and not str(target).startswith('gs://'):
    free = writer.free_bytes(target)
    print(f'Disk at {target}: {plan.nbytes:,} bytes needed at most, {free:,} free')
  print('Nothing was written')


def _print_parameters(entries: Mapping[str, str]) -> None:
  """Prints the lines of all but Adafactor's moments."""
  shown = {p: text for p, text in entries.items() if not p.startswith(PARAM_STATES)}
  for line in _group_layers(shown):
    print(f'  {line}')


def _report(
  request: Request,
  plan: Plan,
  source: epath.Path,
  target: epath.Path,
  tensors: Mapping[str, TensorSpec],
) -> None:
  """Says what was done, and what to give to T5X."""
  if request.verbose:
    for path, note in plan.log.items():
      print(f'moments of {path}: {note}')
  done = collections.Counter(note.rpartition(', ')[2] for note in plan.log.values())
  for what, count in done.items():
    print(f'Adafactor moments of {count} kernels: {what}')
  if plan.source == plan.target and not plan.recipe.refit_outputs:
    print('It has as many key/value heads already: only the layout changed')
  if not _has_optimizer_state(tensors):
    print(_NO_STATE)
  if names := folders.dataset_state(source):
    print(f'Not copied: the state of the data pipeline ({", ".join(names)})')
  print(f'Converted by {plan.recipe.name}: {_describe_sizes(plan)}')
  print(f"INITIAL_CHECKPOINT_PATH = '{target}'")


def _describe_sizes(plan: Plan) -> str:
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


def _group_layers(entries: Mapping[str, str]) -> list[str]:
  """Joins the lines of {"decoder/layers_0/...": text} that differ in the layer only.

  Returns:
    "decoder/layers_{0..23}/...  text", in the order of their first entries.
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


def _nbytes(specs: Mapping[str, TensorSpec], paths: Collection[str]) -> int:
  return sum(specs[path].nbytes for path in paths)
