"""T5X's own network beside ours, with all heads; the stand-in for T5X has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x.model import network
from helpers import model_oracle as oracle

pytest.importorskip('t5x.examples.t5.network')

# T5 1.0; ByT5, whose encoder is deeper; T5 1.1.
FAMILIES = {
  't5_1_0': {'mlp_activations': ('relu',), 'logits_via_embedding': True},
  'byt5': {'num_encoder_layers': 3, 'num_decoder_layers': 1},
  't5_1_1': {},
}


@pytest.mark.parametrize('family', FAMILIES)
def test_parameters_and_logits(family):
  from gqa_t5x.training import t5x_baseline

  cfg = oracle.config(**FAMILIES[family])
  theirs, params = t5x_baseline.network(cfg), oracle.params(cfg)
  expected = jax.tree.map(lambda x: x.shape, oracle.init(theirs)['params'])
  assert jax.tree.map(jnp.shape, params) == expected
  batch = oracle.batch()
  got, wanted = (
    module.apply({'params': params}, **batch, enable_dropout=False)
    for module in (network.Transformer(cfg), theirs)
  )
  real = batch['decoder_target_tokens'] > 0
  np.testing.assert_allclose(got[real], wanted[real], atol=1e-5, rtol=1e-5)
