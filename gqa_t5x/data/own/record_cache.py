"""Users' files as TFRecords: read, checked and split once, then kept.

A source of `tf.data` must be able to go on where a checkpoint left it, bit for bit, and
a generator in Python cannot. So the records are written once as TFRecord files, a file
for each file and split, which `tf.data` reads without Python. It takes as much disk as
the texts, and finds what is unreadable before the first step.

What is kept has a folder of its own, by a digest of the files' paths, sizes and times
and of the settings. A file's counts are written last: what was interrupted goes on with
the first file that has none. Of several processes on one machine one writes, and the
others wait; of several hosts with one bucket each writes its share.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent import futures

import jax
import numpy as np
import tensorflow as tf
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from gqa_t5x import command_line, files
from gqa_t5x.data import corpus
from gqa_t5x.data.own import records
from gqa_t5x.errors import BadInput, first_line

VERSION = 1  # Raise it when the same files would give other records.
_WAIT_S = 0.2  # between looks at the lock of another process


@dataclasses.dataclass(frozen=True)
class Request:
  """Which files are read, and how.

  Attributes:
    setting: what the files are called in gin, for messages.
    files: their paths.
    stamps: size in bytes and time of the last change of each.
    features: names of a record's texts in the TFRecords.
    keys, document, unreadable: see `records.readable`.
    splits: upper bound of the share of the hash -> name of the split, in order. A
      record belongs to the first split whose bound is above the hash of its first text.
    folder: of all caches, local or gs://; None for the folder of the offline corpus.
  """

  setting: str
  files: tuple[str, ...]
  stamps: tuple[tuple[int, int], ...]
  features: tuple[str, ...]
  keys: tuple[str | int, ...]
  document: str
  unreadable: str
  splits: tuple[tuple[float, str], ...]
  folder: str | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Where the TFRecords are.

  Attributes:
    patterns: split -> glob pattern of its files.
    counts: split -> number of records.
    digest: of all texts, in order, and of their splits.
  """

  patterns: dict[str, str]
  counts: dict[str, int]
  digest: str


def find(patterns: str | Sequence[str], setting: str, kinds: Sequence[str]):
  """Returns the files that fit glob patterns, in order, and their sizes and times.

  Args:
    patterns: one or several, local or gs://.
    setting: what they are called in gin, for messages.
    kinds: names of `records.kind` that are allowed.

  Raises:
    BadInput: a pattern fits no file, or a file is of another kind.
  """
  found: list[str] = []
  for pattern in [patterns] if isinstance(patterns, str) else patterns:
    path = files.absolute(pattern, any_name=True)
    try:
      fits = [path] if tf.io.gfile.exists(path) else sorted(tf.io.gfile.glob(path))
      fits = [file for file in fits if not tf.io.gfile.isdir(file)]
    except (tf.errors.OpError, OSError) as error:
      raise BadInput(f'{setting}={path} cannot be read: {first_line(error)}') from error
    if not fits:
      raise BadInput(f'{setting}={path}: there is no such file, and none fits it.')
    found += fits
  if not found:
    raise BadInput(f'{setting} names no file; give a pattern, or a list of them.')
  found = [*dict.fromkeys(found)]
  for file in found:
    if records.kind(file) not in kinds:
      names = ', '.join(f'.{kind}' for kind in kinds)
      raise BadInput(
        f'{setting}={file}: the name must end in one of {names}, or with .gz or .zst'
        ' behind it where it is no .parquet.'
      )
  with futures.ThreadPoolExecutor(32) as pool:
    stamps = [*pool.map(_stamp, found)]
  return tuple(found), tuple(stamps)


def _stamp(path: str) -> tuple[int, int]:
  """Returns size and time; TensorFlow's time of a local file is in whole seconds."""
  if '://' not in path:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns
  stat = tf.io.gfile.stat(path)
  return stat.length, int(stat.mtime_nsec)


