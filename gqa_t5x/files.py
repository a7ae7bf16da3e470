"""What all writers share: absolute paths, files that are never half-written, locks."""

import contextlib
import fcntl
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from gqa_t5x.errors import BadInput

_TEMPORARY = '.tmp-'
_FOLDER_SUFFIX = '.tmp-convert'
_POINTER = b'version https://git-lfs'


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
  if not _is_remote(path):
    path = str(epath.Path(path).expanduser().absolute())
  if not any_name:
    check_name(path)
  return path


def check_name(path: epath.PathLike) -> None:
  """Raises BadInput for an absolute path that libraries of checkpoints misread.

  Orbax looks for a checkpoint's parts by `glob`, of a path that is not escaped: in a
  folder such as `run [v2]` it finds none, and what it saved is lost. TensorStore takes
  names for UTF-8, whatever the locale says.
  """
  if found := sorted(set('[]*?') & set(os.fspath(path))):
    raise BadInput(
      f'{path} has {" and ".join(found)} in its name, which the library that saves'
      ' checkpoints takes for a pattern: nothing would be found again. Choose another'
      ' name.'
    )
  if not os.fspath(path).isascii() and sys.getfilesystemencoding() != 'utf-8':
    raise BadInput(
      f'{path} has other characters than ASCII, and the locale is not UTF-8; set'
      ' PYTHONUTF8=1, or choose another name.'
    )


@contextlib.contextmanager
def whole(path: epath.PathLike) -> Iterator[epath.Path]:
  """Lets the caller write a file under a temporary name, and renames it at the end.

  A process that is killed leaves the old file, and perhaps the temporary one, which the
  next one overwrites. A link stays, and the file that it leads to is replaced. What is
  no file (a device, a pipe) is given the bytes at the end.

  Args:
    path: the file, local or gs://; its folder is made.

  Yields:
    The temporary path, of the same suffix. It is removed if the caller raises.
  """
  if is_stream(path):
    with tempfile.TemporaryDirectory() as folder:
      temporary = epath.Path(folder) / epath.Path(path).name
      yield temporary
      _send(temporary.read_bytes(), path)
    return
  path = epath.Path(path if _is_remote(path) else os.path.realpath(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(_TEMPORARY + path.name)
  try:
    yield temporary
    temporary.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def whole_folder(path: epath.Path) -> Iterator[epath.Path]:
  """Lets the caller fill a local folder under a temporary name, renamed at the end.

  A process that is killed leaves the temporary folder, which the next one empties.

  Args:
    path: the folder to make; its parents are made, and it may exist if it is empty.

  Yields:
    The temporary folder beside it, empty. It is removed if the caller raises.

  Raises:
    BadInput: another process is writing it.
  """
  folder = path.parent / (path.name + _FOLDER_SUFFIX)
  made = [p for p in path.parents if not p.exists()]
  locked = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    locked = lock(folder)
    if locked is None:
      raise BadInput(
        f'another process is writing {folder}; wait for it, or choose another --output'
      )
    remove_contents(folder)
    yield folder
    os.sync()  # or the rename might survive a power cut that the tensors do not
    os.rename(folder, path)  # epath's refuses an empty folder at `path`
  except BaseException:
    # Without the lock the folder is not ours.
    if locked is not None:
      folder.rmtree(missing_ok=True)
    for parent in made:
      with contextlib.suppress(OSError):
        os.rmdir(parent)
    raise
  finally:
    if locked is not None:
      os.close(locked)


def remove_contents(folder: epath.Path) -> None:
  """Clears what a killed run left behind."""
  for entry in folder.iterdir():
    if entry.is_dir():
      entry.rmtree()
    else:
      entry.unlink()


def new_folder(path: epath.PathLike) -> str:
  """The absolute path, local or gs://, of a folder to make.

  Raises:
    BadInput: there is something already, other than an empty folder.
  """
  target = epath.Path(absolute(os.fspath(path), any_name=True))
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise BadInput(f'{target} exists already; choose another, or delete it')
  return str(target)


def _send(data: bytes, path: epath.PathLike) -> None:
  sys.stdout.flush()  # What was printed before comes before.
  own = _own_output(path)
  try:
    with open(path if own is None else own, 'wb', closefd=own is None) as file:
      file.write(data)
  except OSError as error:  # It does not name the file.
    raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def is_stream(path: epath.PathLike) -> bool:
  """Whether a path leads to a device or a pipe, or is where this process prints to."""
  if _is_remote(path) or not os.path.exists(path) or os.path.isdir(path):
    return False
  return not stat.S_ISREG(os.stat(path).st_mode) or _own_output(path) is not None


def _own_output(path: epath.PathLike) -> int | None:
  """The descriptor of standard output or error, if that is what `path` leads to."""
  for descriptor in (1, 2):
    with contextlib.suppress(OSError):  # It is closed.
      if os.path.samestat(os.fstat(descriptor), os.stat(path)):
        return descriptor
  return None


def _is_remote(path: epath.PathLike) -> bool:
  return '://' in os.fspath(path)


def write_text(path: epath.PathLike, text: str) -> None:
  """Writes a text file, local or gs://, whole or not at all."""
  with whole(path) as temporary:
    temporary.write_bytes(text.encode())


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes a JSON file, local or gs://, whole or not at all."""
  write_text(path, json.dumps(value, indent=1) + '\n')


def refuse_pointer(path: epath.Path) -> None:
  """Raises BadInput if a file is what Git LFS leaves in the place of a large one."""
  with path.open('rb') as file:
    if file.read(len(_POINTER)) == _POINTER:
      raise BadInput(
        f'{path} is a pointer of Git LFS, not the file; get that: git lfs pull'
      )


def check_outputs(*paths: str | None, make_folders: bool = False) -> None:
  """Raises BadInput for local files that cannot be written.

  Commands that write files at the end of a computation call this before it.

  Args:
    *paths: as given by the user; None where no file is wanted.
    make_folders: whether a folder that is missing will be made.
  """
  for path in paths:
    if path is None or _is_remote(path):
      continue
    if not path or os.path.isdir(path):
      raise BadInput(f'{path!r} is {"a folder" if path else "empty"}; name a file.')
    place = path
    if not is_stream(path):
      place = os.path.dirname(os.path.realpath(path))
      while make_folders and not os.path.exists(place):
        place = os.path.dirname(place)
      if not os.path.isdir(place):
        raise BadInput(f'{path}: there is no such folder.')
    if not os.access(place, os.W_OK):
      raise BadInput(f'{path}: no permission to write to {place}.')


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
