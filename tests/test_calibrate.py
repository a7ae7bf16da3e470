"""Calibration statistics, against NumPy loops over the layer norms' outputs."""

import re

import jax
import numpy as np
import pytest
import seqio

import __main__
import gin
from gqa_t5x import calibrate
from gqa_t5x.checkpoints import folders
from gqa_t5x.conversion.input_statistics import open_statistics
from gqa_t5x.conversion.input_sums import add_sums, mean_statistics, means, sum_inputs
from gqa_t5x.conversion.output_refit import open_sums
from gqa_t5x.conversion.output_sums import sum_outputs
from gqa_t5x.model import network
from gqa_t5x.training import calibration, partitioning
from helpers import commands, model_oracle, tiny_task
from helpers.trees import flat, nest, run_convert, write_msgpack

# As commands.TINY_GIN.
CONFIG = network.config(
  'tiny', vocab_size=384, num_encoder_layers=1, num_decoder_layers=2
)
DECODER = [
  f'decoder/layers_{layer}/{name}'
  for layer in (0, 1)
  for name in ('encoder_decoder_attention', 'self_attention')
]
ENCODER = 'encoder/layers_0/attention'
MODULES = [ENCODER, *DECODER]
VALUES = model_oracle.params(CONFIG)


_sums = model_oracle.jit(sum_inputs, static_argnums=(0, 3))


def measured(*batches, config=CONFIG):
  """What the code makes of some batches."""
  totals = {}
  for batch in batches:
    add_sums(totals, _sums(network.Transformer(config), VALUES, batch, True))
  return mean_statistics(totals)


@model_oracle.jit
def norm_outputs(batch):
  """What each layer norm returns."""
  _, state = network.Transformer(CONFIG).apply(
    {'params': VALUES},
    **batch,
    enable_dropout=False,
    capture_intermediates=lambda module, _: (module.name or '').endswith('norm'),
  )
  return state['intermediates']


def oracle(*batches):
  """Module -> (query, key, value) moments, token by token in float64."""
  norms = {
    ENCODER: ('encoder', 'layers_0', 'pre_attention_layer_norm'),
    'encoded': ('encoder', 'encoder_norm'),
  }
  for path in DECODER:
    stack, layer, name = path.split('/')
    norm = 'self' if name == 'self_attention' else 'cross'
    norms[path] = (stack, layer, f'pre_{norm}_attention_layer_norm')
  seen = {name: [] for name in norms}  # sequences, each [length, D]
  for batch in batches:
    features = {k: v for k, v in batch.items() if k != 'decoder_loss_weights'}
    intermediates = norm_outputs(features)
    for name, place in norms.items():
      node = intermediates
      for key in place:
        node = node[key]
      tokens = 'encoder_input' if place[0] == 'encoder' else 'decoder_target'
      ids = batch.get(f'{place[0]}_segment_ids', batch[f'{tokens}_tokens'] > 0)
      for x, row in zip(np.asarray(node['__call__'][0], np.float64), ids, strict=True):
        seen[name] += [x[row == segment] for segment in set(row.tolist()) - {0}]

  def mean_outer(sequences):
    total = sum(np.outer(x, x) for sequence in sequences for x in sequence)
    return total / sum(len(sequence) for sequence in sequences)

  moments = {}
  for path in MODULES:
    read = seen['encoded' if 'encoder_decoder' in path else path]
    centred = [sequence - sequence.mean(axis=0) for sequence in read]
    moments[path] = (mean_outer(seen[path]), mean_outer(centred), mean_outer(read))
  return moments


def assert_moments(got, expected, modules):
  assert sorted(got) == sorted(modules)
  for module in modules:
    mine = (got[module].query, got[module].key, got[module].value)
    for name, array, wanted in zip('qkv', mine, expected[module], strict=True):
      assert array.dtype == np.float32
      message = f'{module} {name}'
      np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-5, err_msg=message)


