"""Reads users' files one record at a time: a text, or several that belong together.

| name ends in | a record is |
|---|---|
| .txt | a paragraph, a line or the whole file |
| .jsonl, .json | a line, which is a JSON object |
| .tsv | a line; the first names the columns, or they are counted from 1 |
| .parquet | a row |

All but .parquet may be compressed: .gz or .zst as well. Local or gs://. No more than a
record is in memory, of Parquet a few pages of a row group.
"""

import contextlib
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from absl import logging
from etils import epath

from gqa_t5x.command_line import is_of_file_system
from gqa_t5x.errors import BadInput, first_line

DOCUMENTS = ('paragraph', 'line', 'file')  # What a record of a .txt file is.
_SUFFIX = re.compile(r'\.(txt|jsonl|json|tsv|parquet)(?:\.(gz|zst))?$', re.IGNORECASE)
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'
_MOST_BYTES = 2**26  # of a line or a document
_ROWS = 256  # of Parquet that are decoded together
_SHOWN = 10  # unreadable lines that an error names

Keys = Sequence[str | int]
Texts = tuple[str, ...]


class Unreadable(BadInput):
  """Why a line is no record."""


def readable(
  path: str, keys: Keys, document: str, unreadable: str, setting: str
) -> Iterator[tuple[int, Texts]]:
  """Yields the records of a file, each with the number of its (first) line or row.

  Args:
    path: the file.
    keys: where the texts of a record are: names of JSON's keys or of columns, or of
      .tsv numbers of columns. Not used for .txt.
    document: one of `DOCUMENTS`, for .txt.
    unreadable: 'refuse' the file if a line is unreadable, or 'skip' the line.
    setting: what the path is called in gin, or a flag, for messages.

  Raises:
    BadInput: for an unknown `unreadable` or name, a damaged file, and, after the last
      record, unreadable lines that are not to be skipped.
  """
  check_unreadable(unreadable)
  shown, bad, count = [], 0, 0
  for number, texts in _read(path, keys, document, setting):
    if not isinstance(texts, Unreadable):
      count += 1
      yield number, texts
      continue
    bad += 1
    if bad <= _SHOWN:
      shown.append(f'{number} ({texts})')
      logging.warning('%s, line %d is unreadable: %s.', path, number, texts)
  if bad and unreadable == 'refuse':
    more = f' and {bad - len(shown)} more' if bad > len(shown) else ''
    of_gin = not setting.startswith('--')
    skip = ', or leave them out by --gin.UNREADABLE="\'skip\'"' if of_gin else ''
    raise BadInput(
      f'{setting}={path} has unreadable lines: {", ".join(shown)}{more}. Mend'
      f' them{skip}.'
    )
  if bad:
    skipped = f'{bad} unreadable lines are skipped, {count} are left.'
    print(f'{path}: {skipped}', file=sys.stderr)  # Which can write any name.


def check_unreadable(unreadable: str) -> None:
  """Raises BadInput unless it is 'refuse' or 'skip'."""
  if unreadable not in ('refuse', 'skip'):
    raise BadInput(f'UNREADABLE={unreadable!r}; choose one of refuse, skip.')


def kind(path: str) -> str | None:
  """Returns 'txt', 'jsonl', 'json', 'tsv' or 'parquet'; None for another name."""
  match = _SUFFIX.search(path)
  is_known = match and not (match[1].lower() == 'parquet' and match[2])
  return match[1].lower() if is_known else None


def _read(
  path: str, keys: Keys, document: str, setting: str
) -> Iterator[tuple[int, Texts | Unreadable]]:
  read, number = _READERS[kind(path) or 'txt'], 0
  try:
    for number, texts in read(path, keys, document):
      yield number, texts
  except BadInput as error:
    raise BadInput(f'{setting}={path}: {error}') from error
  except Exception as error:
    damage = isinstance(error, EOFError | ValueError | zlib.error)
    if not damage and not is_of_file_system(error):
      raise
    raise BadInput(
      f'{setting}={path} cannot be read after line {number}: {first_line(error)}. Copy'
      ' it anew.'
    ) from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
  with contextlib.ExitStack() as stack:
    file = stack.enter_context(epath.Path(path).open('rb'))
    if path.lower().endswith('.gz'):
      file = stack.enter_context(gzip.open(file))
    elif path.lower().endswith('.zst'):
      import pyarrow

      stream = pyarrow.CompressedInputStream(file, 'zstd')
      file = stack.enter_context(io.BufferedReader(stream))
    yield file


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
  """Yields the lines without their ends; of one that is too long, the beginning."""
  with _open(path) as file:
    number = 0
    while line := file.readline(_MOST_BYTES):
      number += 1
      rest = line
      while len(rest) == _MOST_BYTES and not rest.endswith(b'\n'):
        rest = file.readline(_MOST_BYTES)
      if number == 1:
        line = line.removeprefix(_BYTE_ORDER_MARK)
      yield number, line if len(line) == _MOST_BYTES else line.rstrip(b'\r\n')


