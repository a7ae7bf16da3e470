"""The stand-in for T5X: checkpoints in both layouts, training, resuming, inference."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tensorstore as ts
from flax import serialization

t5x = pytest.importorskip('t5x')
if not t5x.__version__.endswith('lite'):
  pytest.skip('the stand-in is not installed', allow_module_level=True)

from t5x import (  # noqa: E402
  checkpoints,
  partitioning,
  trainer,
  utils,
)
from t5x import train as train_lib  # noqa: E402

from helpers import t5x_parity_task as tiny  # noqa: E402

# --- Checkpoints --------------------------------------------------------------


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """An Orbax checkpoint of the toy, its state, and the initializer."""
  folder = str(tmp_path_factory.mktemp('run'))
  initializer = tiny.toy_initializer(tiny.toy_model())
  state = initializer.from_scratch(jax.random.PRNGKey(3)).replace_step(jnp.array(7))
  manager = checkpoints.OrbaxCheckpointManagerInterface(folder)
  manager.save(state)
  manager.close()
  return folder, state, initializer


def _write_legacy(folder, state_dict):
  """Writes T5X's legacy layout: matrices in TensorStore, the rest in msgpack."""
  os.makedirs(folder)

  def write(tree, path):
    if isinstance(tree, dict):
      return {k: write(v, (*path, k)) for k, v in tree.items()}
    x = np.asarray(tree)
    if x.ndim < 2:
      return x
    name = '.'.join(path)
    spec = {
      'driver': 'zarr',
      'dtype': x.dtype.name,
      'kvstore': {'driver': 'file', 'path': name},
      'metadata': {'shape': list(x.shape), 'chunks': [100, 100]},
    }
    full = {**spec, 'kvstore': {'driver': 'file', 'path': f'{folder}/{name}'}}
    ts.open(full, create=True).result().write(x).result()
    return spec

  optimizer = write(state_dict, ())
  contents = serialization.msgpack_serialize({'version': 3, 'optimizer': optimizer})
  with open(f'{folder}/checkpoint', 'wb') as f:
    f.write(contents)


def _assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a.state_dict(), b.state_dict())


def test_orbax_layout(saved):
  folder, state, _ = saved
  step = os.path.join(folder, 'checkpoint_7')
  assert {'state', 'dataset', '_CHECKPOINT_METADATA'} <= set(os.listdir(step))
  tree = checkpoints.load_t5x_checkpoint(step)
  flat = utils.flatten_dict_string_keys(tree)
  moments = [
    f'state/param_states/{p}/{m}'
    for p in ('table', 'out', 'scale')
    for m in ('v_row', 'v_col', 'v', 'm')
  ]
  expected = {'state/step', 'target/table', 'target/out', 'target/scale', *moments}
  assert set(flat) == expected
  np.testing.assert_array_equal(flat['target/out'], state.params['out'])


@pytest.mark.parametrize('layout', ['orbax', 'legacy'])
@pytest.mark.parametrize('optimizer', [True, False])
def test_restore(saved, tmp_path, layout, optimizer):
  folder, state, _ = saved
  path = os.path.join(folder, 'checkpoint_7')
  if layout == 'legacy':
    path = str(tmp_path / 'checkpoint_7')
    _write_legacy(path, state.state_dict())
  initializer = tiny.toy_initializer(tiny.toy_model(), optimizer)
  restored = initializer.from_checkpoint(path)
  assert int(restored.step) == 7
  np.testing.assert_array_equal(restored.params['table'], state.params['table'])
  if optimizer:
    _assert_same(restored, state)
  half = initializer.from_checkpoint(path, dtype='bfloat16')
  assert half.params['out'].dtype == jnp.bfloat16


def test_restore_reports_what_does_not_fit(saved):
  folder, _, _ = saved
  path = os.path.join(folder, 'checkpoint_7')
  with pytest.raises(ValueError, match=r'target/out: \(130, 384\) in the checkpoint'):
    tiny.toy_initializer(tiny.toy_model(width=131)).from_checkpoint(path)
  missing = os.path.join(folder, 'checkpoint_8')
  with pytest.raises(ValueError, match=r'no checkpoint at .*checkpoint_8'):
    tiny.toy_initializer(tiny.toy_model()).from_checkpoint(missing)


def test_restore_reports_a_partial_legacy_checkpoint(saved, tmp_path):
  _, state, initializer = saved
  path = str(tmp_path / 'checkpoint_7')
  _write_legacy(path, state.state_dict())
  os.rename(f'{path}/target.out', f'{path}/elsewhere')
  with pytest.raises(ValueError, match=r'incomplete.*target\.out'):
    initializer.from_checkpoint(path)


def test_restore_config_looks_where_it_is_told(saved, tmp_path):
  folder, _, _ = saved
  config, checkpoint = utils.RestoreCheckpointConfig, f'{folder}/checkpoint_7'
  assert config().find() is None
  assert config(path=str(tmp_path)).find() is None
  assert config(path=folder).find() == checkpoint
  assert config(path=checkpoint, mode='specific').find() == checkpoint
  with pytest.raises(FileNotFoundError, match='nowhere'):
    config(path=str(tmp_path / 'nowhere')).find()
  with pytest.raises(ValueError, match='newest'):
    config(path=folder, mode='newest')
  with pytest.raises(ValueError, match='one checkpoint'):
    config(path=[folder, folder])


# --- Training and inference ---------------------------------------------------


