"""Conversion against training: the trainer, and the command on a task of few words."""

import dataclasses
import json

import flax
import jax
import numpy as np
import pytest

import gqa_t5x
from gqa_t5x.model import network, sizes
from gqa_t5x.reproduce import __main__ as reproduce
from gqa_t5x.reproduce.experiments import trainings
from gqa_t5x.reproduce.experiments.models import MEAN, MHA, SVD
from gqa_t5x.reproduce.report import papers
from gqa_t5x.reproduce.studies import optax_training, training_study
from gqa_t5x.reproduce.studies.heads import JOINT, LATENT, Variant
from gqa_t5x.reproduce.studies.optax_training import Trainer
from helpers import tiny_task
from helpers.reports import DOCS, documented, tables

pytestmark = pytest.mark.usefixtures('quick_compilation')

STEPS = (20, 40)
WORDS = tiny_task.NAME, {'inputs': 24, 'targets': 8}


def training(name, steps=STEPS):
  known = trainings.TRAININGS[name]
  return dataclasses.replace(
    known, task=WORDS[0], lengths=WORDS[1], steps=steps, title=name
  )


@pytest.fixture(scope='module', autouse=True)
def small():
  dims = dict(emb_dim=16, num_heads=8, head_dim=4, mlp_dim=32)
  layers = dict(num_encoder_layers=1, num_decoder_layers=2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sizes.SIZES, 'small', dims | layers)
    patch.setattr(trainings, 'SIZE', 'small')
    patch.setattr(trainings, 'BATCH_SIZE', 2)
    patch.setattr(trainings, 'VALIDATION_BATCHES', 4)
    patch.setattr(trainings, 'CALIBRATION_BATCHES', 2)
    yield


@pytest.fixture(params=['adam', 'adafactor'], scope='module')
def trainer(request, small):
  return Trainer(training(request.param))


def equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_stopped_training_goes_on_bit_for_bit(trainer, tmp_path):
  start = trainer.start()
  whole = trainer.train(start, 4)
  file = tmp_path / 'state'
  trainer.train(start, 2, file=file)
  found = optax_training.read(file, start)
  assert found.step == 2
  equal(trainer.train(found, 4), whole)


def test_training_learns(trainer):
  start = trainer.start()
  before = trainer.loss(start.params)
  assert before > 5  # of 384 bytes
  assert trainer.loss(trainer.train(start, 40).params) < before - 0.1


def test_the_loss_is_a_mean_over_tokens(trainer):
  params = trainer.start().params
  module, total, tokens = network.Transformer(trainer.config()), 0.0, 0
  for batch in trainer.validation:
    weights = batch['decoder_loss_weights']
    features = {k: v for k, v in batch.items() if k != 'decoder_loss_weights'}
    logits = module.apply({'params': params}, **features, enable_dropout=False)
    logits = np.asarray(logits, np.float64)
    log_sums = np.log(np.exp(logits).sum(-1))
    for place in zip(*np.nonzero(weights), strict=True):
      total += log_sums[place] - logits[place][batch['decoder_target_tokens'][place]]
      tokens += 1
  assert trainer.loss(params) == pytest.approx(total / tokens, rel=1e-5)


def test_all_are_judged_on_the_same_spans():
  """Of rows as long as the study's: in shorter ones there is one span to draw."""
  one, other = (Trainer(trainings.TRAININGS['adam']).validation for _ in range(2))
  assert len(one) == len(other) == 4
  for batch, again in zip(one, other, strict=True):
    for name, tokens in batch.items():
      assert np.array_equal(tokens, again[name]), name


def test_rates():
  steps = np.array([0, 199, 500, 2000])
  found = trainings.adam_rate(steps)
  np.testing.assert_allclose(found, [0.003 / 200, 0.003, 0.003, 0.0015])
  found = trainings.adafactor_rate(np.array([0, 499, 1999]))
  np.testing.assert_allclose(found, np.array([500, 500, 2000]) ** -0.5)


def test_what_the_optimizer_keeps_of_changed_parameters_is_lost(trainer):
  state = trainer.train(trainer.start(), 3)
  params = flax.traverse_util.flatten_dict(state.params)
  changed = ('decoder', 'layers_1', 'self_attention', 'key', 'kernel')
  params[changed] = params[changed][:, :16]
  state = trainer.fresh(state, flax.traverse_util.unflatten_dict(params))
  fresh, kept = 0, 0
  for path, x in jax.tree_util.tree_leaves_with_path(state.optimizer):
    names = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
    if names == changed:
      fresh += 1
      assert not np.any(x)
    elif names:
      kept += np.any(x)
  assert fresh == (2 if trainer.training.title == 'adam' else 3)
  assert kept > 30


