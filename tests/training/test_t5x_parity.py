"""The stand-in and Google's T5X train alike, and continue each other's checkpoints.

Runs where T5X_DIR, AIRIO_DIR and JESTIMATOR_DIR name folders of the real ones. Each
engine trains in processes of its own (t5x_parity_worker.py).
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from helpers import commands

FOLDERS = ('T5X_DIR', 'AIRIO_DIR', 'JESTIMATOR_DIR')
PATHS = {
  'real': [os.environ.get(name, '') for name in FOLDERS],
  'lite': [str(commands.ROOT / 't5x_lite')],
}
STEPS, MORE_STEPS = 5, 8

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not all(os.environ.get(name) for name in FOLDERS),
    reason=f'needs folders of the real T5X in {", ".join(FOLDERS)}',
  ),
]


def _run(engine, folder, jobs):
  """Runs jobs in one process; returns the worker's result of each, by model_dir."""
  jobs_file = folder / 'jobs.json'
  jobs_file.write_text(json.dumps(jobs))
  path = os.pathsep.join([*PATHS[engine], str(commands.ROOT), str(commands.TESTS)])
  done = subprocess.run(
    [sys.executable, '-m', 'helpers.t5x_parity_worker', str(jobs_file)],
    env={**os.environ, 'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  results = json.loads(done.stdout.strip().splitlines()[-1])
  return {
    pathlib.Path(job['model_dir']).name: r for job, r in zip(jobs, results, strict=True)
  }


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Results of both engines: scratch, microbatches, continued, from a legacy one."""
  folder = tmp_path_factory.mktemp('parity')

  def job(engine, name, steps, **kwargs):
    return {
      'model_dir': str(folder / f'{engine}_{name}'),
      'total_steps': steps,
      **kwargs,
    }

  def fresh(engine):
    micro = job(engine, 'micro', 2, num_microbatches=2)
    return [job(engine, 'scratch', STEPS), micro]

  def others(engine, other):
    source = folder / f'{other}_scratch' / f'checkpoint_{STEPS}'
    shutil.copytree(source, folder / f'{engine}_continued' / f'checkpoint_{STEPS}')
    legacy = str(folder / 'real_legacy' / 'checkpoint_2')
    return [
      job(engine, 'continued', MORE_STEPS),
      job(engine, 'from_legacy', 4, restore=legacy),
    ]

  results = _run(
    'real', folder, [*fresh('real'), job('real', 'legacy', 2, legacy=True)]
  )
  # The stand-in's own run comes first; both then continue the other's.
  results |= _run('lite', folder, [*fresh('lite'), *others('lite', 'real')])
  results |= _run('real', folder, others('real', 'lite'))
  return folder, results


@pytest.mark.parametrize(
  ('name', 'steps'),
  [('scratch', 5), ('micro', 2), ('continued', 3), ('from_legacy', 2)],
)
def test_losses_are_the_same(runs, name, steps):
  _, results = runs
  real, lite = results[f'real_{name}'], results[f'lite_{name}']
  assert len(real['losses']) == steps
  for a, b in zip(real['losses'], lite['losses'], strict=True):
    assert a == pytest.approx(b, rel=1e-4)
  assert real['params'] == pytest.approx(lite['params'], rel=1e-4)


@pytest.mark.parametrize('part', ['train', 'training_eval/tiny_words'])
def test_tensorboard_is_the_same(runs, part):
  folder, _ = runs
  real, lite = (
    commands.scalars(folder / f'{engine}_scratch' / part) for engine in ('real', 'lite')
  )
  assert len(real) > 20
  assert real.keys() == lite.keys()
  for key, value in real.items():
    if not key[0].startswith('timing/'):
      np.testing.assert_allclose(lite[key], value, rtol=1e-4, err_msg=str(key))


def test_checkpoint_folders_are_the_same(runs):
  folder, _ = runs

  def files(engine):
    root = folder / f'{engine}_scratch' / f'checkpoint_{STEPS}'
    found = (p.relative_to(root) for p in root.rglob('*'))
    return {str(p) for p in found if p.parent.name != 'd'}  # names of data are hashes

  assert files('real') == files('lite')
  metadata = f'checkpoint_{STEPS}/state/_METADATA'
  real, lite = (
    json.loads((folder / f'{e}_scratch' / metadata).read_text())
    for e in ('real', 'lite')
  )
  assert real['tree_metadata'] == lite['tree_metadata']
