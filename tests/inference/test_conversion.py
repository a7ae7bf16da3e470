"""Latent and refitted models in Python: converted, decoded, scored, saved, exported."""

import jax
import numpy as np
import pytest

import gqa_t5x
from gqa_t5x.checkpoints.tree import flatten as flat
from gqa_t5x.conversion.plan import convert_params
from gqa_t5x.errors import BadInput
from helpers import exports, model_oracle

FORMS = {
  'MQA': {'num_kv_heads': 1},
  'latent': {'num_kv_heads': 1, 'kv_head_dim': 5},
}
WHOLE = {'num_kv_heads': 1, 'kv_head_dim': model_oracle.N * model_oracle.H}
DRAWN = np.random.default_rng(0).integers(2, model_oracle.V, (30, 13))
INPUTS, TARGETS = DRAWN[:, :7].tolist(), DRAWN[:, 7:].tolist()
TEXTS = list(zip(INPUTS, TARGETS, strict=True))

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  cfg = model_oracle.config()
  return gqa_t5x.load(exports.checkpoint(tmp_path_factory.mktemp('m') / 'mha', cfg))


@pytest.fixture(scope='module')
def latent(model):
  return model.convert(**FORMS['latent'])


# --- The latent form --------------------------------------------------------------


def test_it_is_what_convert_params_makes(model, latent):
  expected = convert_params(model.params, method='svd', **FORMS['latent'])
  jax.tree.map(np.testing.assert_array_equal, latent.params, expected)
  assert (latent.config.self_kv, latent.config.kv_head_dim) == (1, 5)
  assert model.config.kv_head_dim is None


def test_with_all_numbers_it_decodes_and_scores_as_before(model):
  whole = model.convert(**WHOLE, texts=TEXTS)
  options = {'max_length': 6, 'return_scores': True}
  got, expected = (one.generate(INPUTS[:3], **options) for one in (whole, model))
  assert got[0] == expected[0]
  np.testing.assert_allclose(got[1], expected[1], rtol=1e-3)
  np.testing.assert_allclose(
    whole.loss(INPUTS, TARGETS), model.loss(INPUTS, TARGETS), rtol=1e-5
  )


def test_save_and_load(latent, tmp_path):
  latent.save(tmp_path / 'out')
  again = gqa_t5x.load(tmp_path / 'out')
  assert again.config == latent.config
  jax.tree.map(np.testing.assert_array_equal, again.params, latent.params)
  with pytest.raises(BadInput, match='the checkpoint is of the latent form'):
    again.convert(1, kv_head_dim=3)


def test_export(latent, tmp_path):
  """With all heads; the same loss."""
  latent.export(tmp_path / 'out', 'huggingface')
  whole = gqa_t5x.load(tmp_path / 'out')
  assert (whole.config.self_kv, whole.config.kv_head_dim) == (model_oracle.N, None)
  got, expected = (one.loss(INPUTS, TARGETS) for one in (whole, latent))
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_over_all_devices(latent, model, tmp_path):
  model.save(tmp_path / 'mha')
  many = gqa_t5x.load(tmp_path / 'mha', model_partitions=2)
  many = many.convert(**FORMS['latent'])
  rows, targets = INPUTS[:8], TARGETS[:8]
  got, expected = (one.loss(rows, targets) for one in (many, latent))
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert many.generate(rows, max_length=4) == latent.generate(rows, max_length=4)


# --- Refitted outputs -------------------------------------------------------------


@pytest.mark.parametrize('form', ['MQA', 'latent'])
def test_in_one_go(form, model):
  """Texts convert and refit: output kernels alone are others, and closer."""
  fields = dict(FORMS[form])
  plain = model.convert(method='svd', texts=TEXTS, **fields)
  got = model.convert(method='svd', texts=TEXTS, refit_outputs=True, **fields)
  before, after = dict(flat(plain.params)), dict(flat(got.params))
  assert before.keys() == after.keys()
  changed = {p for p in before if not np.array_equal(before[p], after[p])}
  assert changed == {
    f'decoder/layers_{layer}/{module}/out/kernel'
    for layer in (0, 1)
    for module in ('self_attention', 'encoder_decoder_attention')
  }
  assert got.config == plain.config

  def error(one):
    inputs, targets = DRAWN[:, :7], DRAWN[:, 7:]
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    batch = {'encoder_input_tokens': inputs, 'decoder_input_tokens': shifted}
    batch['decoder_target_tokens'] = targets
    logits = [model_oracle.forward(m.config)(m.params, batch) for m in (model, one)]
    return float(np.sum((np.asarray(logits[0]) - np.asarray(logits[1])) ** 2))

  assert error(got) < error(plain)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({}, 'refit_outputs needs texts, and none were given'),
    ({'texts': TEXTS[:1]}, 'the texts have 6 tokens for the decoder, and to refit the'),
  ],
)
def test_bad_texts(options, message, model):
  with pytest.raises(BadInput, match=message):
    model.convert(1, 'mean', refit_outputs=True, **options)
