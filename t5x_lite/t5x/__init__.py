"""The stand-in for T5X: the part of its API that gqa_t5x uses (see README.md)."""

import importlib

from t5x.version import __version__ as __version__


def __getattr__(name: str):
  """Imports a submodule at its first use, so that `import t5x` stays fast."""
  try:
    return importlib.import_module(f't5x.{name}')
  except ModuleNotFoundError as e:
    raise AttributeError(
      f"module 't5x' has no attribute {name!r}; this is the stand-in (0.0.0+lite), "
      'which holds a part of T5X only'
    ) from e
