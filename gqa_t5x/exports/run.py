"""Exports a checkpoint: finds the format, checks its options, writes whole or not."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from gqa_t5x import files
from gqa_t5x.errors import BadInput
from gqa_t5x.exports import ctranslate2, huggingface, stablehlo, t5x
from gqa_t5x.exports.source import Source, open_source

# Format -> what fills the folder: its named arguments are the format's options.
FORMATS: dict[str, Callable[..., None]] = {
  'ctranslate2': ctranslate2.write,
  'huggingface': huggingface.write,
  'stablehlo': stablehlo.write,
  't5x': t5x.write,
}
_SAVED_MODEL = (
  'saved_model is written by T5X itself: python -m t5x.export, with'
  ' gin/runs/export.gin (docs/export.md)'
)


def export(
  input: epath.PathLike, output: epath.PathLike, format: str, **options: Any
) -> None:
  """Writes a checkpoint in the format of another program.

  Args:
    input: a checkpoint folder of T5X or Hugging Face, or a model_dir; local or gs://.
    output, format, **options: as of `write`.

  Raises:
    BadInput: bad input; nothing is left behind.
  """
  _check(output, format, options)
  write(open_source(epath.Path(input).expanduser()), output, format, **options)


def write(source: Source, output: epath.PathLike, format: str, **options: Any) -> None:
  """Writes a model in the format of another program, and says so.

  Args:
    source: the model.
    output: the local folder to make.
    format: a key of FORMATS.
    **options: of the format, as of its `write`; None is the default.

  Raises:
    BadInput: bad input; nothing is left behind.
  """
  target, options = _check(output, format, options)
  params = {path: tensor.checked(path) for path, tensor in source.params.items()}
  source = dataclasses.replace(source, params=params)
  with files.whole_folder(target) as folder:
    FORMATS[format](source, folder, **options)
  print(f'{source.name} is written to {target}, as {format}')


def _check(
  output: epath.PathLike, format: str, options: Mapping[str, Any]
) -> tuple[epath.Path, dict[str, Any]]:
  """The folder to make, and the options that are given; BadInput for bad ones."""
  if format == 'saved_model':
    raise BadInput(_SAVED_MODEL)
  if format not in FORMATS:
    raise BadInput(f'--format={format} is unknown; choose one of {", ".join(FORMATS)}')
  given = {name: value for name, value in options.items() if value is not None}
  known = inspect.signature(FORMATS[format]).parameters
  for name in given:
    if name not in known or name in ('source', 'folder'):
      raise BadInput(f'--{name} is not for --format={format}; leave it out')
  if '://' in os.fspath(output):
    raise BadInput(f'--output={output} must be a local folder; copy it afterwards')
  return epath.Path(files.new_folder(output)), given
