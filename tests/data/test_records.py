"""Users' files as records: formats, compression, what is unreadable and why."""

import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from gqa_t5x.data.own import records
from gqa_t5x.errors import BadInput

# A third text with what each format must keep.
TEXTS = [('one', 'eins'), ('two words', 'zwei'), ('größer 🙂 \\ "', "d'r ei")]
INPUTS = [(text,) for text, _ in TEXTS]
MARK = b'\xef\xbb\xbf'


def json_lines(rows) -> bytes:
  lines = [json.dumps({'q': q, 'n': 3, 'a': a}) + '\n' for q, a in rows]
  return ''.join(lines).encode()


def tab_lines(rows, head='n\tq\ta\n') -> bytes:
  return (head + ''.join(f'3\t{q}\t{a}\n' for q, a in rows)).encode()


def plain(path, data: bytes):
  path.write_bytes(data)


def gz(path, data: bytes):
  """Two members, cut inside of a line."""
  path.write_bytes(gzip.compress(data[:7]) + gzip.compress(data[7:]))


def zst(path, data: bytes):
  """Two frames."""
  with path.open('wb') as file:
    for part in (data[:7], data[7:]):
      sink = pyarrow.BufferOutputStream()
      with pyarrow.CompressedOutputStream(sink, 'zstd') as stream:
        stream.write(part)
      file.write(sink.getvalue())


PACKED = {'': plain, '.gz': gz, '.ZST': zst}


def parquet(path, rows, **options):
  columns = dict(zip(('q', 'a'), map(list, zip(*rows, strict=True)), strict=True))
  table = pyarrow.table({**columns, 'n': list(range(len(rows)))})
  pyarrow.parquet.write_table(table, path, **options)


def read(path, keys=('q', 'a'), document='line', unreadable='refuse'):
  return list(records.readable(str(path), keys, document, unreadable, 'FILES'))


def numbered(texts, first=1):
  return [*enumerate(texts, first)]


@pytest.mark.parametrize('packed', PACKED)
@pytest.mark.parametrize(
  ('name', 'data', 'keys', 'expected'),
  [
    ('x.jsonl', json_lines(TEXTS), ('q', 'a'), numbered(TEXTS)),
    ('c4-train.0-of-1.json', MARK + json_lines(TEXTS), ('q',), numbered(INPUTS)),
    ('x.tsv', tab_lines(TEXTS), ('q', 'a'), numbered(TEXTS, 2)),
    ('x.tsv', MARK + tab_lines(TEXTS, ''), (2, 3), numbered(TEXTS)),
    ('X.TXT', MARK + '\n'.join(q for q, _ in TEXTS).encode(), (), numbered(INPUTS)),
    ('x.txt', b'one \r\ntwo\r\n', (), [(1, ('one ',)), (2, ('two',))]),
  ],
)
def test_formats(tmp_path, packed, name, data, keys, expected):
  path = tmp_path / f'{name}{packed}'
  PACKED[packed](path, data)
  assert read(path, keys) == expected


def test_parquet_in_row_groups(tmp_path):
  rows = [(f'question {i}', f'answer {i}') for i in range(1000)]
  parquet(tmp_path / 'x.parquet', rows, row_group_size=300)
  assert read(tmp_path / 'x.parquet') == numbered(rows)
  assert read(tmp_path / 'x.parquet', ('a',)) == numbered([(a,) for _, a in rows])


@pytest.mark.parametrize(
  ('document', 'expected'),
  [
    ('paragraph', [(2, 'a\n b'), (6, 'c'), (8, 'd')]),
    ('file', [(2, 'a\n b\n\n  \nc\n\nd')]),
  ],
)
def test_documents(tmp_path, document, expected):
  (tmp_path / 'x.txt').write_text('\na\n b\n\n  \nc\n\nd\n\n')
  found = read(tmp_path / 'x.txt', (), document)
  assert found == [(number, (text,)) for number, text in expected]


@pytest.mark.parametrize(
  ('line', 'key', 'why'),
  [
    (b'', None, 'empty'),
    (b' \t', None, 'empty'),
    (b'ab\xff', None, 'not UTF-8 at byte 2'),
    (b'', 'q', 'empty'),
    (b'{"q": " "}', 'q', 'empty'),
    (b'{"q": x}', 'q', 'not JSON at column 7'),
    (b'"q"', 'q', "no text under 'q'"),
    (b'{"input": "x"}', 'q', "no text under 'q'"),
    (b'{"q": 3}', 'q', "no text under 'q'"),
    (b'{"q": "a\\ud83d"}', 'q', 'half a character (a surrogate) at 1'),
    (b'{"q": "x", "deep": ' + b'[' * 10**5, 'q', 'not JSON: maximum rec'),
    (b'{"q": "x", "n": ' + b'1' * 5000 + b'}', 'q', 'not JSON: Exceeds the limit'),
    (b'[{"q": "x"}]', 'q', "no text under 'q'"),
    (b'only one', 2, '1 columns, 2 expected'),
    (b'x\t\ty', 2, 'empty'),
  ],
)
def test_unreadable_lines(tmp_path, line, key, why, capsys):
  """The two around it are read; the middle one is refused, or skipped and counted."""
  good = {str: b'{"q": "good"}', int: b'x\tgood', type(None): b'good'}[type(key)]
  suffix = {str: 'jsonl', int: 'tsv', type(None): 'txt'}[type(key)]
  path = tmp_path / f'x.{suffix}'
  path.write_bytes(b'\n'.join([good, line, good]))
  with pytest.raises(BadInput) as caught:
    read(path, [key])
  assert str(caught.value).startswith(f'FILES={path} has unreadable lines: 2 ({why}')
  assert str(caught.value).endswith('leave them out by --gin.UNREADABLE="\'skip\'".')
  with pytest.raises(BadInput, match=r'\. Mend them\.$'):
    list(records.readable(str(path), [key], 'line', 'refuse', '--texts'))
  assert read(path, [key], unreadable='skip') == [(1, ('good',)), (3, ('good',))]
  said = capsys.readouterr().err
  assert said == f'{path}: 1 unreadable lines are skipped, 2 are left.\n'


