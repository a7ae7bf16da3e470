"""The index of Flax's msgpack files: right tensors, none read early, damage found."""

import concurrent.futures
import contextlib
import io
import tracemalloc
import types

import ml_dtypes
import msgpack
import numpy as np
import pytest
from etils import epath
from flax import serialization

from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.checkpoints.msgpack_index import read_tree
from gqa_t5x.errors import BadInput
from helpers.trees import flat

SPEC = {
  'driver': 'zarr',
  'dtype': 'float32',
  'kvstore': {'driver': 'file', 'path': 'target.x/'},
  'metadata': {'chunks': [2, 3], 'compressor': None, 'shape': [2, 3]},
}


def arrays():
  """One array of every dtype, and odd shapes."""
  values = np.arange(6).reshape(2, 3) - 2
  kinds = ('int8', 'int16', 'int32', 'int64', 'float16', 'float32', 'float64')
  kinds += ('complex64', 'complex128')
  unsigned = ('bool', 'uint8', 'uint16', 'uint32', 'uint64')
  return {
    **{kind: (values * 1.5).astype(kind) for kind in kinds},
    **{kind: (values + 2).astype(kind) for kind in unsigned},
    'bfloat16': (values / 3).astype(ml_dtypes.bfloat16),
    'scalar array': np.asarray(7, np.int32),
    'scalar': np.float32(0.1),
    'small scalar': np.int8(-3),
    'empty': np.zeros((0, 4), np.float32),
    'of 300 bytes': np.arange(75, dtype=np.float32).reshape(3, 25, 1),
    'of 70,000 bytes': np.arange(17_500, dtype=np.float32),
    'not contiguous': np.arange(12, dtype=np.int64).reshape(3, 4).T,
  }


def write(tmp_path, content):
  file = epath.Path(tmp_path) / 'checkpoint'
  if not isinstance(content, bytes):
    content = serialization.msgpack_serialize(content)
  file.write_bytes(content)
  return file


def assert_tensor(tensor, expected):
  assert isinstance(tensor, LazyTensor)
  assert tensor.shape == expected.shape
  assert tensor.dtype == expected.dtype
  got = tensor.read()
  assert got.shape == expected.shape
  assert got.dtype == expected.dtype
  assert got.flags.c_contiguous
  np.testing.assert_array_equal(got, expected)


def test_every_kind_of_tensor(tmp_path):
  tree = {'version': 3, 'optimizer': {'target': arrays()}}
  got = read_tree(write(tmp_path, tree))
  assert set(got) == {'version', 'optimizer'}
  assert got['version'] == 3
  assert set(got['optimizer']['target']) == set(arrays())
  for name, expected in arrays().items():
    assert_tensor(got['optimizer']['target'][name], expected)


def test_plain_values_are_those_of_python(tmp_path):
  numbers = [0, 127, 128, 255, 256, 2**16, 2**32, 2**63, -1, -32, -33, -129, -(2**31)]
  tree = {
    'spec': SPEC,
    'numbers': [*numbers, -(2**40), 0.1, True, False, None, 1 - 2j],
    'texts': ['', 'x' * 40, 'é' * 200, 'y' * 70_000],
    'many': {str(i): i for i in range(70_000)},
    'long': list(range(20)),
    'none': {},
  }
  assert read_tree(write(tmp_path, tree)) == tree


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_chunked_tensor_is_joined(dtype, tmp_path, monkeypatch):
  monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 64)
  values = np.arange(5 * 7 * 3).reshape(5, 7, 3).astype(dtype)
  file = write(tmp_path, {'a': {'big': values, 'after': np.arange(3)}})
  stored = msgpack.unpackb(file.read_bytes(), strict_map_key=False)['a']['big']
  assert len(stored['chunks']) == {4: 7, 2: 4}[values.itemsize]
  got = read_tree(file)
  assert_tensor(got['a']['big'], values)
  assert_tensor(got['a']['after'], np.arange(3))


def test_threads_read_at_the_same_time(tmp_path):
  rng = np.random.default_rng(0)
  tree = {str(i): rng.normal(size=(50, i + 1)) for i in range(40)}
  tensors = read_tree(write(tmp_path, tree))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    results = list(pool.map(lambda name: tensors[name].read(), tree))
  for got, expected in zip(results, tree.values(), strict=True):
    np.testing.assert_array_equal(got, expected)


def test_each_read_gives_an_array_of_its_own(tmp_path):
  tensor = read_tree(write(tmp_path, {'a': np.arange(4)}))['a']
  tensor.read()[:] = 9
  np.testing.assert_array_equal(tensor.read(), [0, 1, 2, 3])


