"""Rows: losses from event files and of checkpoints, and spectra."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from gqa_t5x.checkpoints import tree
from gqa_t5x.checkpoints.config import ModelConfig
from gqa_t5x.conversion.input_statistics import InputStatistics, write_statistics
from gqa_t5x.errors import BadInput
from gqa_t5x.inference import saved
from gqa_t5x.model import network
from gqa_t5x.reproduce.experiments.models import MEAN, Model
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.studies import STUDIES
from gqa_t5x.reproduce.results import events, miniature, validation
from gqa_t5x.reproduce.studies import conversion, spectra
from helpers.reports import documented
from helpers.trees import STEP, D, H, N, tiny_state, write_msgpack

TASK = 'a_task'
FEATURES = ('encoder_input', 'decoder_input', 'decoder_target')


def write_events(model_dir, losses, task=TASK, share=0.5):
  """Event files as T5X's: cross-entropy over all tokens, and the real tokens' share."""
  folder = model_dir / 'training_eval' / task
  writer = tf.summary.create_file_writer(str(folder))
  with writer.as_default():
    for step, loss in losses.items():
      tf.summary.scalar('cross_ent_loss_per_all_target_tokens', loss * share, step)
      tf.summary.scalar('non_padding_fraction/loss_weights', share, step)
      tf.summary.scalar('loss', 1e6, step)
  writer.close()
  (file,) = folder.glob('events*')
  return file


def test_loss_rows(tmp_path):
  plan = Planner(STUDIES['tiny'], str(tmp_path))
  base, mean = plan.experiment.models[0], Model('tiny', 2, MEAN, 0.1, seed=1)
  # Evaluated every 24 steps of 2400.
  lost = {step: (2640 - step) / 96 for step in range(2400, 2641, 24)}
  task = 'pydocs_span_corruption'
  write_events(plan.path_of(base).parent, {s: 4 + x for s, x in lost.items()}, task)
  other = {step: 5 + 3 * x for step, x in lost.items()}
  write_events(plan.path_of(mean).parent, other, task, share=0.25)
  rows = conversion.loss_rows(plan, [base, mean])
  assert len(rows) == 2 * 11
  asked = {'method': 'mean', 'num_kv_heads': 2, 'seed': 1, 'uptrain_steps': 48}
  (known,) = documented('conversion_study/tiny', **asked)
  own = {'validation_loss': 5 + 3 * 2.0, 'excess_loss': 11.0 - 6.5}
  assert rows[13] == known | own | {k: rows[13][k] for k in ('device', 'versions')}
  excess = [row['excess_loss'] for row in rows]
  assert excess[:11] == [-i / 4 for i in range(11)]
  assert excess[11:] == [6 - 3 * i / 4 for i in range(11)]


def test_damaged_events_are_named(tmp_path):
  file = write_events(tmp_path, {100: 4.0, 101: 3.75, 102: 3.5})
  data = file.read_bytes()
  assert events.validation_losses(tmp_path, TASK, [100, 102]) == {100: 4.0, 102: 3.5}
  changed = bytearray(data)
  changed[len(data) // 2] ^= 255
  for damaged in (data[:-5], bytes(changed)):
    file.write_bytes(damaged)
    with pytest.raises(BadInput, match=f'{file} is damaged or incomplete'):
      events.validation_losses(tmp_path, TASK, [100])


def test_missing_steps_are_named(tmp_path):
  write_events(tmp_path, {100: 4.0})
  with pytest.raises(BadInput, match=r'no validation loss of step 101, 102;'):
    events.validation_losses(tmp_path, TASK, [100, 101, 102])
  with pytest.raises(BadInput, match='nowhere/training_eval/a_task has no'):
    events.validation_losses(tmp_path / 'nowhere', TASK, [100])


def test_incomplete_runs_leave_no_rows(tmp_path):
  message = 'none_8_seed1/training_eval/pydocs_span_corruption has no event file'
  with pytest.raises(BadInput, match=message):
    conversion.write(str(tmp_path), 'tiny')
  assert not [*tmp_path.iterdir()]


def test_unigram_row_leaves_padding_out(monkeypatch):
  found = [
    {
      'decoder_target_tokens': np.array(tokens),
      'decoder_loss_weights': np.array(tokens) > 0,
    }
    for tokens in ([[7, 7, 0], [3, 0, 0]], [[9, 0, 0]])
  ]
  monkeypatch.setattr(
    conversion.validation, 'batches', lambda plan, count: found[:count]
  )
  row = conversion.unigram_row(Planner(STUDIES['tiny'], 'runs'))
  (known,) = documented('conversion_study/tiny', kind='unigram')
  own = {key: row[key] for key in ('device', 'versions')}
  loss = pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4))
  assert row == known | own | {'validation_loss': loss}


def test_worth_rows(monkeypatch, tmp_path):
  """The loss without a kind of attention is that with its values set to zero."""
  config = network.config('mini', vocab_size=32)
  module = network.Transformer(config)
  tokens = jnp.ones((2, 3), jnp.int32)
  params = module.init(jax.random.PRNGKey(0), tokens, tokens, tokens)['params']
  params = jax.tree.map(np.asarray, params)
  plan = Planner(STUDIES['mini'], str(tmp_path))
  saved.write(plan.pretraining('mini').result, params, 1, ModelConfig(), None)
  batch = {
    'encoder_input_tokens': np.array([[3, 4, 5, 6], [7, 8, 9, 10]], np.int32),
    'decoder_input_tokens': np.array([[0, 5, 7], [0, 9, 0]], np.int32),
    'decoder_target_tokens': np.array([[5, 7, 1], [9, 1, 0]], np.int32),
    'decoder_loss_weights': np.array([[1, 1, 1], [1, 1, 0]], np.int32),
  }
  monkeypatch.setattr(conversion.validation, 'batches', lambda *_: [batch])
  found = {row['zeroed']: row for row in conversion.worth_rows(plan)}
  inputs = [batch[f'{name}_tokens'] for name in FEATURES]
  for kind, name in (
    ('self', 'self_attention'),
    ('cross', 'encoder_decoder_attention'),
  ):
    without = jax.tree.map(np.copy, params)
    for i in range(config.num_decoder_layers):
      without['decoder'][f'layers_{i}'][name]['value']['kernel'] *= 0
    losses = []
    for each in (params, without):
      logits = module.apply({'params': each}, *inputs, enable_dropout=False)
      chosen = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)),
        batch['decoder_target_tokens'][..., None],
        axis=-1,
      )[..., 0]
      losses.append(-np.mean(chosen[batch['decoder_loss_weights'] > 0]))
    row = found[kind]
    assert row['validation_loss'] == pytest.approx(losses[1], rel=1e-5)
    assert row['excess_loss'] == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert abs(row['excess_loss']) > 1e-3
    (known,) = documented('conversion_study/mini', kind='worth', zeroed=kind)
    own = ('device', 'versions', 'validation_loss', 'excess_loss')
    assert row == known | {key: row[key] for key in own}


# --- Spectra ------------------------------------------------------------------


def test_describe():
  values = np.array([[90.0, 5.0, 4.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0]])
  assert spectra.describe(values, 2) == {
    'dropped_share': [pytest.approx(0.05), 0.5, 0.0],
    'rank_99': [3, 4, 5],
    'rank_95': [2, 4, 5],
    'rank_90': [1, 4, 5],
  }


def test_spectra_are_those_of_the_best_low_rank_approximation(tmp_path):
  """The queries of a group, joined: their singular values, squared."""
  state = tiny_state(moments=False)
  source = write_msgpack(tmp_path / f'checkpoint_{STEP}', state)
  rng = np.random.default_rng(0)
  roots = [rng.standard_normal((D, D)) for _ in range(3)]  # C = root root^T
  moments = InputStatistics(*(np.float32(root @ root.T) for root in roots))
  modules = [
    f'decoder/layers_{i}/{name}'
    for i in range(2)
    for name in ('self_attention', 'encoder_decoder_attention')
  ]
  file = tmp_path / 'statistics.npz'
  write_statistics(file, dict.fromkeys(modules, moments), {})
  rows = list(spectra.rows(source, file, (2, 1)))
  assert len(rows) == 4 * 2 * 2 * 2
  decoder = state['target']['decoder']
  scales = {
    'self_attention': 2 * ['pre_self_attention_layer_norm'],
    'cross_attention': ['pre_cross_attention_layer_norm', None],
  }
  for row in rows:
    layer = decoder[f'layers_{row["layer"]}']
    name = row['module'].replace('cross_attention', 'encoder_decoder_attention')
    q, k, v = (
      layer[name][n]['kernel'].reshape(D, N, H) for n in ('query', 'key', 'value')
    )
    o = layer[name]['out']['kernel'].reshape(N, H, D)
    if row['statistics'] == 'calibrated':
      left, key, value = roots
    else:
      norms = [
        layer[norm] if norm else state['target']['encoder']['encoder_norm']
        for norm in scales[row['module']]
      ]
      left, key = (np.diag(norm['scale']) for norm in norms)
      value = key
    size = N // row['num_kv_heads']
    for group in range(row['num_kv_heads']):
      heads = range(group * size, (group + 1) * size)
      if row['side'] == 'key':
        parts = [left.T @ q[:, i] @ k[:, i].T @ key for i in heads]
        joined = np.concatenate(parts, axis=0)
      else:
        joined = np.concatenate([value.T @ v[:, i] @ o[i] for i in heads], axis=1)
      squared = np.linalg.svd(joined, compute_uv=False) ** 2
      lost = squared[H:].sum() / squared.sum()
      assert row['dropped_share'][group] == pytest.approx(lost, rel=1e-4, abs=1e-9)


# --- Losses of checkpoints -----------------------------------------------------


def test_validation_loss_of_uniform_predictions():
  vocab_size = 32
  module = network.Transformer(network.config('tiny', vocab_size=vocab_size))
  tokens = jnp.ones((2, 3), jnp.int32)
  shapes = jax.eval_shape(module.init, jax.random.PRNGKey(0), tokens, tokens, tokens)
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes['params'])
  sizes = tree.read_architecture({name: x.shape for name, x in tree.flatten(params)})
  # Equal logits: the loss is log V, and the first token is the prediction.
  targets = np.array([[0, 5, 7], [9, 0, 0]])
  batch = {
    'encoder_input_tokens': np.ones((2, 4), np.int32),
    'decoder_input_tokens': np.ones((2, 3), np.int32),
    'decoder_target_tokens': targets.astype(np.int32),
    'decoder_loss_weights': np.array([[1, 1, 1], [1, 0, 0]], np.int32),
  }
  loss, accuracy = validation.loss(params, sizes, [batch, batch], 'tiny')
  assert loss == pytest.approx(math.log(vocab_size), rel=1e-5)
  assert accuracy == pytest.approx(0.25)


def test_decode_rows(monkeypatch):
  """The settings that docs/uptrain was measured with, and its keys."""
  found = []

  def slopes(measures, *given):
    found.extend((*measures, given))
    return [0.008, 0.003]

  monkeypatch.setattr(miniature.timing, 'slopes', slopes)
  monkeypatch.setattr(
    miniature.decode_benchmark, 'decoder', lambda cfg, *_, num_beams: (None, cfg)
  )
  rows = miniature.decode_rows({8: 300, 1: 301})
  *models, given = found
  assert [(cfg.num_kv_heads, cfg.vocab_size) for cfg in models] == [(8, 300), (1, 301)]
  assert given == ((16, 64), 7)
  (known,) = documented('uptrain', kind='decode', num_kv_heads=1)
  own = {'ms_per_step': 3.0} | {k: rows[1][k] for k in ('device', 'versions')}
  assert rows[1] == known | own
