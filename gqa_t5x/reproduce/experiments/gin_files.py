"""Reads plain values from gin files, so that no number of a run stands twice."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import gqa_t5x
from gin import config_parser
from gqa_t5x.errors import BadInput


def macro(gin_file: str, name: str) -> Any:
  """Returns the value of a macro that a gin file, or one that it includes, sets.

  Raises:
    BadInput: no file sets it to a number, string, list or dict.
  """
  try:
    return macros(gin_file)[name]
  except KeyError:
    raise BadInput(f'{gin_file} does not set {name}.') from None


@functools.cache
def macros(gin_file: str) -> Mapping[str, Any]:
  """Returns the plain macros of a gin file and its includes; the last one counts.

  Args:
    gin_file: path below the gin search path, e.g. 'gin/local/pretrain_mha.gin'.
  """
  return parse((pathlib.Path(gqa_t5x.gin_search_path()) / gin_file).read_text('utf-8'))


def parse(text: str) -> dict[str, Any]:
  """Returns the plain macros of gin's text: those that refer to nothing else.

  Gin's own parser, without what its statements import: that would be TensorFlow.

  Args:
    text: of a gin file, or the operative configuration that T5X writes.

  Raises:
    SyntaxError: it is no gin.
  """
  values: dict[str, Any] = {}
  references = _References()
  parser = config_parser.ConfigParser(text, references)
  while statement := parser.parse_statement():
    if isinstance(statement, config_parser.IncludeStatement):
      values |= macros(statement.filename)
    elif isinstance(statement, config_parser.BindingStatement):
      name, is_macro = statement.selector, not statement.arg_name
      if is_macro and references.met:
        values.pop(name, None)
      elif is_macro:
        values[name] = statement.value
    references.met = False
  return values


class _References(config_parser.ParserDelegate):
  """Notes that a value refers to a function or to another macro."""

  met = False

  def configurable_reference(self, scoped_configurable_name, evaluate):
    self.met = True

  def macro(self, macro_name):
    self.met = True
