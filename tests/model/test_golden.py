"""Equal to T5X where T5X is not installed: a file that it wrote (make_golden.py).

Its logits are compared in test_network.py.
"""

import json
import re

import numpy as np
import pytest

from gqa_t5x.model import decode_cache, sharding
from helpers import make_golden
from helpers import model_oracle as oracle


def test_the_file_is_small_and_made_from_these_batches():
  assert make_golden.PATH.stat().st_size < 200_000
  for kind, batch in (('padded', oracle.batch()), ('packed', oracle.packed_batch())):
    for name, value in batch.items():
      np.testing.assert_array_equal(make_golden.stored()[f'{kind}/{name}'], value)


@pytest.mark.parametrize('K', oracle.KV_HEADS)
def test_parameters_are_those_of_t5x(K):
  """Names, shapes, dtypes and logical axes; but keys and values of fewer heads."""
  expected = json.loads(str(make_golden.stored()['parameters']))
  assert len(expected) == 1 + (2 + 9) + (3 + 2 * 14)
  changed = r'decoder/layers_./(self|encoder_decoder)_attention/(key|value)/kernel'
  for path in expected:
    if K < oracle.N and re.fullmatch(changed, path):
      shape = [oracle.D, K * oracle.H]
      expected[path] = [shape, 'float32', ['embed', 'joined_kv_heads']]
  assert make_golden.describe(oracle.initial_shapes(oracle.config(K))) == expected


def test_stored_decodes_are_worth_comparing():
  """They are of all functions and heads; some end and some do not."""
  eos_id = make_golden.PROMPTS['prompted'][1]
  ended = []
  for name, K in make_golden.DECODES_AND_HEADS:
    tokens = make_golden.stored()[f'{name}/prompted/tokens/{K}']
    num_decodes = make_golden.DECODES[name][1]
    assert tokens.shape == (oracle.B, num_decodes, oracle.DECODE_LENGTH)
    ended.extend((tokens == eos_id).any(-1).ravel())
  assert len(ended) / 4 < sum(ended) < len(ended)
  names, heads = zip(*make_golden.DECODES_AND_HEADS, strict=True)
  assert (set(names), set(heads)) == (set(make_golden.DECODES), set(oracle.KV_HEADS))


@pytest.mark.parametrize(('name', 'K'), make_golden.DECODES_AND_HEADS)
def test_decodes(name, K, monkeypatch):
  """Ours equals T5X's, drawn with the same key, without prompts and with some.

  With two key/value heads, and with beams and all heads, they are decoded as on a TPU:
  new keys and values are pending, and move into the cache after every three of eight
  steps.
  """
  if K == 2 or (name, K) == ('beam3', oracle.N):
    monkeypatch.setattr(sharding, 'platform', lambda: 'tpu')
    monkeypatch.setattr(decode_cache, 'MAX_PENDING', 3)
  cfg = oracle.config(K)
  function, num_decodes, options = make_golden.DECODES[name]
  run = oracle.decode.__wrapped__(cfg, function, num_decodes, **options)
  for kind, (prompts, eos_id) in make_golden.PROMPTS.items():
    tokens, scores = run(
      oracle.params(cfg),
      oracle.prompt_batch(prompts),
      eos_id,
      decode_rng=make_golden.RNG,
    )
    expected_tokens, expected_scores = (
      make_golden.stored()[f'{name}/{kind}/{what}/{K}'] for what in ('tokens', 'scores')
    )
    assert (tokens.dtype, scores.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
