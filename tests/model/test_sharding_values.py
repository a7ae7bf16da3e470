"""Sharded over eight devices, the model computes what it does on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from t5x import models

from gqa_t5x.decoding import beam_search, sampling
from gqa_t5x.decoding.generate import generate
from gqa_t5x.model import network, sharding
from helpers import model_oracle as oracle
from helpers.sharding_cases import (
  EOS,
  B,
  T,
  batch,
  config,
  entered,
  partitioner,
  sharded_params,
  sharded_rows,
)

# --- Values -------------------------------------------------------------------


def loss(module, params, inputs, decoder_inputs, targets):
  """Cross-entropy of the targets, a sum."""
  logits = module.apply(
    {'params': params}, inputs, decoder_inputs, targets, enable_dropout=False
  )
  log_probs = jax.nn.log_softmax(logits)
  of_targets = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  return -jnp.sum(of_targets * (targets > 0))


@functools.cache
def loss_and_gradients(K):
  """The compiled function; run in a mesh it is compiled anew for that."""
  module = network.Transformer(config(K))
  return jax.value_and_grad(functools.partial(loss, module))


@functools.cache
def unsharded_gradients(K):
  return oracle.jit(loss_and_gradients(K))(oracle.params(config(K)), *batch())


@pytest.mark.parametrize(
  ('K', 'num_partitions', 'kv_sharding', 'parameter_dims'),
  [(2, 2, None, 1), (8, 2, None, 2), (1, 4, None, 2)],
)
def test_loss_and_gradients(K, num_partitions, kv_sharding, parameter_dims):
  layout = partitioner(K, num_partitions, kv_sharding, parameter_dims)
  with entered(layout):
    got, gradients = oracle.jit(loss_and_gradients(K))(
      sharded_params(config(K), layout), *sharded_rows(layout, *batch())
    )
  expected, expected_gradients = unsharded_gradients(K)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert len(gradients['decoder']['layers_0']) == 6
  for path, gradient in oracle.flat(gradients).items():
    reference = np.asarray(oracle.flat(expected_gradients)[path])
    largest = np.abs(reference).max()
    np.testing.assert_allclose(
      gradient, reference, rtol=1e-5, atol=1e-5 * largest, err_msg=path
    )


DECODE_FNS = {
  'greedy': sampling.greedy,
  'beams': functools.partial(beam_search.beam_search, num_decodes=3),
  'samples': functools.partial(sampling.temperature_sample, num_decodes=3, topk=5),
}


def decode(K, name):
  module = network.Transformer(config(K))

  def run(params, inputs, prompts):
    return generate(module, params, inputs, prompts, DECODE_FNS[name], eos_id=EOS)

  return run


@functools.cache
def unsharded_decodes(K, name, rows):
  prompts = np.zeros((rows, T), np.int32)
  return oracle.jit(decode(K, name))(oracle.params(config(K)), batch(rows)[0], prompts)


@pytest.mark.parametrize(
  ('K', 'num_partitions', 'kv_sharding', 'name', 'rows', 'platform'),
  [
    (2, 2, None, 'greedy', B, 'cpu'),
    (1, 4, 'replicated', 'greedy', B, 'cpu'),
    (4, 2, 'batch', 'greedy', B, 'cpu'),
    (2, 4, None, 'samples', B, 'cpu'),
    # Rows that the devices do not divide, or fewer than devices.
    (2, 4, None, 'greedy', 6, 'cpu'),
    (1, 8, None, 'beams', 3, 'cpu'),
    # As on a TPU: new keys and values are pending.
    (2, 4, None, 'greedy', B, 'tpu'),
    (8, 4, None, 'greedy', B, 'tpu'),
  ],
)
def test_decodes(K, num_partitions, kv_sharding, name, rows, platform, monkeypatch):
  expected_tokens, expected_scores = unsharded_decodes(K, name, rows)
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  layout = partitioner(K, num_partitions, kv_sharding)
  inputs, prompts = sharded_rows(layout, batch(rows)[0], np.zeros((rows, T), np.int32))
  with entered(layout):
    tokens, scores = oracle.jit(decode(K, name))(
      sharded_params(config(K), layout), inputs, prompts
    )
  assert len(np.unique(expected_tokens)) > 10
  np.testing.assert_array_equal(tokens, expected_tokens)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


@pytest.mark.parametrize(('K', 'num_partitions', 'num_decodes'), [(2, 4, 1), (2, 4, 3)])
def test_t5xs_decode_functions(K, num_partitions, num_decodes):
  """With T5X's own model, which keeps no K and V of the inputs."""
  t5x_decoding = pytest.importorskip('t5x.decoding')
  vocabulary = seqio.ByteVocabulary()
  decode_fn = t5x_decoding.temperature_sample
  if num_decodes > 1:
    decode_fn = t5x_decoding.beam_search
  model = models.EncoderDecoderModel(
    network.Transformer(config(K)), vocabulary, vocabulary, None, decode_fn
  )

  def predict(params, inputs, decoder_inputs):
    rows = {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': jnp.zeros_like(decoder_inputs),
    }
    return model.predict_batch_with_aux(
      params, rows, num_decodes=num_decodes, return_all_decodes=True
    )

  params, (inputs, decoder_inputs, _) = oracle.params(config(K)), batch()
  expected, expected_aux = oracle.jit(predict)(params, inputs, decoder_inputs)
  layout = partitioner(K, num_partitions)
  with entered(layout):
    tokens, aux = oracle.jit(predict)(
      sharded_params(config(K), layout), *sharded_rows(layout, inputs, decoder_inputs)
    )
  assert tokens.shape == (B, num_decodes, T)
  np.testing.assert_array_equal(tokens, expected)
  np.testing.assert_allclose(aux['scores'], expected_aux['scores'], rtol=1e-5)