@functools.cache
def prepare(request: Request) -> Prepared:
  """Reads the files into the cache, unless they are there; all hosts call it together.

  Raises:
    BadInput: a file cannot be read, has unreadable lines that are not to be skipped, or
      is empty; a split gets no record; or the cache cannot be written.
  """
  folder = epath.Path(request.folder or corpus.cache_folder()) / 'records'
  settings = dataclasses.asdict(request) | {'folder': None, 'setting': None}
  digest = hashlib.sha256(json.dumps([VERSION, settings]).encode()).hexdigest()
  folder /= digest[:16]
  error = None
  try:
    with _alone(folder) as share:
      _write_all(request, folder, share)
  except BadInput as caught:
    error = caught
  if jax.process_count() > 1:
    failed = multihost_utils.process_allgather(np.array(error is not None))
    if np.any(failed) and error is None:
      raise BadInput(f'Another host cannot read {request.setting}; see what it says.')
  if error is not None:
    raise error
  return _prepared(request, folder)


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[tuple[int, int]]:
  """Keeps other processes of this machine out; yields (i, n): every n-th file from i.

  Hosts share the work where all see one folder, that is in a bucket.
  """
  if '://' in os.fspath(folder):
    yield jax.process_index(), jax.process_count()
    return
  lock = None
  try:
    folder.mkdir(parents=True, exist_ok=True)
    while (lock := files.lock(folder)) is None:
      time.sleep(_WAIT_S)
    yield 0, 1
  except OSError as error:
    raise _unwritable(folder, error) from error
  finally:
    if lock is not None:
      os.close(lock)


def _unwritable(folder: epath.Path, error: Exception) -> BadInput:
  return BadInput(
    f'{folder} cannot be written: {first_line(error)}. Make room for as much as'
    ' the texts are, or give another folder: --gin.CACHE_DIR.'
  )


def _write_all(request: Request, folder: epath.Path, share: tuple[int, int]) -> None:
  index, step = share
  own = range(index, len(request.files), step)
  todo = [i for i in own if not _counts_file(folder, i).exists()]
  for i in todo:
    name = f'{os.path.basename(request.files[i])} ({i + 1} of {len(request.files)})'
    bar = tqdm.tqdm(desc=f'reading {name}', unit=' records', leave=False, disable=None)
    with bar:
      _write(request, folder, i, bar)


def _counts_file(folder: epath.Path, i: int) -> epath.Path:
  return folder / f'counts-{i:05d}.json'


def _shard(request: Request, split: str, i: int | str) -> str:
  i = i if isinstance(i, str) else f'{i:05d}'
  return f'{split}-{i}-of-{len(request.files):05d}.tfrecord'


def _write(request: Request, folder: epath.Path, i: int, bar: tqdm.tqdm) -> None:
  """Writes the TFRecord files of one file, one for each split, and their counts."""
  path, names = request.files[i], [name for _, name in request.splits]
  counts, digest = dict.fromkeys(names, 0), hashlib.sha256()
  try:
    with contextlib.ExitStack() as stack:
      writers = {}
      for name in names:
        temporary = stack.enter_context(files.whole(folder / _shard(request, name, i)))
        writer = tf.io.TFRecordWriter(os.fspath(temporary))
        writers[name] = stack.enter_context(writer)
      for _, texts in records.readable(
        path, request.keys, request.document, request.unreadable, request.setting
      ):
        split = _split(request, texts[0])
        counts[split] += 1
        for text in (split, *texts):
          digest.update(f'{len(text)} {text}'.encode())
        writers[split].write(_example(request.features, texts))
        bar.update()
      if not sum(counts.values()):
        raise BadInput(f'{request.setting}={path} is empty: it has no record.')
    files.write_json(
      _counts_file(folder, i), {'counts': counts, 'digest': digest.hexdigest()}
    )
  except Exception as error:
    if not command_line.is_of_file_system(error):
      raise
    raise _unwritable(folder, error) from error


def _split(request: Request, text: str) -> str:
  """Names the split of a text; of equal texts, but for case and space, it is one."""
  if len(request.splits) == 1:
    return request.splits[0][1]
  position = corpus.position(text)
  return next(name for bound, name in request.splits if position < bound)


def _example(features: Sequence[str], texts: records.Texts) -> bytes:
  feature = {
    name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
    for name, text in zip(features, texts, strict=True)
  }
  example = tf.train.Example(features=tf.train.Features(feature=feature))
  return example.SerializeToString(deterministic=True)


def _prepared(request: Request, folder: epath.Path) -> Prepared:
  paths = [_counts_file(folder, i) for i in range(len(request.files))]
  with futures.ThreadPoolExecutor(32) as pool:
    parts = [json.loads(t) for t in pool.map(lambda path: path.read_bytes(), paths)]
  names = [name for _, name in request.splits]
  counts = {name: sum(part['counts'][name] for part in parts) for name in names}
  total = sum(counts.values())
  for name, count in counts.items():
    if not count:
      raise BadInput(
        f'{request.setting}: by VALIDATION_SHARE={request.splits[0][0]:.4g} and a hash,'
        f' none of the {total} records is in the split {name}. Give another share, or'
        ' VALIDATION_FILES.'
      )
  digest = hashlib.sha256(json.dumps([part['digest'] for part in parts]).encode())
  return Prepared(
    {name: os.fspath(folder / _shard(request, name, '*')) for name in names},
    counts,
    digest.hexdigest(),
  )
