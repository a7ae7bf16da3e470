"""Paths as T5X needs them: its Orbax checkpoints refuse relative ones."""

from collections.abc import Sequence

from etils import epath


def absolute(path: str | Sequence[str]) -> str | Sequence[str]:
  """Returns a path from gin or the command line as an absolute one.

  Args:
    path: local (relative to the working directory, `~` allowed) or `gs://...`; or an
      empty list, T5X's way to say "no checkpoint".

  Returns:
    The absolute path; an empty list stays one.

  Raises:
    ValueError: if the path is an empty string.
  """
  if path == '':
    raise ValueError('A path in the gin configuration is empty; give a folder.')
  if not isinstance(path, str) or '://' in path:
    return path
  return str(epath.Path(path).expanduser().absolute())
