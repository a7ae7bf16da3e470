"""How much memory a decode benchmark says that it takes."""

import jax
import jax.numpy as jnp
import pytest

from gqa_t5x.analysis.benchmarks import decode_benchmark, workload
from gqa_t5x.analysis.benchmarks.decode_benchmark import Setting
from gqa_t5x.model import quantize, sizes


@pytest.mark.parametrize('int8', [None, 'weights_and_cache'])
def test_memory_is_that_of_the_arrays(int8, monkeypatch):
  """In int8 all but norms, position biases and scales of kernels, which are few."""
  dims = dict(emb_dim=16, num_heads=8, head_dim=4, mlp_dim=32, vocab_size=64)
  layers = {'num_encoder_layers': 1, 'num_decoder_layers': 1}
  monkeypatch.setitem(sizes.SIZES, 'one_layer', dims | layers)
  setting = Setting('one_layer', 8, 2, 8, 4, 'float32', 2, quantize=int8)
  params = workload.random_params(setting.config, jnp.float32)
  params = quantize.prepared(params, int8)
  inputs_BS = jnp.ones((2, 8), jnp.int32)
  prepare, _ = decode_benchmark.decoder(setting.config, params, inputs_BS, 4, 2)
  cache, kept = prepare()
  cross_and_params = sum(leaf.nbytes for leaf in jax.tree.leaves((params, kept)))
  self_cache = 2 * sum(x.nbytes for x in jax.tree.leaves(cache) if x.ndim == 4)
  logits = 4 * 2 * 2 * 64
  encoder = 2 * 8 * 8 * 8 * (4 + 4)
  expected = cross_and_params + self_cache + logits + encoder
  assert setting.nbytes() == pytest.approx(expected, rel=0.1 if int8 else 0)
