"""gqa_t5x: grouped-query attention for T5, on T5X."""

import pathlib

__version__ = '0.1.0'


def gin_search_path() -> str:
  """Returns the folder that holds `gin/`: for T5X's flag --gin_search_paths.

  That is the repository in a checkout, and this package where pip installed it.
  """
  package = pathlib.Path(__file__).parent
  return str(package if (package / 'gin').is_dir() else package.parent)
