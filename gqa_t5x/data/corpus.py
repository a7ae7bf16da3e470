"""The offline corpus: English text that every machine with Python already has.

The help topics of `pydoc` and the docstrings of installed packages are real prose,
ten million tokens of it, so the whole recipe runs on real text with no network.

A corpus is one folder of the cache (`$GQA_T5X_CACHE`, else `~/.cache/gqa_t5x`). Its
name has a digest of all that its content depends on, so another Python or another
version of a package is another corpus. One text a line; line breaks inside a text are
stored as `LINE_BREAK`, so that `tf.data` reads texts as lines.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator

import tqdm

from gqa_t5x.data import docstrings
from gqa_t5x.errors import BadInput

# Raise it when the same sources would give other files, the vocabulary's included.
VERSION = 1
LINE_BREAK = '\x1e'  # ASCII's record separator; `docstrings.clean` leaves none.
# Files of each split: more than one for training, so that shuffle and hosts have files.
SHARDS = {'train': 8, 'validation': 1, 'test': 1}
_VALIDATION_SHARE = 0.04
_TEST_SHARE = 0.02
MANIFEST = 'manifest.json'
LEFTOVER_S = 3600  # Age at which a killed build's temporary folder is removed.

# Packages that every installation of this project has, whichever T5X it runs on;
# their distributions, where the name differs.
PACKAGES = ('numpy', 'scipy', 'jax', 'flax', 'optax', 'orbax', 'tensorflow', 'keras')
PACKAGES += ('tensorflow_datasets', 'seqio', 't5', 'pandas', 'sklearn', 'matplotlib')
PACKAGES += ('nltk',)
_DISTRIBUTIONS = {'orbax': 'orbax-checkpoint', 'sklearn': 'scikit-learn'}


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A set of sources and the place of their texts, which need not exist yet.

  Sources are `TOPICS`, `STDLIB` or importable packages; those absent are left out.
  """

  name: str
  sources: tuple[str, ...]

  @property
  def folder(self) -> pathlib.Path:
    """The corpus's folder in the cache."""
    return cache_folder() / f'{self.name}-{_digest(self.sources)}'

  def files(self, split: str) -> list[str]:
    """The paths of one split's files."""
    n = SHARDS[split]
    return [str(self.folder / f'{split}-{i:02d}-of-{n:02d}.txt') for i in range(n)]


CORPORA = {
  corpus.name: corpus
  for corpus in (
    Corpus('pydocs', (docstrings.TOPICS, docstrings.STDLIB, *PACKAGES)),
    Corpus('pydocs_stdlib', (docstrings.TOPICS, docstrings.STDLIB)),
  )
}


def cache_folder() -> pathlib.Path:
  """Returns the folder of all corpora: `$GQA_T5X_CACHE`, else `~/.cache/gqa_t5x`."""
  chosen = os.environ.get('GQA_T5X_CACHE') or '~/.cache/gqa_t5x'
  return pathlib.Path(chosen).expanduser().absolute()


@functools.cache
def _digest(sources: tuple[str, ...]) -> str:
  """Names the content: Python, this file's `VERSION`, the sources' versions."""
  parts = [f'version={VERSION}', f'python={platform.python_version()}']
  for source in sources:
    if source in (docstrings.TOPICS, docstrings.STDLIB):
      parts.append(source)
    elif docstrings.package_folder(source):
      parts.append(f'{source}={_package_version(source)}')
  return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:12]


def _package_version(package: str) -> str:
  try:
    return importlib.metadata.version(_DISTRIBUTIONS.get(package, package))
  except importlib.metadata.PackageNotFoundError:
    return 'unknown'


def _text_hash(text: str) -> str:
  """Hashes a text so that texts equal but for case and white space hash alike."""
  return hashlib.sha256(' '.join(text.casefold().split()).encode()).hexdigest()


def split_of(text: str) -> str:
  """Names the split of a text: "train", "validation" or "test", by its hash alone."""
  place = position(text)
  if place < _VALIDATION_SHARE:
    return 'validation'
  return 'test' if place < _VALIDATION_SHARE + _TEST_SHARE else 'train'


def position(text: str) -> float:
  """Returns a number from 0 up to 1 by which texts are dealt to splits: a hash."""
  return int(_text_hash(text)[:8], 16) / 2**32


