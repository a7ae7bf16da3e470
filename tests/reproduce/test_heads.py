"""Long-trained heads: the encoder against transformers, its conversion, the command."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gqa_t5x.data import corpus
from gqa_t5x.errors import BadInput
from gqa_t5x.reproduce import __main__ as reproduce
from gqa_t5x.reproduce.experiments.models import MEAN, SVD, SVD_BY_WEIGHTS
from gqa_t5x.reproduce.report import papers
from gqa_t5x.reproduce.studies import heads, sentence_encoder
from gqa_t5x.reproduce.studies.heads import LATENT, Variant
from helpers import bert
from helpers.reports import DOCS, documented, tables

N, H, LAYERS = 6, 2, 2


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return bert.write_model(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def encoder(folder):
  return sentence_encoder.load(folder)


@pytest.fixture(scope='module')
def texts():
  rng = np.random.default_rng(1)
  tokens = rng.integers(1, 30, (2, 40, 13)).astype(np.int32)
  tokens[:, ::3, 8:] = 0
  return list(tokens)


@pytest.fixture(scope='module')
def inputs(encoder, texts):
  return [encoder.run(tokens)[1] for tokens in texts]


@pytest.fixture(scope='module')
def statistics(texts, inputs):
  return heads._moments(texts, inputs)


# --- The encoder ----------------------------------------------------------------


def test_embeddings_are_those_of_transformers(encoder):
  found, read = encoder.run(bert.GOLDEN['tokens'].astype(np.int32))
  np.testing.assert_allclose(found, bert.GOLDEN['embeddings'], atol=1e-5)
  assert read.shape == (LAYERS, 3, 11, 13)


def test_the_public_model_is_that_of_transformers():
  pytest.importorskip('tokenizers')
  try:
    public = sentence_encoder.find()
  except BadInput as error:
    pytest.skip(str(error))
  texts = bert.GOLDEN['public_texts'].tolist()
  (tokens_BL,) = sentence_encoder.batches(public, texts)
  np.testing.assert_array_equal(tokens_BL, bert.GOLDEN['public_tokens'])
  found, _ = sentence_encoder.load(public).run(tokens_BL)
  np.testing.assert_allclose(found, bert.GOLDEN['public_embeddings'], atol=1e-4)


def test_biases_have_moved(encoder):
  for layer, kernels in enumerate(encoder.attention):
    assert not kernels['key'][-1].any()
    assert not kernels['value'][-1].any()
    assert not kernels['out'][:, -1].any()
    prefix = f'encoder.layer.{layer}.attention'
    value, out, bias = (
      bert.GOLDEN[f'weights/{prefix}.{name}']
      for name in ('self.value.bias', 'output.dense.weight', 'output.dense.bias')
    )
    moved = encoder.weights[f'{prefix}.output.dense.bias']
    np.testing.assert_allclose(moved, out @ value + bias, rtol=1e-5)


# --- Statistics -----------------------------------------------------------------


def test_moments_of_real_tokens(texts, inputs, statistics):
  second, centred, count = np.zeros((13, 13)), np.zeros((13, 13)), 0
  for tokens, read in zip(texts, inputs, strict=True):
    for row, x in zip(tokens, read[1].astype(np.float64), strict=True):
      real = x[: np.count_nonzero(row)]
      second += real.T @ real
      centred += np.cov(real.T, bias=True) * len(real)
      count += len(real)
  np.testing.assert_allclose(statistics[1].query, second / count, rtol=1e-6)
  np.testing.assert_allclose(statistics[1].value, second / count, rtol=1e-6)
  np.testing.assert_allclose(statistics[1].key, centred / count, rtol=1e-6, atol=1e-9)


def test_moments_of_weights_alone():
  found = heads._from_norm(np.array([2.0, 3.0]), np.array([0.5, -1.0]))
  expected = [[4.25, -0.5, 0.5], [-0.5, 10.0, -1.0], [0.5, -1.0, 1.0]]
  np.testing.assert_array_equal(found.query, expected)
  np.testing.assert_array_equal(found.value, expected)
  np.testing.assert_array_equal(found.key, [4.0, 9.0, 0.0])


# --- Conversion -----------------------------------------------------------------


@pytest.mark.parametrize('variant', [Variant(MEAN), Variant(SVD), LATENT])
def test_all_heads_are_the_original(encoder, texts, statistics, variant):
  found = heads.convert(encoder, variant, N, statistics)
  np.testing.assert_allclose(
    encoder.run(texts[0], found)[0], encoder.run(texts[0])[0], atol=2e-5
  )


@pytest.mark.parametrize('K', [3, 2])
def test_the_latent_form_has_the_cache_of_K_heads(encoder, statistics, K):
  for kernels in heads.convert(encoder, LATENT, K, statistics):
    for name in ('key', 'value'):
      assert kernels[name].shape == (13, N * H)
      assert np.linalg.matrix_rank(kernels[name], tol=1e-5) == K * H


@pytest.mark.parametrize('K', [2, 1])
def test_the_joint_form_has_the_cache_of_K_heads(encoder, statistics, K):
  joint = Variant(SVD, latent=True, joint=True)
  for kernels in heads.convert(encoder, joint, K, statistics):
    both = np.concatenate([kernels['key'], kernels['value']], axis=1)
    assert np.linalg.matrix_rank(both, tol=1e-5) == 2 * K * H


def test_the_joint_form_keeps_what_keys_and_values_share(encoder, statistics):
  """Where keys and values are the same, it keeps twice the numbers of each."""
  shared = [{**k, 'value': k['key']} for k in encoder.attention]
  twins = dataclasses.replace(encoder, attention=shared)
  joint = Variant(SVD, latent=True, joint=True)
  for kernels, original in zip(
    heads.convert(twins, joint, 3, statistics), shared, strict=True
  ):
    np.testing.assert_allclose(kernels['key'], original['key'], atol=1e-4)


def logits_error(encoder, attention, inputs):
  """The mean over tokens, keys of their text and heads of the squared error."""
  total = 0.0
  for old, new, read in zip(encoder.attention, attention, inputs[1], strict=True):
    x = read[1:3].astype(np.float64)  # Of full length, and of 13 tokens.

    def logits(kernels, x=x):
      q = (x @ kernels['query']).reshape(2, 13, N, -1)
      k = (x @ kernels['key']).reshape(2, 13, -1, q.shape[-1])
      k = np.repeat(k, N // k.shape[2], axis=2)
      found = np.einsum('BTNH,BSNH->BNTS', q, k)
      return found - found.mean(axis=-1, keepdims=True)

    total += np.mean((logits(old) - logits(new)) ** 2)
  return total


def test_what_knows_more_loses_less(encoder, inputs, statistics):
  weights = [heads._from_norm(*encoder.norm_before(i)) for i in range(LAYERS)]
  mean, by_weights, calibrated, latent = (
    logits_error(encoder, heads.convert(encoder, variant, 3, given), inputs)
    for variant, given in (
      (Variant(MEAN), statistics),
      (Variant(SVD_BY_WEIGHTS), weights),
      (Variant(SVD), statistics),
      (LATENT, statistics),
    )
  )
  assert latent < calibrated < min(by_weights, mean)


def test_outputs_are_refitted_to_the_original(encoder, texts, inputs):
  damaged = [{**kernels, 'out': kernels['out'] / 3} for kernels in encoder.attention]
  found = heads.refit_outputs(encoder, damaged, texts, inputs, ridge=1e-9)
  for kernels, original in zip(found, encoder.attention, strict=True):
    np.testing.assert_allclose(kernels['out'], original['out'], atol=1e-3)
  # As much as it may not move at all.
  found = heads.refit_outputs(encoder, damaged, texts, inputs, ridge=1e9)
  np.testing.assert_allclose(found[0]['out'], damaged[0]['out'], atol=1e-6)


def test_agreement():
  original = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
  converted = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
  # Neighbours 1, 0, 1 become 1, 2, 1.
  assert heads.agreement(original, converted) == {
    'cosine': pytest.approx((1 + 0.96 + 1) / 3),
    'same_neighbour': pytest.approx(2 / 3),
  }


# --- The command ----------------------------------------------------------------


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capsys):
  """Runs what the target runs, with a package of some version."""

  def evaluate(version, texts=5):
    bert.write_package(tmp_path / 'site', version)
    monkeypatch.syspath_prepend(tmp_path / 'site')
    sentences = [' '.join(bert.WORDS[i : i + 4]) for i in range(2 * texts)]
    monkeypatch.setattr(corpus, 'read', lambda of, split: iter(sentences))
    monkeypatch.setattr(heads, 'TEXTS', 5)
    monkeypatch.setattr(heads, 'SAMPLES', 2)
    argv = ['reproduce', 'evaluate', 'heads', f'--output_dir={tmp_path}']
    with jax.disable_jit():  # To compile each shape takes longer than to run it.
      code = reproduce.define_command().run(argv, reproduce.act)
    return code, capsys.readouterr().err

  return evaluate


def test_rows_and_report(evaluate, tmp_path):
  pytest.importorskip('tokenizers')
  assert evaluate('0.1.0')[0] == 0
  rows = json.loads((tmp_path / 'heads.json').read_text())
  found = [row for row in rows if row['kind'] == 'heads']
  # 14 ways at 6 and 3 heads; at 1 head neither grouped nor latent, but joint.
  assert len(found) == 2 * (2 * 14 + 10)
  assert {row['source'] for row in rows} == {'measured'}
  assert {(row['texts'], row['calibration_texts']) for row in found} == {(5, 5)}
  unchanged = [row for row in found if row['cache_heads'] == N]
  for row in unchanged:
    if row['variant'] in ('mean', 'first', 'svd (calibrated)'):
      assert row['cosine'] == pytest.approx(1, abs=1e-4)
      assert row['same_neighbour'] == 1
  spectra = [row for row in rows if row['kind'] == 'heads_spectrum']
  assert len(spectra) == 2 * LAYERS * 2 * (2 * 3 + 2)
  papers.write(str(tmp_path))
  text = (tmp_path / 'report.md').read_text()
  part = text.split('### Conversion of long-trained heads\n')[1].split('\n### ')[0]
  all_heads, three, one, budgets = tables(part)
  assert [len(table) for table in (all_heads, three, one)] == [15, 15, 11]
  # Nothing is dropped with all heads; who may choose more drops no more.
  shares = np.array([[float(x[:5]) for x in line[2:]] for line in budgets[1:]])
  assert not shares[:, 0].any()
  for form in (shares[:4], shares[4:]):
    assert (form[0] >= form[1:]).all()
    assert (form[1:3] >= form[3]).all()
  assert (shares[4:, 1] <= shares[:4, 1]).all()
  assert three[0][0] == 'cache of 3 of 6 heads, by'
  assert all_heads[1][:3] == ['mean', '1.000 ± 0.000 (n = 2)', '1.000 ± 0.000 (n = 2)']
  by_name = {row[0]: row for row in three}
  assert by_name['mean'][3:] == ['-', '-']
  cosines = [
    row['cosine']
    for row in found
    if (row['variant'], row['cache_heads']) == ('latent, svd (calibrated)', 3)
  ]
  assert by_name['latent, svd (calibrated)'][1].startswith(f'{np.mean(cosines):.3f} ±')
  assert (tmp_path / 'figures' / 'heads.png').exists()


def test_the_documented_table_is_that_of_the_rows():
  text = (DOCS / 'conversion.md').read_text().split('## On long-trained heads')[1]
  (_, *lines), *_ = tables(text)
  assert [line[0] for line in lines] == [variant.title for variant in heads.VARIANTS]
  for variant, *cells in lines:
    for K, cell in zip((1, 3, 6), cells, strict=True):
      rows = documented('heads', kind='heads', variant=variant, cache_heads=K)
      assert len(rows) == (0 if cell == '-' else 3)
      if rows:
        cosine, same = (
          np.mean([row[key] for row in rows]) for key in ('cosine', 'same_neighbour')
        )
        assert cell == f'{cosine:.3f} / {100 * same:.0f}%'


def test_too_few_texts(evaluate, tmp_path):
  pytest.importorskip('tokenizers')
  code, said = evaluate('0.1.0', texts=4)
  assert code == 1
  assert 'too few texts in its train split: 2 samples take 10' in said
  assert not (tmp_path / 'heads.json').exists()


def test_another_version(evaluate, tmp_path):
  code, said = evaluate('0.2.0')
  assert code == 1
  assert (
    'is of version 0.2.0, and the numbers are those of 0.1.0; get that: pip' in said
  )
  assert not (tmp_path / 'heads.json').exists()


def test_no_package(monkeypatch):
  monkeypatch.setattr(sentence_encoder, 'PACKAGE', 'no-such-package')
  with pytest.raises(
    BadInput, match=r'package no-such-package 0\.1\.0, .* get it: pip'
  ):
    sentence_encoder.find()