def test_the_command(monkeypatch, tmp_path, capsys):
  several = {'adam': training('adam', (20,)), 'adafactor': training('adafactor')}
  monkeypatch.setattr(trainings, 'TRAININGS', several)
  monkeypatch.setattr(trainings, 'UPTRAINED', (0.05,))
  variants = Variant(MEAN), Variant(SVD), LATENT, JOINT
  monkeypatch.setattr(training_study, 'VARIANTS', variants)
  argv = ['reproduce', 'evaluate', 'training', f'--output_dir={tmp_path}']
  assert reproduce.define_command().run(argv, reproduce.act) == 0
  rows = json.loads((tmp_path / 'training.json').read_text())
  losses = [row for row in rows if row['kind'] == 'training']
  # 3 models; MHA, and 3 variants with 4 and 2 heads, 2 with one; twice each. The
  # joint form once.
  assert len(losses) == 3 * ((1 + 3 + 3 + 2) * 2 + 3)
  by_key = {
    (r['training'], r['pretrain_steps'], r['variant'], r['cache_heads'], r['alpha']): r
    for r in losses
  }
  mha = by_key['adafactor', 40, Variant(MHA).title, 8, 0]
  assert mha['excess_loss'] == 0
  folder = tmp_path / 'training' / 'adafactor' / '40'
  # The same by what users call: the checkpoint that the study left, converted.
  model = gqa_t5x.load(folder / 'checkpoint_40')
  few = model.convert(num_kv_heads=2, statistics=str(folder / 'statistics.npz'))
  trainer = Trainer(several['adafactor'])
  found = by_key['adafactor', 40, Variant(SVD).title, 2, 0]['validation_loss']
  assert trainer.loss(few.params, num_kv_heads=2) == pytest.approx(found, rel=1e-5)
  latent = by_key['adafactor', 40, LATENT.title, 2, 0]
  assert (latent['num_kv_heads'], latent['kv_head_dim']) == (1, 8)
  # As many numbers as a token's vector has hold keys and values of every head.
  joint = {K: by_key['adafactor', 40, JOINT.title, K, 0] for K in (4, 2, 1)}
  for K in (4, 2):
    assert joint[K]['excess_loss'] == pytest.approx(0, abs=1e-4)
  assert abs(joint[1]['excess_loss']) > 2e-4
  (cross,) = (
    row
    for row in rows
    if row['kind'] == 'training_worth'
    and (row['training'], row['pretrain_steps']) == ('adafactor', 40)
    and row['zeroed'] == 'cross'
  )
  for name, layer in model.params['decoder'].items():
    if name.startswith('layers_'):
      layer['encoder_decoder_attention']['value']['kernel'] *= 0
  loss = trainer.loss(model.params)
  assert cross['validation_loss'] == pytest.approx(loss, rel=1e-5)
  _report(tmp_path, mha, cross)
  # Done already: no model is trained again.
  monkeypatch.setattr(Trainer, 'train', None)
  assert reproduce.define_command().run(argv, reproduce.act) == 0
  assert json.loads((tmp_path / 'training.json').read_text()) == rows


def _report(folder, mha, cross):
  """The report has each number where it belongs."""
  papers.write(str(folder))
  text = (folder / 'report.md').read_text()
  part = text.split('### Conversion against training\n')[1].split('\n### ')[0]
  models, *by_heads, uptrained, keys, values = tables(part)
  assert [len(table) for table in (models, *by_heads)] == [4, 5, 5, 4]
  assert len(uptrained) == 1 + 3 * (3 + 3 + 2)
  assert len(keys) == len(values) == 1 + 2 * (3 + 2)
  line = next(line for line in models if line[0] == 'adafactor, 40')
  assert line[1] == f'{mha["validation_loss"]:.3f}'
  assert line[3] == f'{cross["excess_loss"]:.3f}'
  assert (folder / 'figures' / 'training.png').exists()


def test_the_documented_tables_are_those_of_the_rows():
  text = (DOCS / 'conversion.md').read_text().split('### Harder to convert')[1]
  (_, *worth), (_, *losses), (_, *uptrained), *_ = tables(text)
  by_model = {}
  for row in documented('training'):
    name = f'{row["training"]}, {row["pretrain_steps"]:,}'
    by_model.setdefault(name, []).append(row)
  assert [line[0] for line in worth] == list(by_model)
  for title, *cells in worth:
    rows = by_model[title]
    (mha,) = (r for r in rows if r.get('variant') == 'MHA' and not r['uptrain_steps'])
    without = [r['excess_loss'] for r in rows if r['kind'] == 'training_worth']
    assert cells == [f'{x:.2f}' for x in (mha['validation_loss'], *without)]
  assert [line[0] for line in losses] == [v.title for v in training_study.VARIANTS]

  def cells(variant, alpha):
    """The loss by number of heads over MHA's, trained as long."""
    for rows in by_model.values():
      rows = [r for r in rows if r['kind'] == 'training' and r['alpha'] == alpha]
      (mha,) = (row['excess_loss'] for row in rows if row['variant'] == 'MHA')
      found = {
        row['cache_heads']: f'{round(row["excess_loss"] - mha, 3) + 0.0:.3f}'
        for row in rows
        if row['variant'] == variant
      }
      yield ' / '.join(found.get(K, '-') for K in (4, 2, 1))

  for alpha, table in ((0, losses), (0.05, uptrained)):
    for variant, *found in table:
      assert found == list(cells(variant, alpha))
