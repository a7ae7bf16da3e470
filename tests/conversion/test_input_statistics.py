"""The file of calibration statistics: what is written is read, and damage is said."""

import json
import re
import zipfile

import numpy as np
import pytest

from gqa_t5x.conversion import input_statistics
from gqa_t5x.conversion.input_statistics import InputStatistics
from gqa_t5x.errors import BadInput

SELF = 'decoder/layers_0/self_attention'
CROSS = 'decoder/layers_{}/encoder_decoder_attention'
INFO = {'checkpoint': 'gs://bucket/checkpoint_7', 'step': 7, 'num_sequences': 3}
D = 3
# Arrays told apart by their corner.
ARRAYS = {
  name: np.arange(D * D, dtype=np.float32).reshape(D, D) + 100 * i
  for i, name in enumerate(['x', 'centred', 'cross_0', 'cross_1', 'encoded', 'keys'])
}


@pytest.fixture
def path(tmp_path):
  """A file of three modules that share arrays as attention does."""
  encoded = {'key': ARRAYS['keys'], 'value': ARRAYS['encoded']}
  statistics = {
    SELF: InputStatistics(ARRAYS['x'], ARRAYS['centred'], ARRAYS['x']),
    CROSS.format(0): InputStatistics(ARRAYS['cross_0'], **encoded),
    CROSS.format(1): InputStatistics(ARRAYS['cross_1'], **encoded),
  }
  file = tmp_path / 'new' / 'statistics.npz'
  input_statistics.write_statistics(file, statistics, INFO)
  return file


@pytest.mark.parametrize(
  ('module', 'expected'),
  [
    (SELF, ('x', 'centred', 'x')),
    (CROSS.format(0), ('cross_0', 'keys', 'encoded')),
    (CROSS.format(1), ('cross_1', 'keys', 'encoded')),
  ],
)
def test_what_is_written_is_read(path, module, expected):
  opened = input_statistics.open_statistics(path)
  assert opened.info == INFO
  statistics = opened.read(module)
  for name, array in zip(('query', 'key', 'value'), expected, strict=True):
    got = getattr(statistics, name)
    np.testing.assert_array_equal(got, ARRAYS[array])
    assert got.dtype == np.float32
  assert list(path.parent.iterdir()) == [path]


def test_shared_arrays_are_stored_once(path):
  with np.load(path) as file:
    arrays = [name for name in file.files if name != 'index.json']
    assert sorted(file[name][0, 0] for name in arrays) == [0, 100, 200, 300, 400, 500]


def test_only_the_module_asked_for_is_read(path):
  """Damage to one module's array leaves the others readable."""
  flip_byte(path, ARRAYS['cross_1'].tobytes())
  opened = input_statistics.open_statistics(path)
  np.testing.assert_array_equal(opened.read(SELF).key, ARRAYS['centred'])
  with pytest.raises(BadInput, match='damaged'):
    opened.read(CROSS.format(1))


def test_float64_is_stored_as_float32_and_a_diagonal_as_a_vector(tmp_path):
  diagonal = np.array([1.0, 0.1, 4.0])
  statistics = {SELF: InputStatistics(diagonal, diagonal, diagonal)}
  input_statistics.write_statistics(tmp_path / 'a.npz', statistics, {})
  got = input_statistics.open_statistics(tmp_path / 'a.npz').read(SELF)
  np.testing.assert_array_equal(got.key, np.float32([1.0, 0.1, 4.0]))
  assert got.key.dtype == np.float32


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_failure_leaves_the_old_file(path, bad):
  before = path.read_bytes()
  broken = np.full((D, D), bad)
  statistics = {SELF: InputStatistics(ARRAYS['x'], broken, ARRAYS['x'])}
  message = f'the key statistics of {SELF} are not finite'
  with pytest.raises(BadInput, match=message):
    input_statistics.write_statistics(path, statistics, INFO)
  assert path.read_bytes() == before
  assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_not_finite(path, monkeypatch):
  monkeypatch.setattr(input_statistics.np, 'isfinite', lambda x: np.ones(1, bool))
  broken = np.full((D, D), np.nan)
  rewrite(ARRAYS['x'], broken, ARRAYS['x'])(path)
  monkeypatch.undo()
  with pytest.raises(
    BadInput, match=f'{path} has values that are not finite in .*{SELF}'
  ):
    input_statistics.open_statistics(path).read(SELF)


# --- Bad input ----------------------------------------------------------------


def flip_byte(path, part: bytes) -> None:
  """Damages the file where it holds these bytes."""
  data = bytearray(path.read_bytes())
  assert data.count(part) == 1
  data[data.index(part) + len(part) // 2] ^= 0xFF
  path.write_bytes(data)


def rewrite_index(path, change) -> None:
  """Changes the index, a dict, in a file that is whole otherwise."""
  with zipfile.ZipFile(path) as file:
    members = {name: file.read(name) for name in file.namelist()}
  index = json.loads(members['index.json'])
  change(index)
  with zipfile.ZipFile(path, 'w') as file:
    for name, data in (members | {'index.json': json.dumps(index)}).items():
      file.writestr(name, data)


def rewrite(*moments):
  """What writes the moments of one module alone."""
  statistics = {SELF: InputStatistics(*moments)}
  return lambda path: input_statistics.write_statistics(path, statistics, INFO)


def check_and_read(path) -> None:
  opened = input_statistics.open_statistics(path)
  opened.check(SELF, D)
  opened.read(SELF)


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (
      lambda path: path.write_bytes(path.read_bytes()[:-40]),
      'cannot read its index .File is not a zip file',
    ),
    (
      lambda path: np.savez(path, x=ARRAYS['x']),
      "cannot read its index .*no item named 'index.json'",
    ),
    (
      lambda path: rewrite_index(path, lambda index: index.update(format=9)),
      'cannot read its index .format 9, expected 1',
    ),
    (
      lambda path: rewrite_index(
        path, lambda i: i['modules'][SELF].update(key='gone.npy')
      ),
      f'cannot read the statistics of {SELF} .*gone.npy',
    ),
    (
      rewrite(ARRAYS['x'], np.ones((2, 2)), ARRAYS['x']),
      r'are of shape \(2, 2\), expected .* with D=3',
    ),
    (
      rewrite(*[np.ones((D, D + 1))] * 3),
      r'are of shape \(3, 4\), expected .* with D=3, .* another checkp',
    ),
    (lambda path: flip_byte(path, ARRAYS['centred'].tobytes()), 'Bad CRC-32'),
    (lambda path: path.unlink(), 'there is no file of statistics .*gqa_t5x.calibrate'),
  ],
)
def test_damage_is_said(path, damage, message):
  damage(path)
  with pytest.raises(BadInput, match=message) as caught:
    check_and_read(path)
  assert str(path) in str(caught.value)
  assert '\n' not in str(caught.value)


def test_statistics_of_another_model(path):
  message = 'no statistics of encoder/.*3 modules of step 7'
  with pytest.raises(BadInput, match=re.escape(str(path)) + '.*' + message):
    input_statistics.open_statistics(path).check('encoder/layers_0/attention', D)