def split_texts(texts: Iterable[str]) -> dict[str, list[str]]:
  """Removes duplicates, of which the first stays, and deals texts to the splits.

  The texts of each split are ordered by hash, which mixes the sources.
  """
  unique: dict[str, str] = {}
  for text in texts:
    unique.setdefault(_text_hash(text), text)
  splits: dict[str, list[str]] = {split: [] for split in SHARDS}
  for _, text in sorted(unique.items()):
    splits[split_of(text)].append(text)
  return splits


def ensure(corpus: Corpus) -> pathlib.Path:
  """Builds the corpus unless the cache has it, checks its files, returns its folder.

  Safe in several processes at once: each writes a folder of its own, and the first to
  finish gives it its final name.

  Raises:
    OSError: the cache cannot be written.
    BadInput: a file of the corpus is damaged, or the sources hold no text.
  """
  folder = corpus.folder
  if not folder.exists():
    with writing(folder) as temporary:
      temporary.mkdir()
      _write(corpus, temporary, split_texts(_collect_all(corpus)))
  _check(folder)
  return folder


def read(corpus: Corpus, split: str) -> Iterator[str]:
  """Yields the texts of one split, building the corpus if need be."""
  ensure(corpus)
  for path in corpus.files(split):
    with open(path, encoding='utf-8', newline='\n') as file:
      for line in file:
        yield line.rstrip('\n').replace(LINE_BREAK, '\n')


def _collect_all(corpus: Corpus) -> Iterator[str]:
  start = time.monotonic()
  title = f'corpus {corpus.name!r} (made once)'
  for source in tqdm.tqdm(corpus.sources, title, leave=False, disable=None):
    yield from docstrings.collect(source)
  seconds = time.monotonic() - start
  print(f'corpus {corpus.name!r}: read in {seconds:.0f} s', file=sys.stderr)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Lets the caller create a file or folder under a temporary name, then renames it.

  `files.whole` is for one writer; here several processes may write the same corpus, and
  a folder that another process finished first stays as it is.

  Raises:
    OSError: the cache cannot be written; nothing is left behind.
  """
  prefix = f'.{path.name}-'
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f'{prefix}*'):
      with contextlib.suppress(FileNotFoundError):  # another process may be at it
        if time.time() - leftover.stat().st_mtime > LEFTOVER_S:
          shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(
      prefix=prefix, dir=path.parent, ignore_cleanup_errors=True
    ) as folder:
      temporary = pathlib.Path(folder) / path.name
      yield temporary
      try:
        temporary.rename(path)
      except OSError:
        if not path.is_dir():
          raise
  except OSError as error:
    raise OSError(
      f'cannot write {path}: {error}. Make room or give write permission there, or '
      'name another folder in the environment variable GQA_T5X_CACHE'
    ) from error


def _write(corpus: Corpus, folder: pathlib.Path, splits: dict[str, list[str]]) -> None:
  """Writes the files of all splits and `MANIFEST`, which lists their hashes."""
  manifest = {'corpus': corpus.name, 'sources': corpus.sources, 'splits': {}}
  hashes = manifest['sha256'] = {}
  for split, texts in splits.items():
    if not texts:
      raise BadInput(
        f'corpus {corpus.name!r}: no text for the {split} split in the sources '
        f"{', '.join(corpus.sources)}; install a Python that has its library's "
        'sources, or name more packages'
      )
    lines = [text.replace('\n', LINE_BREAK) + '\n' for text in texts]
    size = sum(len(line.encode()) for line in lines)
    manifest['splits'][split] = {'texts': len(lines), 'bytes': size}
    for i, path in enumerate(corpus.files(split)):
      name = pathlib.Path(path).name
      data = ''.join(lines[i :: SHARDS[split]]).encode()
      hashes[name] = hashlib.sha256(data).hexdigest()
      (folder / name).write_bytes(data)
  (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), 'utf-8')


@functools.cache
def _check(folder: pathlib.Path) -> None:
  """Compares the files with the manifest's hashes, once a process."""
  path = folder / MANIFEST
  try:
    for name, expected in json.loads(path.read_bytes())['sha256'].items():
      path = folder / name
      if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise ValueError('its content has changed')
  except (OSError, ValueError, KeyError) as error:
    raise BadInput(
      f'{path} is damaged ({error!r}). Delete the folder {folder}: the next run builds '
      'it anew'
    ) from error