class Bucket:
  """A file as etils gives it for gs://: its handle has `read` and `seek`, no more."""

  def __init__(self, data):
    self.data = data

  def __str__(self):
    return 'gs://bucket/checkpoint'

  def stat(self):
    return types.SimpleNamespace(length=len(self.data))

  @contextlib.contextmanager
  def open(self, mode):
    assert mode == 'rb'
    handle = io.BytesIO(self.data)
    yield types.SimpleNamespace(read=handle.read, seek=handle.seek)


def test_file_in_a_bucket():
  tensors = read_tree(Bucket(serialization.msgpack_serialize(arrays())))
  for name, expected in arrays().items():
    assert_tensor(tensors[name], expected)


# --- Memory ---------------------------------------------------------------------


def head(shape, nbytes, dtype='float32'):
  """What comes before the bytes of an array, built by hand after msgpack's text."""
  inner = b'\x93' + msgpack.packb(shape) + msgpack.packb(dtype)
  inner += b'\xc6' + nbytes.to_bytes(4, 'big')
  return b'\xc9' + (len(inner) + nbytes).to_bytes(4, 'big') + b'\x01' + inner


def write_sparse(file, parts):
  """Writes bytes, and holes of the given sizes that take no disk."""
  with file.open('wb') as handle:
    for part in parts:
      if isinstance(part, bytes):
        handle.write(part)
      else:
        handle.seek(part, 1)


@pytest.mark.parametrize('chunked', [False, True])
def test_opening_reads_no_tensor(chunked, tmp_path):
  file, GiB = epath.Path(tmp_path / 'checkpoint'), 2**30
  if chunked:
    shape = msgpack.packb({'0': 768, '1': 2**20})
    parts = [b'\x83', msgpack.packb('__msgpack_chunked_array__'), b'\xc3']
    parts += [msgpack.packb('shape'), shape, msgpack.packb('chunks'), b'\x83']
    for i in range(3):
      parts += [msgpack.packb(str(i)), head([2**28], GiB), GiB]
  else:
    parts = [head([768, 2**20], 3 * GiB), 3 * GiB]
  small = np.arange(5, dtype=np.float32)
  last = [msgpack.packb('small'), head([5], 20), small.tobytes()]
  write_sparse(file, [b'\x82', msgpack.packb('big'), *parts, *last])
  assert file.stat().length > 3 * GiB
  tracemalloc.start()
  try:
    tensors = read_tree(file)
    assert tensors['big'].shape == (768, 2**20)
    assert tensors['big'].nbytes == 3 * GiB
    assert_tensor(tensors['small'], small)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
  finally:
    tracemalloc.stop()


def test_reading_makes_one_copy(tmp_path):
  tensor = read_tree(write(tmp_path, {'a': np.ones((1000, 1000))}))['a']
  tracemalloc.start()
  try:
    assert tensor.read().sum() == 1_000_000
    assert 8_000_000 <= tracemalloc.get_traced_memory()[1] < 8_500_000
  finally:
    tracemalloc.stop()


# --- Damage ---------------------------------------------------------------------


def small_tree():
  return {
    'version': 3,
    'optimizer': {
      'target': {
        'layers_0': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3) + 1e-3},
        'layers_1': {'kernel': np.arange(6, 12).astype(ml_dtypes.bfloat16)},
        'spec': SPEC,
      },
      'state': {'step': np.int32(1000)},
    },
  }


def payloads():
  return [a.tobytes() for _, a in flat(small_tree()) if hasattr(a, 'tobytes')]


def test_truncated_at_any_byte():
  data = serialization.msgpack_serialize(small_tree())
  for length in range(len(data)):
    with pytest.raises(BadInput) as error:
      read_tree(Bucket(data[:length]))
    text = str(error.value)
    assert text.startswith(
      f'gs://bucket/checkpoint is truncated or damaged ({length} bytes): '
    )
    assert '\n' not in text


def test_truncated_within_a_tensor_names_it(tmp_path):
  data = serialization.msgpack_serialize(small_tree())
  end = data.index(payloads()[1]) + 5
  with pytest.raises(BadInput) as error:
    read_tree(write(tmp_path, data[:end]))
  assert (
    'in optimizer/target/layers_1/kernel: 12 bytes are expected, 5 are left'
    in str(error.value)
  )


def test_flipped_bit_never_gives_a_wrong_tensor():
  """Outside of the tensors' own bytes, where nothing could tell."""
  data = serialization.msgpack_serialize(small_tree())
  covered = {data.index(part) + i for part in payloads() for i in range(len(part))}
  assert len(covered) == 24 + 12 + 4
  expected = dict(flat(small_tree()))
  refused = tried = 0
  for byte in sorted(set(range(len(data))) - covered):
    for bit in range(8):
      flipped = bytearray(data)
      flipped[byte] ^= 1 << bit
      tried += 1
      try:
        tree = read_tree(Bucket(bytes(flipped)))
      except BadInput:
        refused += 1
        continue
      for path, tensor in flat(tree):
        if isinstance(tensor, LazyTensor) and path in expected:
          assert_tensor(tensor, np.asarray(expected[path]))
  # The rest are other letters in a name, and other numbers in the specification.
  assert 0.4 < refused / tried < 0.9


