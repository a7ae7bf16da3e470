"""What is made before the first step: inputs are encoded a few at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x.decoding import generate
from gqa_t5x.model import network
from helpers import model_oracle as oracle


@pytest.mark.parametrize(
  ('B', 'S', 'copies', 'expected'),
  [
    (8, 512, 1, 8),
    (64, 2048, 1, 8),
    (60, 2048, 1, 6),
    (7, 4096, 1, 1),
    (4, 2**15, 1, 1),
    (64, 2048, 2, 16),
    (64, 2048, 8, 64),
    (60, 2048, 8, 6),  # Does not divide: as if there were one copy.
  ],
)
def test_inputs_encoded_together(monkeypatch, B, S, copies, expected):
  mesh = jax.sharding.AbstractMesh((copies, 1), ('data', 'model'))
  monkeypatch.setattr(generate.sharding, 'current_mesh', lambda: mesh)
  assert generate.encoded_together(B, S) == expected


@pytest.mark.parametrize('K', oracle.KV_HEADS)
def test_encoding_in_parts_changes_nothing(monkeypatch, K):
  cfg = oracle.config(K)
  module, params = network.Transformer(cfg), oracle.params(cfg)
  inputs = jnp.asarray(oracle.batch()['encoder_input_tokens'])
  inputs = jnp.concatenate([inputs, inputs[::-1]])
  whole = generate.prepare(module, params, inputs, 7)
  monkeypatch.setattr(generate, 'ENCODED_TOGETHER', 2 * inputs.shape[1])
  assert generate.encoded_together(*inputs.shape) == 2
  parts = generate.prepare(module, params, inputs, 7)
  assert jax.tree.structure(whole) == jax.tree.structure(parts)
  for a, b in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
