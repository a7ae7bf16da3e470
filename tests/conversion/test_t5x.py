"""Google's own T5X restores what was converted, and trains on from it.

Runs where T5X_DIR, AIRIO_DIR and JESTIMATOR_DIR name folders of the real ones, in a
process of its own (this file, as a script), where `t5x` is Google's.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

FOLDERS = ('T5X_DIR', 'AIRIO_DIR', 'JESTIMATOR_DIR')
D, N, H, STEP = 128, 8, 64, 7  # at K = 1, 64 columns: Adafactor does not factor them
# Key/value heads, and their size: the last is the latent form.
FORMS = [(1, None), (2, None), (8, None), (1, 256)]


@pytest.mark.slow
@pytest.mark.skipif(
  not all(os.environ.get(name) for name in FOLDERS),
  reason=f'needs folders of the real T5X in {", ".join(FOLDERS)}',
)
@pytest.mark.parametrize('layout', ['legacy', 'orbax'])
def test_t5x_restores_and_trains_on(layout, tmp_path):
  root = str(pathlib.Path(__file__).resolve().parents[2])
  paths = os.pathsep.join([root, *(os.environ[name] for name in FOLDERS)])
  done = subprocess.run(
    [sys.executable, __file__, layout, str(tmp_path)],
    env={**os.environ, 'PYTHONPATH': paths, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.endswith('ALL RESTORED\n')


def is_decoder_kv(path):
  return path.startswith('decoder/layers') and path.split('/')[-2] in ('key', 'value')


def flat(tree):
  from flax import core, traverse_util

  return traverse_util.flatten_dict(core.unfreeze(tree), sep='/')


def init_variables(rng, num_kv_heads=N, kv_head_dim=None):
  """Float32, and not trained; T5X's own network has the same (test_t5x_network.py)."""
  import jax.numpy as jnp
  from flax import core

  from gqa_t5x.model import network

  heads = {'num_kv_heads': num_kv_heads, 'kv_head_dim': kv_head_dim}
  config = network.config('tiny', vocab_size=64, emb_dim=D, head_dim=H, **heads)
  ones = jnp.ones((1, 4), jnp.int32)
  model = network.Transformer(config)
  return core.freeze(model.init(rng, ones, ones, ones, enable_dropout=False))


@dataclasses.dataclass
class Model:
  """T5X wants a method of a model."""

  num_kv_heads: int
  kv_head_dim: int | None

  def init(self, rng, input_shapes, input_types=None):
    del input_shapes, input_types
    return init_variables(rng, self.num_kv_heads, self.kv_head_dim)


def run_steps(state, steps):
  """Adafactor steps on random gradients."""
  import jax
  import numpy as np

  rng = np.random.default_rng(0)
  for _ in range(steps):
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype('f'), state.params)
    state = state.apply_gradient(grads, learning_rate=1e-3)
  return state


def save(state, folder, layout, partitioner):
  import jax.numpy as jnp
  from t5x import checkpoints

  os.makedirs(folder)
  if layout == 'legacy':
    checkpoints.Checkpointer(state, partitioner, folder).save(state)
    return
  manager = checkpoints.OrbaxCheckpointManagerInterface(
    folder, state, partitioner, save_dtype=jnp.float32
  )
  manager.save(state)
  manager.wait_until_finished()
  manager.close()


def restore(path, form, use_orbax, optimizer, partitioner, model_dir):
  """Restores as t5x.train does from INITIAL_CHECKPOINT_PATH."""
  import jax
  from t5x import utils

  os.makedirs(model_dir)
  initializer = utils.TrainStateInitializer(
    optimizer_def=optimizer,
    init_fn=Model(*form).init,
    input_shapes={},
    partitioner=partitioner,
  )
  config = utils.RestoreCheckpointConfig(path=path, mode='specific', dtype='float32')
  state, _ = utils.create_checkpoint_manager_and_restore(
    initializer,
    partitioner,
    config,
    path,
    jax.random.PRNGKey(0),
    model_dir=model_dir,
    use_orbax=use_orbax,
  )
  return state


def mean_params(state, num_kv_heads):
  import numpy as np

  params = {path: np.asarray(a) for path, a in flat(state.params).items()}
  for path, kernel in params.items():
    if is_decoder_kv(path):
      split_DKGH = kernel.reshape(D, num_kv_heads, -1, H)
      params[path] = split_DKGH.mean(axis=2).reshape(D, -1)
  return params


def check_same(got, wanted):
  import numpy as np

  assert set(got) == set(wanted)
  for path in wanted:
    np.testing.assert_allclose(got[path], wanted[path], 1e-5, 1e-7, err_msg=path)


def main(layout, folder):
  import jax
  import numpy as np
  from absl import logging
  from t5x import adafactor, checkpoints, partitioning, train_state

  from gqa_t5x import convert

  logging.set_verbosity(logging.ERROR)
  optimizer = adafactor.Adafactor(decay_rate=0.8, step_offset=0)
  partitioner = partitioning.PjitPartitioner(num_partitions=1)
  variables = init_variables(jax.random.PRNGKey(0))
  mha = train_state.FlaxOptimTrainState.create(optimizer, variables)
  mha = run_steps(mha, STEP)
  save(mha, f'{folder}/mha', layout, partitioner)
  for num_kv_heads, kv_head_dim in FORMS:
    output = f'{folder}/gqa{num_kv_heads}_{kv_head_dim}'
    flags = [f'--input={folder}/mha', f'--output={output}']
    flags += [f'--num_kv_heads={num_kv_heads}']
    flags += [f'--kv_head_dim={kv_head_dim}', '--method=svd'] if kv_head_dim else []
    assert convert.main(['convert', *flags]) == 0
    path = f'{output}/checkpoint_{STEP}'
    loaded = checkpoints.load_t5x_checkpoint(path)
    assert loaded['state']['step'] == STEP
    if not kv_head_dim:
      check_same(flat(loaded['target']), mean_params(mha, num_kv_heads))
    for use_orbax in (True, False):
      run = f'{output}_{use_orbax}'
      form = num_kv_heads, kv_head_dim
      state = restore(path, form, use_orbax, optimizer, partitioner, run)
      check_same(flat(state.state_dict()), flat(loaded))
      state = run_steps(state, 3)
      assert int(state.step) == STEP + 3
      assert all(np.isfinite(a).all() for a in flat(state.state_dict()).values())
  print('ALL RESTORED')


if __name__ == '__main__':
  main(*sys.argv[1:])
