"""Shazeer's memory accesses per operation: by hand, and as the cost model's limits."""

import re

import pytest

from gqa_t5x.analysis.costs import formulas
from gqa_t5x.model import network

# As in Shazeer's estimate: attention alone, D = N H, as long in as out.
WIDTH, HEADS = 1024, 16


def attention_alone(K=HEADS, N=HEADS, width=WIDTH, **layers):
  return network.T5Config(
    vocab_size=1,
    emb_dim=width,
    num_heads=N,
    head_dim=width // N,
    mlp_dim=1,
    num_kv_heads=K,
    **layers,
  )


@pytest.mark.parametrize(
  ('b', 'n', 'd', 'h', 'g', 'expected'),
  [
    (8, 128, 1024, 8, 8, 0.125 + 0.125),
    (8, 128, 1024, 8, 2, 0.03125 + 0.125),
    (8, 128, 1024, 8, 1, 0.015625 + 0.125),
    (1, 2048, 4096, 64, 64, 0.5 + 1),
    (1, 2048, 4096, 64, 8, 0.0625 + 1),
  ],
)
def test_shazeer_decoding_ratio(b, n, d, h, g, expected):
  assert formulas.shazeer_decoding_ratio(b, n, d, h, g) == expected


@pytest.mark.parametrize('g', [1, 4, HEADS])
@pytest.mark.parametrize(('b', 'n'), [(1, 16), (64, 16), (1024, 16), (1024, 4)])
def test_decoding_follows_shazeer(b, n, g):
  """Each layer has 4 + 2 g/h matrices of d x d, and 4 b n d g/h keys and values.

  So a product's operands come to 1/b, and keys and values to 4 / (4 + 2 g/h) of
  n g/(d h), as long as n is much less than d.
  """
  step = formulas.decode_step(attention_alone(g, num_decoder_layers=48), b, n, n)
  numbers_a_multiply_add = (step.bytes / 4) / (step.flops / 2)
  matrices = 1 / b
  cache = formulas.shazeer_decoding_ratio(b, n, WIDTH, HEADS, g) - matrices
  expected = matrices + cache * 4 / (4 + 2 * g / HEADS)
  assert numbers_a_multiply_add == pytest.approx(expected, rel=0.03)


def test_long_inputs_cost_mha_all_its_heads():
  """From equal bytes to h times as many: in the model, as in Shazeer's ratio."""
  for n, b, low, high in [(1, 1, 1, 1.6), (10**8, 64, 15.9, 16)]:
    mha = formulas.decode_step(attention_alone(HEADS), b, n, n)
    mqa = formulas.decode_step(attention_alone(1), b, n, n)
    assert low < mha.bytes / mqa.bytes < high
    mha, mqa = (
      formulas.shazeer_decoding_ratio(b, n, WIDTH, HEADS, g) for g in (HEADS, 1)
    )
    assert low < mha / mqa < high


@pytest.mark.parametrize(('b', 'd', 'h'), [(1, 64, 4), (64, 64, 4), (4, 1024, 64)])
def test_training_follows_shazeer(b, d, h):
  """At n = d, an encoder layer has 6 b d^3 multiply-adds.

  They touch 4 d^2 numbers of kernels, 8 + 4 arrays of b d^2 and 2 for an MLP of one
  unit, and 2 arrays of b h d^2.
  """
  cfg = attention_alone(N=h, width=d, K=h, num_encoder_layers=48, num_decoder_layers=1)
  step = formulas.training_step(cfg, b, d, 1)
  numbers = step.weights + step.activation_bytes / 4
  ratio = numbers / (step.flops / 2)
  by_hand = (14 + 2 * h) / (6 * d) + 4 / (6 * b * d)
  assert ratio == pytest.approx(by_hand, rel=0.05)
  # Shazeer's, section 2.3: 1/k + 1/(b n) for heads of size k.
  assert 1 / 3 < ratio / (h / d + 1 / (b * d)) < 1


def test_key_value_heads_that_cannot_be():
  message = 'num_heads=8 is not divisible by num_kv_heads=3; choose one of 1, 2, 4, 8.'
  with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
    formulas.shazeer_decoding_ratio(1, 1, 1, 8, 3)
