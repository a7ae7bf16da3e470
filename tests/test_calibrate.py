"""Calibration statistics, against NumPy loops over the layer norms' outputs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from flax import serialization, traverse_util
from t5x import adafactor, partitioning, utils

import __main__
import gin
from gqa_t5x import calibrate
from gqa_t5x.conversion.input_statistics import open_statistics
from gqa_t5x.conversion.input_sums import add_sums, mean_statistics, sum_inputs
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network
from gqa_t5x.training import calibration, models
from helpers import commands, tiny_task

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
LENGTHS = {'inputs': 24, 'targets': 8}


@pytest.fixture(scope='module')
def values():
  """Random parameters, also where T5 starts from a constant (layer norms)."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  init = functools.partial(network.Transformer(CONFIG).init, enable_dropout=False)
  tree = jax.eval_shape(init, jax.random.PRNGKey(0), tokens, tokens, tokens)['params']
  rng = np.random.default_rng(1)

  def draw(name, shape):
    if name.endswith('scale'):
      return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

  flat = traverse_util.flatten_dict(tree, sep='/')
  drawn = {name: draw(name, leaf.shape) for name, leaf in flat.items()}
  return traverse_util.unflatten_dict(drawn, sep='/')


def rows(texts, packed):
  """Puts texts, so many a row, into a batch of 7 rows; the rest is padding."""
  names = ('encoder_input_tokens', 'decoder_target_tokens', 'decoder_input_tokens')
  names += ('encoder_segment_ids', 'decoder_segment_ids')
  batch = {n: np.zeros((7, 36 if 'encoder' in n else 18), np.int32) for n in names}
  for row in range(7):
    start = {'encoder': 0, 'decoder': 0}
    for segment, text in enumerate(texts[row * packed : (row + 1) * packed], 1):
      for stack, name, tokens in zip(start, names, text, strict=False):
        place = row, slice(start[stack], start[stack] + len(tokens))
        batch[name][place] = tokens
        batch[f'{stack}_segment_ids'][place] = segment
        if stack == 'decoder':
          batch['decoder_input_tokens'][place] = [0, *tokens[:-1]]
        start[stack] += len(tokens)
  return batch


@pytest.fixture(scope='module')
def texts():
  """Six texts: tokens of inputs and of targets, of various lengths."""
  rng = np.random.default_rng(2)
  return [
    (rng.integers(3, 384, rng.integers(4, 11)), rng.integers(3, 384, targets))
    for targets in (3, 5, 6, 2, 4, 6)
  ]


_sums = jax.jit(sum_inputs, static_argnums=(0, 3))


def measured(values, *batches, config=CONFIG):
  """What the code makes of some batches."""
  totals = {}
  for batch in batches:
    add_sums(totals, _sums(network.Transformer(config), values, batch, True))
  return mean_statistics(totals)


@jax.jit
def norm_outputs(values, batch):
  """What each layer norm returns."""
  _, state = network.Transformer(CONFIG).apply(
    {'params': values},
    **batch,
    enable_dropout=False,
    capture_intermediates=lambda module, _: (module.name or '').endswith('norm'),
  )
  return state['intermediates']


def oracle(values, *batches):
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
    intermediates = norm_outputs(values, features)
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


def test_moments_are_those_of_the_loops(values, texts):
  """In two packed batches of unequal numbers of tokens; padding does not count."""
  batches = [rows(part, packed=3) for part in (texts[:2], texts[2:])]
  for batch in batches:
    batch['decoder_input_tokens'][batch['decoder_target_tokens'] == 0] = 77
  assert_moments(measured(values, *batches), oracle(values, *batches), MODULES)


def test_recomputed_layers_are_watched_too(values, texts):
  batch = rows(texts, packed=2)
  got = measured(values, batch, config=CONFIG.replace(remat_policy='full'))
  assert_moments(got, oracle(values, batch), MODULES)


def test_what_modules_share_is_one_array(values, texts):
  got = measured(values, rows(texts, packed=2))
  first, second = got[DECODER[0]], got[DECODER[2]]
  assert first.key is second.key
  assert first.value is second.value
  assert first.query is not second.query
  assert got[DECODER[1]].query is got[DECODER[1]].value


# --- From data and a checkpoint to the file -----------------------------------


@pytest.fixture(scope='module')
def saved(values, tmp_path_factory):
  """A checkpoint of step 7."""
  path = tmp_path_factory.mktemp('saved') / 'checkpoint_7'
  path.mkdir()
  tree = {'target': values, 'state': {'step': np.int32(7), 'param_states': {}}}
  data = serialization.msgpack_serialize({'version': 3, 'optimizer': tree})
  (path / 'checkpoint').write_bytes(data)
  return path