ARRAY = msgpack.packb([[2], 'int8', b'ab'])


def extension(inner, code=1):
  return msgpack.packb({'x': msgpack.ExtType(code, inner)})


def chunked(shape, *chunks, marker='__msgpack_chunked_array__'):
  chunks = {
    str(i): msgpack.ExtType(1, msgpack.packb(chunk)) for i, chunk in enumerate(chunks)
  }
  return msgpack.packb({'x': {marker: True, 'shape': shape, 'chunks': chunks}})


ONE = [[2], 'int8', b'ab']


DAMAGE = (
  (b'', '1 bytes are expected, 0 are left'),
  (b'\x05', 'it does not hold a tree of tensors'),
  (msgpack.packb([1, 2]), 'it does not hold a tree of tensors'),
  (b'\x81\xa1x\xc1', 'in x: the byte 0xc1 is not of msgpack'),
  (msgpack.packb({'x': 1}) + b'\0', 'its tree ends after 4 bytes'),
  (msgpack.packb({1: 2}), 'a string is expected, a value found'),
  (b'\x82\xa1x\x01\xa1x\x02', "the key 'x' comes twice"),
  (b'\x81\xa1\xff\x01', 'a string is not UTF-8'),
  (b'\x81\xa1x\xdd\xff\xff\xff\xff', 'the length 4294967295 of a part that is not'),
  (b'\x81\xa1x\xdb\x7f\xff\xff\xff', 'the length 2147483647 of a part that is not'),
  (b'\x81\xa1x' * 100 + b'\x01', 'more than 64 levels'),
  (b'\x81\xa1x' + b'\x91' * 100 + b'\x01', 'more than 64 levels'),
  (extension(ARRAY, code=5), 'in x: the extension type 5 is not of Flax'),
  (extension(ARRAY, code=3), 'a scalar has shape (2,)'),
  (extension(ARRAY + b'\0'), '12 bytes of tensor are in 13 bytes of space'),
  (extension(ARRAY[:-1]), '2 bytes are expected, 1 are left'),
  (extension(msgpack.packb([[2], 'int8'])), 'is not shape, dtype and bytes'),
  (extension(msgpack.packb([[3], 'int8', b'ab'])), 'int8 (3,) is 3 bytes, 2 are'),
  (extension(msgpack.packb([[-2], 'int8', b'ab'])), '(-2,) is not a shape'),
  (extension(msgpack.packb([[2.0], 'int8', b'ab'])), '(2.0,) is not a shape'),
  (extension(msgpack.packb([[2], 'int9', b'ab'])), "the dtype 'int9' is unknown"),
  (extension(msgpack.packb([[2], 'object', b'ab'])), "dtype 'object' is unknown"),
  (extension(msgpack.packb([[2], 'int8', 'ab'])), 'a bytes is expected, a string'),
  (extension(msgpack.packb([[2], b'int8', b'ab'])), 'a string is expected, a bytes'),
  (extension(msgpack.packb([['a'], 'int8', b'ab'])), 'a value is expected, a string'),
  (extension(msgpack.packb([1.0]), code=2), 'a complex number is not two numbers'),
  (extension(msgpack.packb([1.0, None]), code=2), '(1.0, None) is not a complex'),
  (chunked({'0': 3}, ONE), '2 elements in the chunks of a tensor of shape (3,)'),
  (chunked({'1': 2}, ONE), 'a chunked tensor lacks a part'),
  (chunked([2], ONE), 'a chunked tensor lacks a part'),
  (chunked({'0': 2}), 'the parts of a chunked tensor do not belong together'),
  (chunked({'0': 3}, ONE, [[1], 'uint8', b'a']), 'do not belong together'),
  (chunked({'0': 2}, [[1, 2], 'int8', b'ab']), 'do not belong together'),
)


@pytest.mark.parametrize(('content', 'message'), DAMAGE, ids=range(len(DAMAGE)))
def test_damage(content, message, tmp_path):
  file = write(tmp_path, content)
  with pytest.raises(BadInput) as error:
    read_tree(file)
  start = f'{file} is truncated or damaged ({len(content)} bytes): '
  assert str(error.value).startswith(start)
  assert message in str(error.value)


def test_file_that_changes_after_it_was_opened(tmp_path):
  file = write(tmp_path, {'a': {'b': np.arange(100)}})
  tensor = read_tree(file)['a']['b']
  file.write_bytes(file.read_bytes()[:-300])
  with pytest.raises(BadInput) as error:
    tensor.read()
  assert f'cannot read the tensor a/b of {file}: 800 bytes are expected' in str(
    error.value
  )
  assert '500 are there' in str(error.value)
