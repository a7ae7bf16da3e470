"""The record in a converted checkpoint: where it is from, and what it must hold.

A JSON file in the checkpoint's folder, which T5X does not look at. It allows to check,
long after, that the tensors which the conversion made are still what they were.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from typing import Any

from etils import epath

import gqa_t5x
from gqa_t5x.checkpoints.folders import open_checkpoint
from gqa_t5x.checkpoints.jobs import Job, run_jobs
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, TensorSpec
from gqa_t5x.checkpoints.tree import TARGET, Architecture, parameters
from gqa_t5x.checkpoints.writer import describe_tensor
from gqa_t5x.conversion.plan import Plan, Recipe
from gqa_t5x.errors import BadInput

NAME = 'gqa_t5x_manifest.json'
_FORMAT = 1

Specs = Mapping[str, TensorSpec]


def _fingerprint(specs: Specs) -> dict[str, Any]:
  """Tells one checkpoint's names, shapes and dtypes from another's."""
  lines = sorted(f'{p} {list(s.shape)} {s.dtype.name}\n' for p, s in specs.items())
  digest = hashlib.sha256(''.join(lines).encode()).hexdigest()
  return {'num_tensors': len(lines), 'shapes_sha256': digest}


def make_manifest(
  plan: Plan,
  *,
  source: str,
  tensors: Specs,
  step: int,
  compression: str,
  changed: Mapping[str, Mapping],
) -> dict[str, Any]:
  """What the JSON file of a conversion holds.

  Args:
    plan: the conversion.
    source: path of the checkpoint that was read, whose `tensors` and `step` follow.
    compression: a key of writer.COMPRESSORS.
    changed: path -> `writer.describe_tensor` of each tensor that is not a copy.
  """
  versions = {n: importlib.metadata.version(n) for n in ('numpy', 'tensorstore')}
  recipe = plan.recipe
  return {
    'format': _FORMAT,
    'created': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'method': _method(recipe),
    'num_kv_heads': plan.target.num_kv_heads,
    'source': {
      'path': source,
      'step': step,
      'num_kv_heads': plan.source.num_kv_heads,
      **_fingerprint(tensors),
    },
    'compression': compression,
    'versions': {
      'gqa_t5x': gqa_t5x.__version__,
      'python': platform.python_version(),
      **versions,
    },
    'architecture': dataclasses.asdict(plan.target),
    'result': _fingerprint(plan.outputs),
    'changed': dict(sorted(changed.items())),
  }


def _method(recipe: Recipe) -> dict[str, Any]:
  if recipe.refit_outputs:
    return {'name': recipe.name, 'sums': recipe.refit_outputs}
  names = ('grouping', 'seed', 'statistics')
  return {'name': recipe.name, **{name: getattr(recipe, name) for name in names}}


def _read_manifest(folder: epath.Path) -> dict[str, Any]:
  """Reads the manifest; BadInput if there is none, or it is of another version."""
  file = folder / NAME
  if not file.exists():
    raise BadInput(
      f'{folder} has no {NAME}: only what this version of gqa_t5x.convert has written'
      ' can be verified'
    )
  try:
    manifest = json.loads(file.read_bytes())
    version = manifest['format']
    missing = {'architecture', 'changed', 'method', 'result'} - manifest.keys()
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise BadInput(f'{file} is truncated or damaged: {error}') from error
  if version != _FORMAT:
    raise BadInput(
      f'{file} is of format {version}, this version of gqa_t5x reads {_FORMAT}'
    )
  if missing:
    raise BadInput(f'{file} is damaged: {", ".join(sorted(missing))} is missing')
  return manifest


def verify(folder: epath.Path) -> dict[str, Any]:
  """Compares a checkpoint with its manifest, and returns that.

  Reads every tensor that the conversion changed, and the shapes of all others.

  Raises:
    BadInput: there is no manifest, or tensors differ: it names each.
  """
  manifest = _read_manifest(folder)
  tensors = open_checkpoint(folder)
  changed = manifest['changed']
  found = run_jobs([_check_job(tensors.get(p), changed[p]) for p in changed])
  found = zip(changed, found, strict=True)
  problems = [f'{path} {problem}' for path, problem in found if problem]
  others = {p: t for p, t in tensors.items() if p not in changed}
  problems += _wrong_shapes(others, manifest, changed)
  if not problems and _fingerprint(tensors) != manifest['result']:
    problems.append(
      f'it has {len(tensors)} tensors, the manifest lists'
      f' {manifest["result"]["num_tensors"]}, or their dtypes differ'
    )
  if problems:
    raise BadInput(
      f'{folder} is not what its {NAME} says, convert again: {"; ".join(problems)}'
    )
  return manifest


def _check_job(tensor: LazyTensor | None, wanted: Mapping[str, Any]) -> Job:
  def check() -> str:
    """Says what is wrong with the tensor; "" if nothing is."""
    if tensor is None:
      return 'is missing'
    found = f'{tensor.dtype.name} {list(tensor.shape)}'
    expected = f'{wanted["dtype"]} {wanted["shape"]}'
    if found != expected:
      return f'is {found}, not {expected}'
    try:
      same = describe_tensor(tensor.read()) == wanted
    except BadInput as error:
      return f'cannot be read ({error})'
    return '' if same else 'has another checksum'

  return Job(check, 2 * math.prod(wanted['shape']) * 4)


def _wrong_shapes(others: Specs, manifest: Mapping, changed: Mapping) -> list[str]:
  """Compares the parameters that were copied with the architecture."""
  wanted = Architecture(**manifest['architecture']).shapes()
  found, changed = parameters(others), parameters(changed)
  problems = [
    f'{TARGET}{path} is missing'
    for path in sorted(wanted.keys() - found.keys() - changed.keys())
  ]
  for path in sorted(found):
    shape = tuple(found[path].shape)
    if shape != wanted.get(path):
      problems.append(f'{TARGET}{path} has shape {shape}, not {wanted.get(path)}')
  return problems
