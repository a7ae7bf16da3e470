"""The stand-in and Google's T5X train alike, and continue each other's checkpoints.

Runs where T5X_DIR, AIRIO_DIR and JESTIMATOR_DIR name folders of the real ones. Each run
is a command as users type it, with one engine or the other on the path.
"""

import json
import os
import shutil

import numpy as np
import pytest

from helpers import commands, trees

FOLDERS = ('T5X_DIR', 'AIRIO_DIR', 'JESTIMATOR_DIR')
PATHS = {
  'real': [os.environ.get(name, '') for name in FOLDERS],
  'lite': [str(commands.ROOT / 't5x_lite')],
}
# T5X writes its old layout if it is asked to; the stand-in reads it.
LEGACY_GIN = """
from __gin__ import dynamic_registration
import __main__ as train_script

train_script.train.use_orbax = False
"""
MACROS = {
  'NUM_KV_HEADS': 2,
  'DROPOUT_RATE': 0.1,
  'LABEL_SMOOTHING': 0.1,
  'LOSS_NORMALIZING_FACTOR': 100.0,
  'STATS_PERIOD': 1,
  'EVAL_STEPS': 2,
}
# Name of a run -> its last step.
STEPS = {'scratch': 5, 'micro': 2, 'continued': 8, 'from_legacy': 4}

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not all(os.environ.get(name) for name in FOLDERS),
    reason=f'needs folders of the real T5X in {", ".join(FOLDERS)}',
  ),
]


def train(engine, folder, name, steps, more_files=(), **macros) -> None:
  """Runs `python -m t5x.train` of an engine, which saves and evaluates at the end."""
  macros |= MACROS | {'MODEL_DIR': f'{engine}_{name}', 'TRAIN_STEPS': steps}
  macros |= {'EVAL_PERIOD': steps, 'CHECKPOINT_PERIOD': steps}
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PYTHONPATH', os.pathsep.join(PATHS[engine]))
    commands.engine(folder, 't5x.train', 'pretrain', more_files, **macros)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A folder with all runs of both engines."""
  folder = tmp_path_factory.mktemp('parity')
  (folder / 'legacy.gin').write_text(LEGACY_GIN)
  train('real', folder, 'legacy', 2, ['legacy.gin'], SAVE_DATASET=False)
  legacy = {'INITIAL_CHECKPOINT_PATH': 'real_legacy/checkpoint_2'}
  for engine in PATHS:
    train(engine, folder, 'scratch', STEPS['scratch'])
    train(engine, folder, 'micro', STEPS['micro'], NUM_MICROBATCHES=2)
    train(engine, folder, 'from_legacy', STEPS['from_legacy'], **legacy)
  for engine, other in (('real', 'lite'), ('lite', 'real')):
    name = f'checkpoint_{STEPS["scratch"]}'
    source, target = (folder / f'{other}_scratch', folder / f'{engine}_continued')
    shutil.copytree(source / name, target / name)
    train(engine, folder, 'continued', STEPS['continued'])
  return folder


@pytest.mark.parametrize('part', ['train', 'training_eval/tiny_words'])
@pytest.mark.parametrize('name', STEPS)
def test_losses_and_all_of_tensorboard_are_the_same(runs, name, part):
  real, lite = (
    commands.scalars(runs / f'{engine}_{name}' / part) for engine in ('real', 'lite')
  )
  assert len(real) > 20
  assert ('loss', STEPS[name]) in real
  assert real.keys() == lite.keys()
  for key, value in real.items():
    if not key[0].startswith('timing/'):
      np.testing.assert_allclose(lite[key], value, rtol=1e-4, err_msg=str(key))


@pytest.mark.parametrize('name', STEPS)
def test_parameters_are_the_same(runs, name):
  real, lite = (
    trees.read(runs / f'{engine}_{name}' / f'checkpoint_{STEPS[name]}')
    for engine in ('real', 'lite')
  )
  assert real.keys() == lite.keys()
  for path, tensor in real.items():
    sums = [np.abs(array.astype(float)).sum() for array in (tensor, lite[path])]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4), path


def test_checkpoint_folders_are_the_same(runs):
  def files(engine):
    root = runs / f'{engine}_scratch' / 'checkpoint_5'
    found = (p.relative_to(root) for p in root.rglob('*'))
    return {str(p) for p in found if p.parent.name != 'd'}  # names of data are hashes

  assert files('real') == files('lite')
  real, lite = (
    json.loads((runs / f'{e}_scratch' / 'checkpoint_5/state/_METADATA').read_text())
    for e in ('real', 'lite')
  )
  assert real['tree_metadata'] == lite['tree_metadata']