def _each(
  rows: Iterator[tuple[int, Any]], texts: Callable[[Any], Texts]
) -> Iterator[tuple[int, Texts | Unreadable]]:
  for number, row in rows:
    try:
      yield number, texts(row)
    except Unreadable as why:
      yield number, why


def _txt(path: str, keys: Keys, document: str):
  del keys
  if document == 'line':
    yield from _each(_lines(path), lambda line: (_checked(_decoded(line)),))
    return
  lines: list[str] = []
  first, size = 1, 0
  for number, line in _lines(path):
    try:
      text = _decoded(line)
    except Unreadable as why:
      yield number, why
      continue
    if text.strip() or (document == 'file' and lines):
      first = first if lines else number
      size += len(text)
      if size < _MOST_BYTES:
        lines.append(text)
    elif document == 'paragraph' and lines:
      yield first, _joined(lines, size)
      lines, size = [], 0
  if lines:
    yield first, _joined(lines, size)


def _joined(lines: list[str], size: int) -> Texts | Unreadable:
  if size >= _MOST_BYTES:
    return _too_long()
  return ('\n'.join(lines).rstrip(),)


def _json(path: str, keys: Keys, document: str):
  del document
  return _each(_lines(path), lambda line: json_texts(line, keys))


def _tsv(path: str, keys: Keys, document: str):
  del document
  lines = _lines(path)
  if all(isinstance(key, int) for key in keys):
    if min(keys) < 1:
      raise BadInput(f'there is no column {min(keys)}; columns are counted from 1.')
    places, width = [key - 1 for key in keys], None
  else:
    names = _decoded(next(lines, (1, b''))[1]).split('\t')
    if missing := [key for key in keys if key not in names]:
      raise BadInput(
        f'the first line names the columns {", ".join(names)[:200]}, and none is'
        f' {missing[0]!r}. Give the name of one, or the number of each column, counted'
        ' from 1, if there is no such line.'
      )
    places, width = [names.index(key) for key in keys], len(names)

  def texts(line: bytes) -> Texts:
    cells = _decoded(line).split('\t')
    if len(cells) <= max(places) or len(cells) != (width or len(cells)):
      raise Unreadable(f'{len(cells)} columns, {width or max(places) + 1} expected')
    return tuple(_checked(cells[place]) for place in places)

  return _each(lines, texts)


def _parquet(path: str, keys: Keys, document: str):
  del document
  import pyarrow.parquet

  def rows() -> Iterator[tuple[int, dict]]:
    with epath.Path(path).open('rb') as raw:
      file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
      names = file.schema_arrow.names
      if missing := [key for key in keys if key not in names]:
        raise BadInput(
          f'the columns are {", ".join(names)[:200]}, and none is {missing[0]!r};'
          ' give the name of one.'
        )
      number = 0
      for batch in file.iter_batches(_ROWS, columns=[*keys], use_threads=False):
        for row in batch.to_pylist():
          number += 1
          yield number, row

  return _each(rows(), lambda row: _values(row, keys))


_READERS = {'txt': _txt, 'jsonl': _json, 'json': _json, 'tsv': _tsv}
_READERS |= {'parquet': _parquet}


def json_texts(line: bytes, keys: Keys) -> Texts:
  """Returns the texts under `keys` of a line that is a JSON object.

  Raises:
    Unreadable: the message says why.
  """
  text = _decoded(line)
  if not text.strip():
    raise Unreadable('empty')
  try:
    value = json.loads(text)
  except json.JSONDecodeError as error:
    raise Unreadable(f'not JSON at column {error.colno}') from error
  except (ValueError, RecursionError) as error:  # A long number, or too deep.
    raise Unreadable(f'not JSON: {first_line(error)}') from error
  return _values(value, keys)


def _values(row: Any, keys: Keys) -> Texts:
  for key in keys:
    if not isinstance(row, dict) or not isinstance(row.get(key), str):
      raise Unreadable(f'no text under {key!r}')
  return tuple(_checked(row[key]) for key in keys)


def _decoded(line: bytes) -> str:
  if len(line) >= _MOST_BYTES:
    raise _too_long()
  try:
    return line.decode('utf-8')
  except UnicodeDecodeError as error:
    raise Unreadable(f'not UTF-8 at byte {error.start}') from error


def _too_long() -> Unreadable:
  return Unreadable(f'longer than {_MOST_BYTES // 2**20} MiB')


def _checked(text: str) -> str:
  if not text.strip():
    raise Unreadable('empty')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise Unreadable(f'half a character (a surrogate) at {error.start}') from error
  return text
