"""Training that has to stop: the signal, the state that is saved, the room for it."""

import json
import os
import shutil
import signal
import threading
import types

import jax
import numpy as np
import pytest
from t5x import trainer as t5x_trainer

from gqa_t5x.errors import BadInput
from gqa_t5x.training import run_lock, trainer
from helpers import commands
from helpers.trainers import make_state, make_trainer

# --- The signal -----------------------------------------------------------------


@pytest.fixture
def received(monkeypatch):
  """Signals that reach the handler that was there before."""
  signals = []
  before = signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
  yield signals
  signal.signal(signal.SIGTERM, before)


def test_the_first_signal_is_a_notice_and_the_second_is_not(received):
  notice = trainer.Notice()
  assert not notice.reached(1)
  os.kill(os.getpid(), signal.SIGTERM)
  assert notice.reached(1)
  assert notice.reached(2)
  assert received == []
  os.kill(os.getpid(), signal.SIGTERM)
  assert received == [signal.SIGTERM]


def test_the_signal_is_given_back(received):
  notice = trainer.Notice()
  notice.close()
  notice.close()
  os.kill(os.getpid(), signal.SIGTERM)
  assert received == [signal.SIGTERM]
  assert not notice.reached(1)


def test_several_hosts_ask_jax(received, monkeypatch):
  """JAX's service has the signal, and tells all hosts the same step."""
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(
    trainer.multihost_utils, 'reached_preemption_sync_point', lambda step: step == 7
  )
  notice = trainer.Notice()
  assert [step for step in range(10) if notice.reached(step)] == [7]
  os.kill(os.getpid(), signal.SIGTERM)
  assert received == [signal.SIGTERM]


# --- The trainer ----------------------------------------------------------------


@pytest.fixture
def train(monkeypatch, tmp_path):
  """Trains steps that add 1 to a state, as T5X does: it keeps the state to itself."""

  def engine_train(self, batch_iter, num_steps, start_step=None):
    state = self.train_state
    for _ in range(num_steps):
      self.seen.append(next(batch_iter))
      state, _ = self._compiled_train_step(state, None)
    self.train_state = state
    return types.SimpleNamespace(add_done_callback=lambda done: None)

  def engine_compile(self, batch):
    self._compiled_train_step = lambda state, batch: (
      state.replace_step(state.step + 1),
      {},
    )

  monkeypatch.setattr(t5x_trainer.Trainer, 'train', engine_train)
  monkeypatch.setattr(t5x_trainer.Trainer, 'compile_train', engine_compile)

  def make(stop_at, **kwargs):
    made = make_trainer(make_state(), summary_dir=str(tmp_path), **kwargs)
    made.seen, made.batches = [], iter('abcdefgh')
    made.compile_train(None)
    made._notice.close()
    made._notice = types.SimpleNamespace(
      reached=lambda step: step >= stop_at, close=lambda: None
    )
    return made

  return make


@pytest.mark.parametrize(('stop_at', 'trained'), [(43, 3), (0, 0)])
def test_what_was_trained_is_what_is_saved(train, stop_at, trained):
  """No batch is lost: the data goes on with what was not trained on."""
  made = train(stop_at)
  message = f'SIGTERM at step {40 + trained}: saved'
  with pytest.raises(t5x_trainer.PreemptionError, match=message):
    made.train(made.batches, 5, start_step=40)
  assert int(made.train_state.step) == trained
  assert ''.join(made.seen) == 'abc'[:trained]
  assert next(made.batches) == 'abcd'[trained]
  made.close()


def test_what_is_not_finite_is_not_saved(train):
  """Neither when a run is stopped, nor from the beginning."""
  made = train(stop_at=42)
  params = jax.tree.map(lambda x: x * np.inf, made.train_state.params)
  bad = made.train_state
  bad = bad.restore_state({**bad.state_dict(), 'target': params})
  made._compiled_train_step = lambda state, batch: (bad, {})
  with pytest.raises(BadInput, match=r'^At step 0, .* training has diverged'):
    made.train(made.batches, 1, start_step=40)
  made._newest = bad
  with pytest.raises(BadInput, match=r'^At step 0, .* training has diverged'):
    made.train(made.batches, 1, start_step=42)
  with pytest.raises(BadInput, match=r'^a/checkpoint_0 has .* not finite, in target/'):
    make_trainer(bad, initial_checkpoint='a/checkpoint_0')


