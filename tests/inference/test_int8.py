"""Int8 through the Python API: what it computes, saves, and refuses."""

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import gqa_t5x
from gqa_t5x import convert, export
from gqa_t5x.checkpoints import folders, tree
from gqa_t5x.decoding import generate, sampling
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network, quantize
from helpers.golden_huggingface import GOLDEN, write

pytestmark = pytest.mark.usefixtures('quick_compilation')

ROWS = [row[row > 0].tolist() for row in GOLDEN['inputs']]
TARGETS = [row[1:].tolist() for row in GOLDEN['decoder_inputs']]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write(tmp_path_factory.mktemp('golden') / 't5', 't5_1_0')


@pytest.fixture(scope='module')
def saved(folder, tmp_path_factory):
  path = tmp_path_factory.mktemp('int8')
  gqa_t5x.load(folder).quantize('weights').save(path)
  return path / 'checkpoint_0'


@pytest.mark.parametrize('what', quantize.QUANTIZATIONS)
def test_decodes_are_those_of_generate(folder, what):
  """And the loss is near that of floats, but another."""
  exact = gqa_t5x.load(folder)
  model = gqa_t5x.load(folder, quantize=what)
  assert what.replace('_', ' ') in repr(model)
  assert model.num_parameters == exact.num_parameters
  decoded = model.generate(ROWS, max_length=5)
  cfg = dataclasses.replace(exact.config, quantize=what)
  for ids, tokens in zip(ROWS, decoded, strict=True):
    expected, _ = generate.generate(
      network.Transformer(cfg),
      exact.params,
      jnp.array([ids]),
      jnp.zeros((1, 5), jnp.int32),
      sampling.greedy,
      eos_id=1,
    )
    expected = expected[0, 0].tolist()
    assert tokens == expected[: expected.index(1) if 1 in expected else 5]
  more = model.loss(ROWS, TARGETS) - exact.loss(ROWS, TARGETS)
  assert 1e-6 < abs(more) < 0.05


def test_a_saved_model_is_the_same(folder, saved, tmp_path):
  """Kernels are half of bfloat16's bytes; no float copy and no moments are written."""
  model = gqa_t5x.load(folder).quantize('weights')
  again = gqa_t5x.load(saved)
  assert again.config.quantize == 'weights'
  flat, other = dict(tree.flatten(model.params)), dict(tree.flatten(again.params))
  assert flat.keys() == other.keys()
  for name, x in flat.items():
    assert x.dtype == other[name].dtype
    np.testing.assert_array_equal(x, other[name])
  stored = folders.open_checkpoint(epath.Path(saved), int8=True)
  kernels = [t for name, t in stored.items() if name.endswith('/kernel')]
  assert {t.dtype for t in kernels} == {np.dtype(np.int8)}
  assert not any('param_states' in name for name in stored)
  assert again.loss(ROWS, TARGETS) == model.loss(ROWS, TARGETS)
  both = gqa_t5x.load(saved, quantize='weights_and_cache', dtype='bfloat16')
  assert both.config.quantize == 'weights_and_cache'
  kinds = {n.rpartition('/')[2]: x.dtype for n, x in tree.flatten(both.params)}
  expected = {'kernel': 'int8', 'kernel_scale': 'float32', 'scale': 'bfloat16'}
  assert {name: str(kinds[name]) for name in expected} == expected


def test_over_eight_devices(folder):
  """The kernels lie where those in float would, and the decodes are the same."""
  model = gqa_t5x.load(folder, quantize='weights_and_cache')
  spread = gqa_t5x.load(folder, quantize='weights_and_cache', model_partitions=2)
  wi = spread.params['decoder']['layers_0']['mlp']['wi']
  assert wi['kernel'].dtype == jnp.int8
  for name, axis in (('kernel', 1), ('kernel_scale', 0)):
    shard = wi[name].sharding.shard_shape(wi[name].shape)
    assert shard[axis] == wi[name].shape[axis] // 2
  assert spread.generate(ROWS, max_length=5) == model.generate(ROWS, max_length=5)
  assert len(jax.devices()) == 8


@pytest.mark.parametrize(
  ('act', 'message'),
  [
    (
      lambda m: m.quantize('int4'),
      "quantize='int4' is unknown; choose one of weights,",
    ),
    (lambda m: m.quantize('cache'), "quantize='cache' needs weights in float"),
    (lambda m: m.convert(1, 'mean'), 'convert needs weights in float, and those of'),
    (lambda m: m.calibrate(['a'], 'x.npz'), 'calibrate needs weights in float'),
    (lambda m: m.export('x', 't5x'), 'export needs weights in float'),
  ],
)
def test_what_int8_cannot(saved, act, message):
  with pytest.raises(BadInput, match=re.escape(message)):
    act(gqa_t5x.load(saved))


def test_commands_refuse_the_checkpoint(saved, tmp_path, capsys):
  """By name; nothing is written."""
  out = tmp_path / 'out'
  io = [f'--input={saved}', f'--output={out}']
  assert convert.main(['convert', *io, '--num_kv_heads=1', '--method=mean']) == 1
  assert export.main(['export', *io, '--format=huggingface']) == 1
  for line in capsys.readouterr().err.strip().splitlines():
    assert re.search(rf'{saved} has \d+ kernels in int8, and here they must be', line)
  assert not os.path.exists(out)
