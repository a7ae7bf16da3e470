"""The stand-in for T5X: checkpoints in both layouts, training, resuming."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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

from helpers import commands, tiny_task, toy, trees  # noqa: E402

# --- Checkpoints --------------------------------------------------------------


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """An Orbax checkpoint of the toy, its state, and the initializer."""
  folder = str(tmp_path_factory.mktemp('run'))
  initializer = toy.toy_initializer(toy.toy_model())
  state = initializer.from_scratch(jax.random.PRNGKey(3)).replace_step(jnp.array(7))
  manager = checkpoints.OrbaxCheckpointManagerInterface(folder)
  manager.save(state)
  manager.close()
  return folder, state, initializer


def _assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a.state_dict(), b.state_dict())


@pytest.fixture(params=['orbax', 'legacy'])
def path(request, saved, tmp_path):
  """The checkpoint of step 7 in each layout; Orbax's by the stand-in itself."""
  folder, state, _ = saved
  if request.param == 'orbax':
    return f'{folder}/checkpoint_7'
  return str(trees.write_t5x(tmp_path / 'checkpoint_7', state.state_dict()))


@pytest.mark.parametrize('optimizer', [True, False])
def test_restore(saved, path, optimizer):
  _, state, _ = saved
  trees.assert_same(trees.read(path), state.state_dict())
  initializer = toy.toy_initializer(toy.toy_model(), optimizer)
  restored = initializer.from_checkpoint(path)
  assert int(restored.step) == 7
  np.testing.assert_array_equal(restored.params['table'], state.params['table'])
  if optimizer:
    _assert_same(restored, state)
  half = initializer.from_checkpoint(path, dtype='bfloat16')
  assert half.params['out'].dtype == jnp.bfloat16


def test_restore_reports_what_does_not_fit(path):
  with pytest.raises(ValueError, match=r'target/out: \(130, 384\) in the checkpoint'):
    toy.toy_initializer(toy.toy_model(width=131)).from_checkpoint(path)
  missing = path.replace('checkpoint_7', 'checkpoint_8')
  with pytest.raises(ValueError, match=r'no checkpoint at .*checkpoint_8'):
    toy.toy_initializer(toy.toy_model()).from_checkpoint(missing)


def test_restore_reports_a_partial_legacy_checkpoint(saved, tmp_path):
  _, state, initializer = saved
  path = trees.write_t5x(tmp_path / 'checkpoint_7', state.state_dict())
  shutil.rmtree(path / 'target.out')
  with pytest.raises(ValueError, match=r'incomplete.*target\.out'):
    initializer.from_checkpoint(str(path))


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


# --- Training -----------------------------------------------------------------


def _dataset_cfg(split='train', **kwargs):
  arguments = {
    'mixture_or_task_name': tiny_task.NAME,
    'task_feature_lengths': {'inputs': 32, 'targets': 32},
    'split': split,
    'batch_size': 4,
    'shuffle': split == 'train',
    'seed': 1,
    'pack': True,
  }
  return utils.DatasetConfig(**{**arguments, **kwargs})


def _trainer(cls=trainer.Trainer, num_microbatches=None):
  return functools.partial(
    cls, learning_rate_fn=lambda step: 0.01, num_microbatches=num_microbatches
  )


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
    'model': toy.toy_model(dropout_rate=0.0 if microbatches else 0.1),
    'train_dataset_cfg': _dataset_cfg(),
    'train_eval_dataset_cfg': _dataset_cfg('validation'),
    'infer_eval_dataset_cfg': None,
    'checkpoint_cfg': utils.CheckpointConfig(save=save),
    'partitioner': _on_one_device(),
    'trainer_cls': _trainer(num_microbatches=microbatches),
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

  with pytest.raises(trainer.PreemptionError):
    _train(tmp_path, 4, trainer_cls=_trainer(Preempted))
  assert checkpoints.all_steps(str(tmp_path)) == [0, 1]


def test_unknown_split_and_missing_dataset_state_are_named(tmp_path):
  with pytest.raises(ValueError, match="no split 'dev'"):
    _train(tmp_path / 'a', 2, train_dataset_cfg=_dataset_cfg('dev'))
  without = utils.CheckpointConfig(save=utils.SaveCheckpointConfig(period=2))
  _train(tmp_path / 'b', 2, checkpoint_cfg=without)
  with pytest.raises(ValueError, match='holds no dataset state'):
    _train(tmp_path / 'b', 4)


def test_the_base_model_says_that_it_cannot_decode():
  with pytest.raises(NotImplementedError, match='gqa_t5x'):
    toy.toy_model().predict_batch({}, {})


@pytest.mark.parametrize('module', ['t5x.eval', 't5x.infer'])
def test_the_last_line_names_a_binding_that_gin_cannot_read(module, tmp_path):
  words = ['--gin_file=no.gin', '--gin.SPLIT=test', '--gin.B=1']
  done = commands.run(tmp_path, '-m', module, *words)
  assert done.returncode == 1
  *_, last = done.stdout.splitlines()
  assert '--gin.SPLIT=test: gin cannot read this value. Text needs quotes' in last