def test_other_widths_and_nulls(tmp_path):
  (tmp_path / 'x.tsv').write_text('q\ta\n1\t2\n1\t2\t3\n')
  with pytest.raises(BadInput, match=r'lines: 3 .3 columns, 2 expected.\.'):
    read(tmp_path / 'x.tsv')
  parquet(tmp_path / 'x.parquet', [('a', 'b'), (None, 'b')])
  with pytest.raises(BadInput, match=r"lines: 2 .no text under 'q'.\."):
    read(tmp_path / 'x.parquet')


def test_an_unreadable_line_of_a_paragraph(tmp_path):
  (tmp_path / 'x.txt').write_bytes(b'a\n\xff\nb\n\nc\n')
  found = read(tmp_path / 'x.txt', (), 'paragraph', 'skip')
  assert found == [(1, ('a\nb',)), (5, ('c',))]


@pytest.mark.parametrize(
  ('document', 'text', 'expected'),
  [
    ('line', f'123456\n{"x" * 17}\n12', [(1, '123456'), (3, '12')]),
    ('paragraph', '123456\n\n1234\n5678\n\n9', [(1, '123456'), (6, '9')]),
    ('file', '1234\n5678', []),
  ],
)
def test_what_is_too_long(tmp_path, monkeypatch, document, text, expected):
  """It is read in parts, and not kept."""
  monkeypatch.setattr(records, '_MOST_BYTES', 8)
  (tmp_path / 'x.txt').write_text(text)
  found = read(tmp_path / 'x.txt', (), document, 'skip')
  assert found == [(number, (text,)) for number, text in expected]
  with pytest.raises(BadInput, match='longer than 0 MiB'):
    read(tmp_path / 'x.txt', (), document)


def test_many_unreadable_lines(tmp_path):
  (tmp_path / 'x.jsonl').write_text('{}\n' * 12 + '{"q": "x"}\n')
  message = r"lines: 1 \(no text under 'q'\), .*, 10 \(no .*\) and 2 more. Mend them"
  with pytest.raises(BadInput, match=message):
    read(tmp_path / 'x.jsonl', ['q'])


def cut(path):
  path.write_bytes(path.read_bytes()[:-6])


@pytest.mark.parametrize('name', ['x.jsonl.gz', 'x.jsonl.ZST', 'x.parquet', 'no.gz'])
def test_damaged_files(tmp_path, name):
  path = tmp_path / name
  if name == 'no.gz':
    path = tmp_path / 'x.jsonl.gz'
    path.write_bytes(b'{"q": "x"}')
  elif 'parquet' in name:
    parquet(path, TEXTS)
    cut(path)
  else:
    PACKED[path.suffix](path, json_lines(TEXTS))
    cut(path)
  with pytest.raises(BadInput) as caught:
    read(path)
  message = (
    rf'FILES={re.escape(str(path))} cannot be read after line \d: .*Copy it anew'
  )
  assert re.match(message, str(caught.value)), str(caught.value)


def test_columns_that_are_not_there(tmp_path):
  """Nor is there one before the first."""
  (tmp_path / 'x.tsv').write_bytes(tab_lines(TEXTS))
  parquet(tmp_path / 'x.parquet', TEXTS)
  for name, message in (
    ('x.tsv', r"x.tsv: the first line names the columns n, q, a, and none is 'de'\."),
    ('x.parquet', r"x.parquet: the columns are q, a, n, and none is 'de'; give"),
  ):
    with pytest.raises(BadInput, match=message):
      read(tmp_path / name, ('q', 'de'))
  with pytest.raises(BadInput, match=r'x.tsv: there is no column 0; columns are count'):
    read(tmp_path / 'x.tsv', (0, 1))


@pytest.mark.parametrize(
  ('path', 'expected'),
  [
    ('a.txt', 'txt'),
    ('gs://b/c4-train.00000-of-01024.json.gz', 'json'),
    ('a.JSONL.zst', 'jsonl'),
    ('a.parquet', 'parquet'),
    ('a.parquet.gz', None),
    ('a.csv', None),
    ('txt', None),
    ('a.gz', None),
  ],
)
def test_kinds(path, expected):
  assert records.kind(path) == expected