# --- The maths ----------------------------------------------------------------


def test_moments_are_those_of_the_loops():
  """In two packed batches of unequal numbers of tokens; padding does not count."""
  first, second = model_oracle.packed_batch(), model_oracle.packed_batch()
  for array in second.values():
    array[1] = 0
  first['decoder_input_tokens'][first['decoder_target_tokens'] == 0] = 47
  assert_moments(measured(first, second), oracle(first, second), MODULES)


def test_recomputed_layers_are_watched_too():
  batch = model_oracle.packed_batch()
  got = measured(batch, config=CONFIG.replace(remat_policy='full'))
  assert_moments(got, oracle(batch), MODULES)
  # What modules share is one array.
  first, second = got[DECODER[0]], got[DECODER[2]]
  assert first.key is second.key
  assert first.value is second.value
  assert got[DECODER[1]].query is got[DECODER[1]].value


# --- The command ----------------------------------------------------------------


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A checkpoint of step 7."""
  path = tmp_path_factory.mktemp('saved') / 'checkpoint_7'
  tree = {'target': VALUES, 'state': {'step': np.int32(7), 'param_states': {}}}
  return write_msgpack(path, tree)


def command(folder, saved, **macros):
  """Arguments of Python for the command in a folder, on the tiny model and task."""
  commands.write_gin(folder)
  files = ['tiny.gin', 'gin/runs/calibrate.gin', 'task.gin']
  macros = {'CHECKPOINT_PATH': str(saved), 'OUTPUT': 'out.npz', **macros}
  return commands.engine_args('gqa_t5x.calibrate', files, **macros)


@pytest.fixture
def run(saved, tmp_path, monkeypatch, capsys):
  """Runs the command in this process; returns its exit code and what it said."""

  def run(**macros):
    args = command(tmp_path, saved, **macros)[1:]
    monkeypatch.chdir(tmp_path)
    one_device = jax.devices()[:1]
    monkeypatch.setattr(partitioning.Partitioner, 'devices', one_device)
    # As in a process of its own.
    monkeypatch.setattr(__main__, 'calibrate', calibrate.calibrate, raising=False)
    monkeypatch.setattr(gin.config, '_LOCATION_PREFIXES', [])
    gin.clear_config()
    commands.forget_main()
    try:
      return calibrate.main(args), ''.join(capsys.readouterr())
    finally:
      gin.clear_config()

  return run


def task_batch(split: str, pack: bool, lengths, count: int):
  """The first rows of the tiny task, as one batch."""
  dataset = seqio.get_dataset(
    tiny_task.NAME,
    lengths,
    dataset_split=split,
    shuffle=False,
    feature_converter=seqio.EncDecFeatureConverter(pack=pack),
  )
  return next(dataset.batch(count).as_numpy_iterator())


def assert_file(path, batch, info):
  opened = open_statistics(path)
  got = {module: opened.read(module) for module in opened.modules}
  assert_moments(got, oracle(batch), DECODER)
  count = {
    'encoder': np.count_nonzero(batch['encoder_input_tokens']),
    'decoder': np.count_nonzero(batch['decoder_target_tokens']),
  }
  info = {**info, 'num_tokens': count, 'num_sequences': len(batch[next(iter(batch))])}
  assert {name: opened.info[name] for name in info} == info
  assert opened.info['versions']['jax'] == jax.__version__


def test_all_of_a_small_split(run, saved, tmp_path):
  """8 rows that are not packed, 3 a batch, and more asked for."""
  unpacked = {'utils.DatasetConfig.pack': False, 'SPLIT': 'validation'}
  code, said = run(NUM_SEQUENCES=100, BATCH_SIZE=3, **unpacked)
  assert code == 0
  info = {'checkpoint': str(saved), 'step': 7, 'task': 'tiny_words', 'packed': False}
  info |= {'split': 'validation', 'seed': 42}
  batch = task_batch('validation', False, {'inputs': 24, 'targets': 8}, 8)
  assert_file(tmp_path / 'out.npz', batch, info)
  assert 'NUM_SEQUENCES=100, but the data has 8: all were used' in said


@pytest.fixture(scope='module')
def mqa(saved, tmp_path_factory):
  """Converted to one head."""
  out = tmp_path_factory.mktemp('mqa') / 'checkpoint_7'
  flags = (f'--input={saved}', f'--output={out}', '--num_kv_heads=1')
  assert run_convert(*flags, '--method=mean') == 0
  return out


CONVERTED = {'NUM_KV_HEADS': 1, 'utils.DatasetConfig.pack': False, 'BATCH_SIZE': 24}


def test_what_refits_the_outputs_of_a_converted_checkpoint(run, saved, mqa, tmp_path):
  """The sums of all rows, in three batches; `convert` takes the file."""
  paths = {'CHECKPOINT_PATH': str(mqa), 'ORIGINAL_PATH': str(saved)}
  code, said = run(**paths, **CONVERTED, NUM_SEQUENCES=64, SPLIT='train')
  assert code == 0
  assert 'Sums of 4 attention modules are in' in said
  batch, totals = task_batch('train', False, {'inputs': 24, 'targets': 8}, 64), {}
  values, _ = folders.read_params(mqa)
  sums = model_oracle.jit(sum_outputs, static_argnums=(0, 2))(
    network.Transformer(CONFIG), VALUES, CONFIG.replace(num_kv_heads=1), values, batch
  )
  add_sums(totals, sums)
  file = open_sums(tmp_path / 'out.npz')
  assert file.info['checkpoint'] == str(mqa)
  tokens = np.count_nonzero(batch['decoder_target_tokens'])
  assert file.info['num_tokens']['decoder'] == tokens > 128
  expected = means(totals)
  assert sorted(file.modules) == sorted(expected) == DECODER
  for module in DECODER:
    got = file.arrays(module)
    for name, wanted in expected[module].items():
      scale = np.abs(wanted).max()
      np.testing.assert_allclose(got[name] / scale, wanted / scale, atol=1e-5)
  flags = (f'--input={mqa}', f'--output={tmp_path}/refitted')
  assert run_convert(*flags, f'--refit_outputs={tmp_path}/out.npz') == 0


@pytest.mark.parametrize(
  ('macros', 'message'),
  [
    ({'SPLIT': 'validation'}, 'tokens for the decoder, .* takes 128 at least'),
    ({'ORIGINAL_PATH': 'lost'}, 'there is no checkpoint at /.*/lost'),
    ({'ORIGINAL_PATH': None}, 'the key/value heads of the original'),
    ({'network.config.mlp_dim': 99}, 'do not fit the model'),
    (
      {'INCLUDE_ENCODER': True},
      'INCLUDE_ENCODER is for statistics: with ORIGINAL_PATH',
    ),
  ],
)
def test_bad_originals(run, saved, mqa, tmp_path, macros, message):
  paths = {'CHECKPOINT_PATH': str(mqa), 'ORIGINAL_PATH': str(saved)}
  given = {**paths, **CONVERTED, 'NUM_SEQUENCES': 64, 'SPLIT': 'train', **macros}
  given['ORIGINAL_PATH'] = given['ORIGINAL_PATH'] or str(mqa)
  code, said = run(**given)
  assert code == 1
  assert re.search(message, said.splitlines()[-1])
  assert {path.suffix for path in tmp_path.iterdir()} == {'.gin'}


def test_statistics_know_their_checkpoint(run, saved, mqa, tmp_path, capsys):
  """Those of the converted one are refused for the original."""
  given = {'NUM_KV_HEADS': 1, 'CHECKPOINT_PATH': str(mqa), 'SPLIT': 'validation'}
  assert run(**given)[0] == 0
  flags = (f'--input={saved}', '--num_kv_heads=2', '--method=svd')
  flags += (f'--statistics={tmp_path}/out.npz', f'--output={tmp_path}/new')
  assert run_convert(*flags) == 1
  said = capsys.readouterr().err
  assert re.search(f'out.npz is of another checkpoint, step 7 of {mqa}: .*/key/', said)
  assert not (tmp_path / 'new').exists()


@pytest.mark.slow
def test_command(saved, tmp_path):
  """Packed rows of the training split, as gin/runs/calibrate.gin says."""
  lengths = {'inputs': 48, 'targets': 16}
  done = commands.run(
    tmp_path,
    *command(tmp_path, saved, NUM_SEQUENCES=5, TASK_FEATURE_LENGTHS=lengths),
  )
  assert done.returncode == 0, done.stdout[-3000:]
  assert 'Statistics of 4 attention modules are in' in done.stdout
  assert 'all were used' not in done.stdout
  assert re.search(r'Calibrating: +100%.* 5/5 ', done.stdout)
  batch = task_batch('train', True, lengths, 5)
  assert batch['encoder_segment_ids'].max() > 1
  info = {'packed': True, 'split': 'train', 'step': 7}
  assert_file(tmp_path / 'out.npz', batch, info)


@pytest.mark.parametrize(
  ('macros', 'message'),
  [
    ({'NUM_SEQUENCES': 0}, 'NUM_SEQUENCES=0 must be at least 1, and a whole number'),
    ({'tiny_task.vocabulary.extra_ids': 5}, '(?i)vocabularies'),
    ({'SPLIT': 'empty'}, "tiny_words has no split 'empty'; choose one of train, val"),
    ({}, 'tiny_words has no data in split train'),
    ({'OUTPUT': 'task.gin'}, r'task\.gin exists already; choose another'),
    ({'NUM_KV_HEADS': 2}, r'do not fit the model: .*key/kernel: \(128, 128\) in the'),
    ({'CHECKPOINT_PATH': 'lost'}, 'there is no checkpoint at /.*/lost: '),
  ],
)
def test_bad_input(run, tmp_path, monkeypatch, macros, message):
  monkeypatch.setattr(calibration, 'read_batches', lambda *args: iter(()))
  code, said = run(**macros)
  assert code == 1
  (error,) = re.findall('^error: .*$', said, flags=re.MULTILINE)
  assert re.search(message, error)
  assert {path.suffix for path in tmp_path.iterdir()} == {'.gin'}
  assert (tmp_path / 'task.gin').read_text() == commands.TASK_GIN


@pytest.mark.slow
def test_a_checkpoint_that_is_not_finite(run, tmp_path):
  """One weight before the last layer; nothing is written."""
  arrays = dict(flat(VALUES))
  name = 'decoder/layers_0/mlp/wo/kernel'
  arrays[name] = np.array(arrays[name])
  arrays[name][0, 0] = np.nan
  tree = {'target': nest(arrays), 'state': {'step': np.int32(7), 'param_states': {}}}
  source = write_msgpack(tmp_path.with_name('nan') / 'checkpoint_7', tree)
  code, said = run(CHECKPOINT_PATH=str(source), NUM_SEQUENCES=8)
  assert code == 1
  message = rf'error: {source} has values that are not finite, in {name}: it is of'
  assert re.match(message, said.splitlines()[-1])
  assert not (tmp_path / 'out.npz').exists()


@pytest.mark.parametrize(
  ('args', 'code', 'text'),
  [
    (['--help'], 0, 'NUM_SEQUENCES (rows of TASK_FEATURE_LENGTHS'),
    ([], 1, 'error: --gin_file is missing; see --help for an example'),
    (['--gin_file=x', 'y'], 1, "error: unexpected argument 'y'; see --help"),
    (['--gin.X'], 1, '--gin.X'),
  ],
)
def test_flags(args, code, text, capsys):
  assert calibrate.main(['calibrate', *args]) == code
  assert text in ''.join(capsys.readouterr())
