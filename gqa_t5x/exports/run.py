"""Exports a checkpoint: finds the format, checks its options, writes whole or not."""

import inspect
import os
from collections.abc import Callable
from typing import Any

from etils import epath

from gqa_t5x import files
from gqa_t5x.errors import BadInput
from gqa_t5x.exports import ctranslate2, huggingface, stablehlo, t5x
from gqa_t5x.exports.source import open_source

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
    output: the local folder to make.
    format: a key of FORMATS.
    **options: of the format, as of its `write`; None is the default.

  Raises:
    BadInput: bad input; nothing is left behind.
  """
  write = _writer(format)
  options = {name: value for name, value in options.items() if value is not None}
  known = inspect.signature(write).parameters
  for name in options:
    if name not in known:
      raise BadInput(f'--{name} is not for --format={format}; leave it out')
  if '://' in os.fspath(output):
    raise BadInput(f'--output={output} must be a local folder; copy it afterwards')
  target = epath.Path(files.new_folder(output))
  source = open_source(epath.Path(input).expanduser())
  with files.whole_folder(target) as folder:
    write(source, folder, **options)
  print(f'{source.folder} is written to {target}, as {format}')


def _writer(format: str) -> Callable[..., None]:
  if format == 'saved_model':
    raise BadInput(_SAVED_MODEL)
  if format not in FORMATS:
    raise BadInput(f'--format={format} is unknown; choose one of {", ".join(FORMATS)}')
  return FORMATS[format]
