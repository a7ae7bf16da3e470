"""What all writers share: absolute paths, files that are never half-written, locks."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from gqa_t5x.errors import BadInput

_TEMPORARY = '.tmp-'


def absolute(path: str | Sequence[str], any_name: bool = False) -> str | Sequence[str]:
  """Makes a path absolute, as T5X's Orbax checkpoints need it.

  Args:
    path: from gin or the command line: local (relative to the working directory, `~`
      allowed) or `gs://...`; or an empty list, which is T5X's "no checkpoint".
    any_name: whether no checkpoint is saved or looked for there.

  Returns:
    The absolute path; an empty list stays one.

  Raises:
    BadInput: if the path is an empty string, or one that `check_name` refuses.
  """
  if path == '':
    raise BadInput('A path in the gin configuration is empty; give a folder.')
  if not isinstance(path, str):
    return path
  if '://' not in path:
    path = str(epath.Path(path).expanduser().absolute())
  if not any_name:
    check_name(path)
  return path


def check_name(path: epath.PathLike) -> None:
  """Raises BadInput for an absolute path that Orbax takes for a pattern.

  It looks for a checkpoint's parts by `glob`, of a path that is not escaped: in a
  folder such as `run [v2]` it finds none, and what it saved is lost.
  """
  if found := sorted(set('[]*?') & set(os.fspath(path))):
    raise BadInput(
      f'{path} has {" and ".join(found)} in its name, which the library that saves'
      ' checkpoints takes for a pattern: nothing would be found again. Choose another'
      ' name.'
    )


@contextlib.contextmanager
def whole(path: epath.PathLike) -> Iterator[epath.Path]:
  """Lets the caller write a file under a temporary name, and renames it at the end.

  A process that is killed leaves the old file, and perhaps the temporary one, which the
  next one overwrites.

  Args:
    path: the file, local or gs://; its folder is made.

  Yields:
    The temporary path, in the same folder and of the same suffix. It is removed if the
    caller raises.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(_TEMPORARY + path.name)
  try:
    yield temporary
    temporary.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


def write_text(path: epath.PathLike, text: str) -> None:
  """Writes a text file, local or gs://, whole or not at all."""
  with whole(path) as temporary:
    temporary.write_text(text)


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes a JSON file, local or gs://, whole or not at all."""
  write_text(path, json.dumps(value, indent=1) + '\n')


def check_folders_of(*paths: str | None) -> None:
  """Raises BadInput if the folder of a local file does not exist.

  Commands that write files at the end of a computation call this before it.
  """
  for path in filter(None, paths):
    if '://' not in path and not epath.Path(path).absolute().parent.is_dir():
      raise BadInput(f'{path}: there is no such folder.')


def lock(path: epath.PathLike) -> int | None:
  """Locks a local file or folder, until this process and its children have ended.

  Args:
    path: a file, made if it is missing, or an existing folder.

  Returns:
    The open descriptor, which holds the lock until it is closed (children that inherit
    it hold it, too); None if another process holds the lock.
  """
  flags = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT
  descriptor = os.open(path, flags, 0o666)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(descriptor)
    return None
  return descriptor
