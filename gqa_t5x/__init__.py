"""gqa_t5x: grouped-query attention for T5, on T5X.

  import gqa_t5x
  model = gqa_t5x.load('flan-t5-base')

needs JAX and Flax alone; docs/python.md tells more.
"""

import pathlib
from typing import Any

__version__ = '0.1.0'
__all__ = ['Model', 'load']


def __getattr__(name: str) -> Any:
  """Imports the Python API when it is used: commands need not wait for JAX."""
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from gqa_t5x.inference import load, model

  return {'Model': model.Model, 'load': load.load}[name]


def gin_search_path() -> str:
  """Returns the folder that holds `gin/`: for T5X's flag --gin_search_paths.

  That is the repository in a checkout, and this package where pip installed it.
  """
  package = pathlib.Path(__file__).parent
  return str(package if (package / 'gin').is_dir() else package.parent)