@pytest.mark.parametrize('saved', [False, True])
def test_an_evaluation_ends_before_its_next_batch(train, tmp_path, monkeypatch, saved):
  """A step that is not saved yet is saved by the next call of train."""
  seen = []

  def engine_eval(self, batch_iters):
    for batches in batch_iters.values():
      for batch in batches:
        seen.append(batch)
        received.set()
    return {'x': 1}

  monkeypatch.setattr(t5x_trainer.Trainer, 'eval', engine_eval)
  made, received = train(stop_at=0), threading.Event()
  made._notice.received = lambda: received.is_set()
  assert made.eval({'a': iter('')}) == {'x': 1}
  if saved:
    (tmp_path / 'checkpoint_0').mkdir()
    with pytest.raises(SystemExit, match='SIGTERM at step 0, which is saved: the same'):
      made.eval({'a': iter('abc'), 'b': iter('d')})
  else:
    assert made.eval({'a': iter('abc'), 'b': iter('d')}) == {'a': {}, 'b': {}}
    with pytest.raises(t5x_trainer.PreemptionError, match='SIGTERM at step 0: saved'):
      made.train(made.batches, 1, start_step=0)
  assert seen == ['a']


@pytest.mark.slow
@pytest.mark.usefixtures('received')
def test_a_decoding_evaluation_ends(tmp_path, monkeypatch):
  """Before its next batch, the step saved; and the same command goes on from there."""
  read, drawn = trainer._Dataset.as_numpy_iterator, []

  def as_numpy_iterator(self):
    for batch in read(self):
      drawn.append(batch)
      if len(drawn) == 22 + 3:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  monkeypatch.setattr(trainer._Dataset, 'as_numpy_iterator', as_numpy_iterator)
  macros = {'MODEL_DIR': 'run', 'INITIAL_CHECKPOINT_PATH': [], 'TRAIN_STEPS': 4}
  macros |= {'EVAL_PERIOD': 2, 'CHECKPOINT_PERIOD': 4, 'RUN_EVAL_BEFORE_TRAINING': True}
  # 21 batches and a part of one.
  macros |= {'SPLIT': 'train', 'infer_eval/utils.DatasetConfig.batch_size': 3}
  first, again = tmp_path / 'first', tmp_path / 'again'
  first.mkdir()
  with pytest.raises(t5x_trainer.PreemptionError, match=r'^SIGTERM at step 2: saved'):
    commands.engine_here(first, 't5x.train', 'finetune', **macros)
  assert (len(drawn), commands.steps(first / 'run')) == (22 + 3, [0, 2])
  shutil.copytree(first, again)  # This process has the first's lock.
  commands.engine(again, 't5x.train', 'finetune', **macros)
  assert commands.steps(again / 'run') == [0, 2, 4]
  metrics = again / 'run' / 'inference_eval' / 'tiny_words-metrics.jsonl'
  rows = map(json.loads, metrics.read_text().splitlines())
  assert [(row['step'], row['examples']) for row in rows] == [
    (step, 64) for step in (0, 2, 4)
  ]


def test_what_is_saved_is_not_saved_again(train, tmp_path):
  """Orbax refuses to save a step twice."""
  (tmp_path / 'checkpoint_42').mkdir()
  made = train(stop_at=41)
  made.train(made.batches, 1, start_step=40)
  with pytest.raises(t5x_trainer.PreemptionError):
    made.train(made.batches, 1, start_step=41)
  with pytest.raises(SystemExit, match='SIGTERM at step 42, which is saved'):
    made.train(made.batches, 1, start_step=42)


def test_a_folder_that_another_run_has_taken(train, monkeypatch):
  """Not T5X's PreemptionError, after which it would save."""
  made = train(stop_at=1000)

  def check():
    if len(made.seen) == 2:
      raise run_lock.InUse('taken')

  monkeypatch.setattr(run_lock, 'check', check)
  with pytest.raises(run_lock.InUse, match='taken'):
    made.train(made.batches, 5, start_step=40)
  assert made.seen == ['a', 'b']
  made.close()


@pytest.mark.parametrize(('save_period', 'refused'), [(10, True), (None, False)])
def test_a_full_disk(train, tmp_path, monkeypatch, save_period, refused):
  made = train(stop_at=1000, save_period=save_period)
  needed = sum(np.asarray(x).nbytes for x in jax.tree.leaves(made.train_state))
  usage = shutil.disk_usage(tmp_path)
  for free in (needed, needed - 1):
    monkeypatch.setattr(
      shutil, 'disk_usage', lambda path, n=free: usage._replace(free=n)
    )
    if free < needed and refused:
      message = f'{tmp_path} has no room for a checkpoint: {needed:,} bytes are needed'
      with pytest.raises(OSError, match=message):
        made.train(made.batches, 1, start_step=40)
    else:
      made.train(made.batches, 1, start_step=40)
  assert len(made.seen) == (1 if refused else 2)
  made.close()