def _dataset_cfg(split='train', **kwargs):
  arguments = {
    'mixture_or_task_name': 'tiny_reversal',
    'task_feature_lengths': {'inputs': 32, 'targets': 32},
    'split': split,
    'batch_size': 4,
    'shuffle': split == 'train',
    'seed': 1,
    'pack': True,
  }
  return utils.DatasetConfig(**{**arguments, **kwargs})


def _trainer(num_microbatches=None):
  def make(**kwargs):
    schedule = utils.create_learning_rate_scheduler('constant', base_learning_rate=0.01)
    return trainer.Trainer(
      learning_rate_fn=schedule, num_microbatches=num_microbatches, **kwargs
    )

  return make


def _on_one_device():
  partitioner = partitioning.PjitPartitioner(num_partitions=1)
  devices = np.array(jax.devices()[:1]).reshape(1, 1)
  partitioner.mesh = jax.sharding.Mesh(devices, ('data', 'model'))
  return partitioner


@pytest.fixture(autouse=True, scope='module')
def compiled_quickly():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def _train(folder, steps, microbatches=None, **kwargs):
  save = utils.SaveCheckpointConfig(period=2, save_dataset=True)
  arguments = {
    'model': tiny.toy_model(dropout_rate=0.0 if microbatches else 0.1),
    'train_dataset_cfg': _dataset_cfg(),
    'train_eval_dataset_cfg': _dataset_cfg('validation'),
    'infer_eval_dataset_cfg': None,
    'checkpoint_cfg': utils.CheckpointConfig(save=save),
    'partitioner': _on_one_device(),
    'trainer_cls': _trainer(microbatches),
    'model_dir': str(folder),
    'total_steps': steps,
    'eval_steps': 2,
    'eval_period': 4,
    'random_seed': 0,
    'summarize_config_fn': lambda *_: None,
  }
  return train_lib.train(**{**arguments, **kwargs})


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
  step, whole = _train(tmp_path / 'whole', 4)
  assert step == 4
  _train(tmp_path / 'parts', 2)
  step, parts = _train(tmp_path / 'parts', 4)
  assert step == 4
  _assert_same(whole, parts)
  assert checkpoints.all_steps(str(tmp_path / 'parts')) == [0, 2, 4]
  with pytest.raises(
    ValueError, match="total_steps=3 is below the checkpoint's step 4"
  ):
    _train(tmp_path / 'parts', 3)
  with pytest.raises(ValueError, match='eval_period=3, checkpoint_period=2'):
    _train(tmp_path / 'parts', 6, eval_period=3)


def test_microbatches_add_up_to_the_batch(tmp_path):
  states = [
    _train(tmp_path / str(n), 1, n, checkpoint_cfg=utils.CheckpointConfig())[1]
    for n in (1, 2)
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    states[0].state_dict(),
    states[1].state_dict(),
  )


def test_preemption_saves_a_checkpoint(tmp_path):
  class Preempted(trainer.Trainer):
    def train(self, batch_iter, num_steps, start_step=None):
      super().train(batch_iter, 1, start_step).result()
      raise trainer.PreemptionError('the machine goes away')

  def make(**kwargs):
    return Preempted(
      learning_rate_fn=lambda step: 0.01, num_microbatches=None, **kwargs
    )

  with pytest.raises(trainer.PreemptionError):
    _train(tmp_path, 4, trainer_cls=make)
  assert checkpoints.all_steps(str(tmp_path)) == [0, 1]


def test_unknown_split_and_missing_dataset_state_are_named(tmp_path):
  with pytest.raises(ValueError, match="no split 'dev'"):
    _train(tmp_path / 'a', 2, train_dataset_cfg=_dataset_cfg('dev'))
  without = utils.CheckpointConfig(save=utils.SaveCheckpointConfig(period=2))
  _train(tmp_path / 'b', 2, checkpoint_cfg=without)
  with pytest.raises(ValueError, match='holds no dataset state'):
    _train(tmp_path / 'b', 4)


def test_infer_fn_pads_the_last_batch_and_keeps_the_order():
  model = tiny.toy_model()
  initializer = tiny.toy_initializer(model, optimizer=False)
  state = initializer.from_scratch(jax.random.PRNGKey(0))
  ds = seqio.get_mixture_or_task('tiny_reversal').get_dataset(
    {'inputs': 32, 'targets': 32}, 'validation', shuffle=False
  )
  ds = model.FEATURE_CONVERTER_CLS(pack=False)(ds, {'inputs': 32, 'targets': 32})
  partitioner = partitioning.PjitPartitioner(num_partitions=1)

  def run(batch_size):
    axes = initializer.train_state_axes
    fn = utils.get_infer_fn(model.score_batch, batch_size, axes, partitioner)
    return fn(ds.enumerate(), state)

  indices, scores = zip(*run(8), strict=True)
  assert indices == tuple(range(20))
  np.testing.assert_allclose(scores, [s for _, s in run(20)], rtol=1e-5)
  batch = next(ds.batch(1).as_numpy_iterator())
  logits = np.asarray(model._compute_logits(state.params, batch), np.float64)[0]
  expected = 0.0
  for x, token in zip(logits, batch['decoder_target_tokens'][0], strict=True):
    expected += (x[token] - np.log(np.exp(x).sum())) * (token != 0)
  np.testing.assert_allclose(scores[0], expected, rtol=1e-5)


def test_the_base_model_says_that_it_cannot_decode():
  with pytest.raises(NotImplementedError, match='gqa_t5x'):
    tiny.toy_model().predict_batch({}, {})
