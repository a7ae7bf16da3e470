"""Reads English text out of installed Python sources, without importing any of them.

A source is `TOPICS` (the help topics of `pydoc`), `STDLIB` (the docstrings of the
standard library) or the name of an installed package (its docstrings).
"""

import ast
import contextlib
import gc
import importlib.util
import inspect
import pathlib
import sysconfig
import warnings
from collections.abc import Iterator

MIN_CHARS = 80
TOPICS = 'topics'  # the source that is `pydoc_data.topics`
STDLIB = 'stdlib'  # the source that is the whole standard library

_SKIPPED_FOLDERS = {
  *('test', 'tests', 'idlelib', 'lib2to3', 'turtledemo'),
  *('site-packages', 'dist-packages', '_vendor', '_api', '__pycache__'),
}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Control characters but for tab and line feed: they would break the line format.
_CONTROL = dict.fromkeys(i for i in (*range(32), 127) if i not in (9, 10))


def package_folder(package: str) -> pathlib.Path | None:
  """Finds a package's folder without importing it; None where it is not installed."""
  spec = importlib.util.find_spec(package)
  locations = list(spec.submodule_search_locations or ()) if spec else []
  return pathlib.Path(locations[0]) if locations else None


def clean(text: str) -> str:
  """Removes a docstring's indentation, trailing blanks and control characters.

  What is left can be encoded as UTF-8, with line feeds for line breaks.
  """
  text = text.encode('utf-8', 'ignore').decode('utf-8')
  text = text.replace('\r\n', '\n').replace('\r', '\n')
  lines = inspect.cleandoc(text).translate(_CONTROL).split('\n')
  return '\n'.join(line.rstrip() for line in lines).strip()


def docstrings(source: bytes | str) -> list[str]:
  """Returns the cleaned docstrings of a Python file's content, in its order.

  Those of nested functions and classes, too; none if this Python cannot parse it.
  """
  try:
    stack = [ast.parse(source)]
  except (SyntaxError, ValueError, RecursionError):
    return []
  texts = []
  while stack:
    node = stack.pop()
    if isinstance(node, _DOCUMENTED):
      texts.append(clean(ast.get_docstring(node, clean=False) or ''))
    # Only statements can hold a definition: leaving out the expressions, the bulk of
    # a tree, halves the time.
    for field in ('finalbody', 'orelse', 'handlers', 'cases', 'body'):
      children = getattr(node, field, None)
      if isinstance(children, list):
        stack.extend(reversed(children))
  return [text for text in texts if text]


def topics(source: bytes | str) -> list[str]:
  """Returns the cleaned values of the dict that `pydoc_data/topics.py` assigns."""
  for node in ast.parse(source).body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
      return [clean(text) for text in ast.literal_eval(node.value).values()]
  return []


def collect(source: str) -> list[str]:
  """Returns the cleaned texts of a source, of at least `MIN_CHARS` characters.

  Duplicates are included; a package that is not installed has none.
  """
  stdlib = pathlib.Path(sysconfig.get_paths()['stdlib'])
  if source == TOPICS:
    folder, paths, parse = stdlib, [stdlib / 'pydoc_data' / 'topics.py'], topics
  else:
    folder = stdlib if source == STDLIB else package_folder(source)
    paths, parse = sorted(folder.rglob('*.py')) if folder else [], docstrings
  texts = []
  with _fast_parsing():
    for path in paths:
      if path.is_file() and not _is_test(path.relative_to(folder)):
        texts += parse(path.read_bytes())
  return [text for text in texts if len(text) >= MIN_CHARS]


def _is_test(path: pathlib.Path) -> bool:
  in_skipped = not _SKIPPED_FOLDERS.isdisjoint(path.parts)
  return in_skipped or path.stem.startswith('test_') or path.stem.endswith('_test')


@contextlib.contextmanager
def _fast_parsing() -> Iterator[None]:
  """Silences warnings of foreign sources; trees have no cycles, so no collector."""
  enabled = gc.isenabled()
  gc.disable()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    if enabled:
      gc.enable()