def run(saved, output, num_sequences=8, vocabulary=None, **data):
  """Runs the command's function on the tiny model and task."""
  vocabulary = vocabulary or tiny_task.vocabulary()
  model = models.EncoderDecoderModel(
    network.Transformer(CONFIG), vocabulary, vocabulary, adafactor.Adafactor()
  )
  cfg = utils.DatasetConfig(
    **{
      'mixture_or_task_name': tiny_task.NAME,
      'task_feature_lengths': LENGTHS,
      'split': 'validation',
      'batch_size': 3,
      'shuffle': False,
      'seed': 42,
      'pack': False,
      **data,
    }
  )
  calibrate.calibrate(
    model=model,
    dataset_cfg=cfg,
    restore_checkpoint_cfg=utils.RestoreCheckpointConfig(
      path=str(saved), mode='specific'
    ),
    partitioner=partitioning.PjitPartitioner(num_partitions=1),
    output=str(output),
    num_sequences=num_sequences,
    include_encoder=False,
  )


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


def assert_file(path, values, batch, info):
  opened = open_statistics(path)
  got = {module: opened.read(module) for module in opened.modules}
  assert_moments(got, oracle(values, batch), DECODER)
  count = {
    'encoder': np.count_nonzero(batch['encoder_input_tokens']),
    'decoder': np.count_nonzero(batch['decoder_target_tokens']),
  }
  info = {**info, 'num_tokens': count, 'num_sequences': len(batch[next(iter(batch))])}
  assert {name: opened.info[name] for name in info} == info
  assert opened.info['versions']['jax'] == jax.__version__


def test_all_of_a_small_split(saved, values, tmp_path, capsys):
  """8 rows that are not packed, 3 a batch, and more asked for."""
  run(saved, tmp_path / 'a.npz', num_sequences=100)
  info = {'checkpoint': str(saved), 'step': 7, 'task': 'tiny_words', 'packed': False}
  info |= {'split': 'validation', 'seed': 42}
  batch = task_batch('validation', False, LENGTHS, 8)
  assert_file(tmp_path / 'a.npz', values, batch, info)
  said = capsys.readouterr().out
  assert 'NUM_SEQUENCES=100, but the data has 8: all were used' in said


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'num_sequences': 0}, 'NUM_SEQUENCES=0 must be at least 1'),
    ({'vocabulary': tiny_task.vocabulary(extra_ids=5)}, '(?i)vocabularies'),
    ({}, 'tiny_words has no data in split validation'),
  ],
)
def test_bad_input(saved, tmp_path, monkeypatch, arguments, message):
  monkeypatch.setattr(calibration, 'read_batches', lambda *args: iter(()))
  with pytest.raises(ValueError, match=message):
    run(saved, tmp_path / 'a.npz', **arguments)
  assert not list(tmp_path.iterdir())


def test_output_is_not_overwritten(saved, tmp_path):
  (tmp_path / 'a.npz').write_text('mine')
  with pytest.raises(BadInput, match=r'a\.npz exists already; choose another'):
    run(saved, tmp_path / 'a.npz')
  assert (tmp_path / 'a.npz').read_text() == 'mine'


# --- On the command line ------------------------------------------------------


def command(folder, saved, **macros):
  """Arguments of Python for the command in a folder, on the tiny model and task."""
  commands.write_gin(folder)
  files = ['tiny.gin', 'gin/runs/calibrate.gin', 'task.gin']
  macros = {'CHECKPOINT_PATH': str(saved), 'OUTPUT': 'out.npz', **macros}
  return commands.engine_args('gqa_t5x.calibrate', files, **macros)


@pytest.mark.slow
def test_command(saved, values, tmp_path):
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
  assert_file(tmp_path / 'out.npz', values, batch, info)


@pytest.mark.parametrize(
  ('macros', 'message'),
  [
    ({'NUM_KV_HEADS': 2}, r'do not fit the model: .*key/kernel: \(128, 128\) in the'),
    ({'CHECKPOINT_PATH': 'lost'}, 'there is no checkpoint at /.*/lost: '),
  ],
)
def test_command_fails(saved, tmp_path, monkeypatch, capsys, macros, message):
  args = command(tmp_path, saved, **macros)[1:]
  monkeypatch.chdir(tmp_path)
  # As in a process of its own.
  monkeypatch.setattr(__main__, 'calibrate', calibrate.calibrate, raising=False)
  monkeypatch.setattr(gin.config, '_LOCATION_PREFIXES', [])
  gin.clear_config()
  gin.enter_interactive_mode()  # Another test may have registered its own `calibrate`.
  try:
    assert calibrate.main(args) == 1
  finally:
    gin.exit_interactive_mode()
    gin.clear_config()
  (error,) = re.findall('^error: .*$', capsys.readouterr().err, flags=re.MULTILINE)
  assert re.search(message, error)
  assert {path.suffix for path in tmp_path.iterdir()} == {'.gin'}


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
