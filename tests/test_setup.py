"""The set-up: versions pinned once and installed, gin files packaged, files small."""

import importlib.metadata
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig

import pytest
import setuptools

import gin
import gqa_t5x
from helpers import commands

ROOT = commands.ROOT
NIGHTLIES = ('seqio-nightly', 'tfds-nightly')


def canonical(name: str) -> str:
  """A package's name as the index compares them."""
  return re.sub(r'[-_.]+', '-', name).lower()


def installed() -> dict[str, str]:
  # Not all of sys.path: setuptools puts copies of other packages there.
  found = importlib.metadata.distributions(path=[sysconfig.get_path('purelib')])
  return {canonical(d.metadata['Name']): d.version for d in found}


@pytest.fixture(scope='module')
def setup_arguments():
  """What setup.py passes to setuptools."""
  given = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, 'setup', lambda **kwargs: given.update(kwargs))
    runpy.run_path(str(ROOT / 'setup.py'))
  return given


@pytest.fixture(scope='module')
def pins():
  """Package -> version of constraints.txt; fails for anything but NAME==VERSION."""
  lines = (ROOT / 'constraints.txt').read_text().splitlines()
  found = [
    re.fullmatch(r'([\w.-]+)==([\w.+!-]+)', line)
    for line in lines
    if line and not line.startswith('#')
  ]
  assert None not in found
  names = [canonical(match[1]) for match in found]
  assert sorted(names) == sorted(set(names))
  return dict(zip(names, (match[2] for match in found), strict=True))


def test_every_requirement_is_pinned(setup_arguments, pins):
  extras = setup_arguments['extras_require']
  others = {'torch', 'oracle', 'ctranslate2', 'heads'}
  assert set(extras) == {'inference', 'train', 't5x', 'test', *others}
  required = sum(extras.values(), setup_arguments['install_requires'])
  assert len(required) > 20
  # Versions are in constraints.txt alone.
  assert all(re.fullmatch(r'[\w-]+', name) for name in required)
  assert {canonical(name) for name in required} <= set(pins)
  # Installed apart, without its own requirements (Makefile).
  assert 't5' in pins


def test_nothing_replaces_seqio(pins):
  assert not set(NIGHTLIES) & set(pins)
  assert not set(NIGHTLIES) & set(installed())


def test_what_is_installed_is_what_is_pinned(pins):
  versions = installed()
  both = versions.keys() & pins.keys()
  assert {'jax', 'flax', 'seqio', 't5'} <= both
  assert {name: versions[name] for name in both} == {name: pins[name] for name in both}


def test_t5x_is_pinned_to_commits():
  lines = (ROOT / 'requirements-t5x.txt').read_text().splitlines()
  found = [
    re.fullmatch(r'(\w+) @ git\+https://github\.com/[\w-]+/(\w+)@([0-9a-f]{40})', line)
    for line in lines
    if line and not line.startswith('#')
  ]
  assert None not in found
  assert [match[1] for match in found] == ['t5x', 'airio', 'jestimator']
  assert all(match[1] == match[2] for match in found)


def test_versions_agree(setup_arguments):
  assert re.fullmatch(r'\d+\.\d+\.\d+', gqa_t5x.__version__)
  assert setup_arguments['version'] == gqa_t5x.__version__


def test_make_has_its_targets():
  text = (ROOT / 'Makefile').read_text()
  (phony,) = re.findall(r'^\.PHONY:(.*)', text, flags=re.MULTILINE)
  targets = ['setup', 'test', 'test-tpu', 'test-restarts', 'lint', 'uptrain', 'clean']
  assert phony.split() == targets
  assert set(targets) <= set(re.findall(r'^([\w-]+):', text, flags=re.MULTILINE))


def test_continuous_integration_runs_the_tests():
  script = ROOT / '.ci' / 'run'
  assert script.stat().st_mode & 0o111
  lines = script.read_text().splitlines()[-3:]
  assert lines[:2] == ['make test', 'make test-tpu']
  assert ' make test-restarts ' in lines[2]


def python_files() -> list[pathlib.Path]:
  """The repository's own files, without environments and build folders."""
  folders = ('gqa_t5x', 't5x_lite', 'tests', 'launch')
  found = [path for folder in folders for path in (ROOT / folder).rglob('*.py')]
  found = [path for path in found if 'build' not in path.parts]
  return sorted([*found, ROOT / 'setup.py'])


def test_files_are_short():
  lengths = {path: len(path.read_text().splitlines()) for path in python_files()}
  assert len(lengths) > 30
  assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > 400} == {}


@pytest.mark.skipif(
  not (ROOT / '.git').exists() or shutil.which('git') is None,
  reason='needs a git checkout',
)
def test_git_ignores_no_source():
  """A pattern such as `runs/` would leave gin/runs out of every clone."""
  folders = ['gin', 'gqa_t5x', 't5x_lite', 'tests']
  done = subprocess.run(
    ['git', 'ls-files', '--others', '--ignored', '--exclude-standard', *folders],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  ignored = [
    line for line in done.stdout.splitlines() if line.endswith(('.py', '.gin'))
  ]
  assert [line for line in ignored if '/build/' not in line] == []


# --- Gin files for users of pip -----------------------------------------------


def test_every_gin_file_is_packaged_and_includes_resolve(tmp_path):
  """As after `pip install`, with --gin_search_paths=.../site-packages/gqa_t5x."""
  built = tmp_path / 'built'
  done = subprocess.run(
    [sys.executable, 'setup.py', '--quiet', 'build_py', f'--build-lib={built}'],
    cwd=copied(tmp_path / 'source'),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  # A top-level package named gin would hide gin-config.
  (package,) = built.iterdir()
  assert package.name == 'gqa_t5x'
  files = {path.relative_to(package).as_posix() for path in package.rglob('*.gin')}
  assert files == set(commands.gin_files())
  bindings = [
    "MODEL_DIR = 'gs://bucket/out'",
    "INITIAL_CHECKPOINT_PATH = 'gs://bucket/checkpoint_1000000'",
  ]
  for file in ('gin/uptrain_gqa8.gin', 'gin/uptrain_mqa.gin'):
    with commands.gin_config([file], bindings, search_path=package):
      heads = gin.query_parameter('NUM_KV_HEADS/macro.value')
      assert heads == {'gqa8': 8, 'mqa': 1}[pathlib.Path(file).stem.split('_')[1]]
      assert gin.query_parameter('MODEL_SIZE/macro.value') == 'xxl'


def copied(folder: pathlib.Path) -> pathlib.Path:
  """Copies what setup.py reads, so that building writes nothing here."""
  folder.mkdir()
  ignore = shutil.ignore_patterns('__pycache__')
  for name in ('gqa_t5x', 'gin'):
    shutil.copytree(ROOT / name, folder / name, ignore=ignore)
  for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, folder)
  return folder
