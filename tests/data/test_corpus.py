"""The offline corpus: what it collects, how it splits it, and how it survives."""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from gqa_t5x.data import corpus as corpus_lib
from gqa_t5x.data import docstrings

ROOT = pathlib.Path(__file__).parents[2]
LONG = 'a line of words that makes this text long enough to be kept by the collector.'

SOURCE = '''
"""Module text."""

class A:
  """Class text.

  A list:
    Indented line.
  """
  x = 1
  """Not a docstring: it stands below an assignment."""

  def method(self):
    """Method   text.\\tTab."""
    if x:
      def nested():
        "Single quotes."
    try:
      pass
    except ValueError:
      async def handler():
        """In a handler."""
    finally:
      class B:
        r"""Raw \\d text."""

def no_text():
  return """not a docstring"""

match A:
  case 1:
    def in_case():
      """In a case."""

def bytes_text():
  b"""not text"""
'''


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache folder, and a process that has checked and digested nothing."""
  monkeypatch.setenv('GQA_T5X_CACHE', str(tmp_path / 'cache'))
  corpus_lib._check.cache_clear()
  corpus_lib._digest.cache_clear()
  return tmp_path / 'cache'


@pytest.fixture
def package(tmp_path, monkeypatch):
  """The name of a package of 100 functions with a docstring of two lines each."""
  folder = tmp_path / 'site' / 'written_by_hand'
  (folder / 'tests').mkdir(parents=True)
  functions = [f'def f{i}():\n  """Text {i}.\n\n  {LONG}\n  """\n' for i in range(100)]
  (folder / '__init__.py').write_text("raise RuntimeError('imported')\n")
  (folder / 'b.py').write_text('\n'.join(functions[:50]))
  (folder / 'a.py').write_text('\n'.join(functions[50:]))
  (folder / 'broken.py').write_text('def f(:\n')
  skipped = f'"""A test. {LONG}"""\n'
  for name in ('b_test.py', 'test_b.py', 'tests/helper.py'):
    (folder / name).write_text(skipped)
  monkeypatch.syspath_prepend(str(folder.parent))
  return folder.name


def test_docstrings_of_a_file():
  assert docstrings.docstrings(SOURCE) == [
    'Module text.',
    'Class text.\n\nA list:\n  Indented line.',
    'Method   text.  Tab.',
    'Single quotes.',
    'In a handler.',
    'Raw \\d text.',
    'In a case.',
  ]


@pytest.mark.parametrize('source', ['def f(:', "print 'old'", b'\xff\xfe', 'a\0b'])
def test_files_that_do_not_parse_have_no_docstrings(source):
  assert docstrings.docstrings(source) == []


def test_topics_are_the_values_of_the_dict():
  source = (
    "# Generated.\ntopics = {'if': 'The \"if\"\\n\\n  a\\nb  \\n', 'of': r'''O\\f'''}"
  )
  assert docstrings.topics(source) == ['The "if"\n\n  a\nb', 'O\\f']


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('  A.\n    B.\n      C.  \n  ', 'A.\nB.\n  C.'),
    ('A\r\nB\rC', 'A\nB\nC'),
    ('A\x1eB\x00C\x7f\x0b', 'ABC'),
    ('π ≈ 3.14 \ud800€', 'π ≈ 3.14 €'),
    (' \n ', ''),
  ],
)
def test_clean(text, expected):
  assert docstrings.clean(text) == expected


def test_collect_reads_files_in_order_and_skips_tests(package):
  order = [*range(50, 100), *range(50)]  # a.py before b.py
  assert docstrings.collect(package) == [f'Text {i}.\n\n{LONG}' for i in order]
  assert package not in sys.modules
  assert docstrings.collect('no_such_package') == []


def test_collect_finds_the_topics_and_the_standard_library():
  assert any(t.startswith('The "if" statement') for t in docstrings.collect('topics'))
  texts = docstrings.collect('json')
  assert any(t.startswith('Serialize ``obj`` to a JSON formatted') for t in texts)
  assert min(map(len, texts)) >= docstrings.MIN_CHARS


@pytest.mark.parametrize(
  ('text', 'split'),
  [('text 0', 'train'), ('text 26', 'validation'), ('text 30', 'test')],
)
def test_split_is_a_function_of_the_text_alone(text, split):
  assert corpus_lib.split_of(text) == split
  assert corpus_lib.split_of(f'  {text.upper()}\n'.replace(' ', ' \n ')) == split


def test_split_texts_removes_duplicates_and_ignores_the_sources_order():
  texts = [f'text {i}' for i in range(2000)]
  splits = corpus_lib.split_texts([*texts, 'TEXT  5', 'text\n7', 'text 9'])
  assert splits == corpus_lib.split_texts(reversed(texts))
  assert sorted(itertools.chain(*splits.values())) == sorted(texts)
  for split, members in splits.items():
    assert {corpus_lib.split_of(text) for text in members} == {split}
  shares = {split: len(members) / 2000 for split, members in splits.items()}
  assert shares == pytest.approx(
    {'train': 0.94, 'validation': 0.04, 'test': 0.02}, abs=0.01
  )


def test_ensure_writes_all_texts_once(cache, package, capsys):
  corpus = corpus_lib.Corpus('hand', ('no_such_package', package))
  folder = corpus_lib.ensure(corpus)
  assert folder.parent == cache
  assert "corpus 'hand': read in" in capsys.readouterr().err
  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  read = [
    text for split in corpus_lib.SHARDS for text in corpus_lib.read(corpus, split)
  ]
  assert sorted(read) == sorted(f'Text {i}.\n\n{LONG}' for i in range(100))
  assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  assert capsys.readouterr().err == ''
  manifest = json.loads((folder / corpus_lib.MANIFEST).read_text())
  assert sum(split['texts'] for split in manifest['splits'].values()) == 100
  # 8 + 1 + 1 files and the manifest, one text a line.
  assert len(before) == 11
  lines = pathlib.Path(corpus.files('test')[0]).read_bytes().splitlines()
  assert all(line.endswith(f'\x1e\x1e{LONG}'.encode()) for line in lines)


def test_folder_depends_on_versions_and_sources(cache, monkeypatch):
  corpus = corpus_lib.Corpus('c', ('numpy',))
  versions = {'numpy': '1'}
  monkeypatch.setattr(corpus_lib.importlib.metadata, 'version', versions.get)
  folders = {corpus.folder, corpus_lib.Corpus('c', ('topics',)).folder}
  versions['numpy'] = '2'
  corpus_lib._digest.cache_clear()
  folders.add(corpus.folder)
  monkeypatch.setattr(corpus_lib.platform, 'python_version', lambda: '3.99')
  corpus_lib._digest.cache_clear()
  folders.add(corpus.folder)
  assert len(folders) == 4
  assert not cache.exists()


def _start(code, cache, package_folder):
  env = os.environ | {
    'GQA_T5X_CACHE': str(cache),
    'PYTHONPATH': os.pathsep.join([str(ROOT), str(package_folder)]),
  }
  head = 'from gqa_t5x.data import corpus as c\n'
  head += "corpus = c.Corpus('hand', ('written_by_hand', 'email'))\n"
  return subprocess.Popen(
    [sys.executable, '-c', head + code], env=env, stdout=subprocess.PIPE, text=True
  )


def test_the_slower_of_two_writers_leaves_the_first_ones_folder(cache):
  with corpus_lib.writing(cache / 'folder') as temporary:
    temporary.mkdir()
    (temporary / 'file').write_text('second')
    (cache / 'folder').mkdir()
    (cache / 'folder' / 'file').write_text('first')
  assert [path.name for path in cache.iterdir()] == ['folder']
  assert (cache / 'folder' / 'file').read_text() == 'first'


def test_a_killed_build_leaves_no_half_corpus(cache, package, tmp_path):
  code = (
    'import json, time\n'
    "def stop(*_, **__):\n  print('ready', flush=True)\n  time.sleep(60)\n"
    'c.json.dumps = stop\nc.ensure(corpus)'
  )
  with _start(code, cache, tmp_path / 'site') as process:
    assert process.stdout.readline() == 'ready\n'
    process.kill()
  corpus = corpus_lib.Corpus('hand', (package, 'email'))
  (leftover,) = cache.iterdir()
  assert leftover != corpus.folder
  assert corpus.folder.name in leftover.name  # the same in every process
  corpus_lib.ensure(corpus)
  assert corpus.folder.exists()
  # What was killed long ago goes away with the next build.
  assert leftover.exists()
  old = time.time() - 2 * corpus_lib.LEFTOVER_S
  os.utime(leftover, (old, old))
  with corpus_lib.writing(corpus.folder) as temporary:
    temporary.mkdir()
  assert list(cache.iterdir()) == [corpus.folder]


def test_a_failed_build_leaves_nothing(cache, package, monkeypatch):
  def no_space(*_, **__):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(pathlib.Path, 'write_text', no_space)
  with pytest.raises(OSError, match=r'cannot write .*hand.*No space.*GQA_T5X_CACHE'):
    corpus_lib.ensure(corpus_lib.Corpus('hand', (package,)))
  assert list(cache.iterdir()) == []


@pytest.mark.parametrize('damage', ['changed', 'cut', 'missing', 'manifest'])
def test_a_damaged_corpus_is_named(cache, package, damage):
  corpus = corpus_lib.Corpus('hand', (package,))
  corpus_lib.ensure(corpus)
  path = pathlib.Path(corpus.files('train')[3])
  match damage:
    case 'changed':
      path.write_bytes(path.read_bytes().replace(b'Text', b'Test'))
    case 'cut':
      path.write_bytes(path.read_bytes()[:-1])
    case 'missing':
      path.unlink()
    case 'manifest':
      path = corpus.folder / corpus_lib.MANIFEST
      path.write_text('{')
  corpus_lib._check.cache_clear()
  with pytest.raises(ValueError, match=rf'{path} is damaged.*Delete.*{corpus.folder}'):
    corpus_lib.ensure(corpus)


def test_sources_without_text_are_an_error(cache):
  with pytest.raises(ValueError, match=r'no text for the train split.*no_such'):
    corpus_lib.ensure(corpus_lib.Corpus('none', ('no_such_package',)))
  assert list(cache.iterdir()) == []


def test_default_cache_folder(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('GQA_T5X_CACHE', '')
  assert corpus_lib.cache_folder() == tmp_path / '.cache' / 'gqa_t5x'
