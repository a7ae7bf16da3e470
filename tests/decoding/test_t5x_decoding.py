"""T5X's own decoding with our network and model; runs where T5X is installed.

For fewer K/V heads the reference is T5X's network with every K/V head repeated.
"""

import numpy as np
import pytest

from gqa_t5x.model import network
from gqa_t5x.training import models
from helpers import make_golden
from helpers import model_oracle as oracle

pytest.importorskip('t5x.examples.t5.network')


def assert_decodes(got, expected):
  """Compares tokens and scores `[B, num_decodes]` of two decodes."""
  np.testing.assert_array_equal(got[0], expected[0])
  np.testing.assert_allclose(got[1], expected[1], atol=1e-4, rtol=1e-4)


def t5x_decodes(K, name, prompts, eos_id, **options):
  """Returns what T5X's network, model class and decode function give."""
  run = make_golden.t5x_decode(make_golden.t5x_module(), name, **options)
  return run(make_golden.t5x_params(K), oracle.prompt_batch(prompts), eos_id)


def our_decodes(K, name, prompts, eos_id, **options):
  """Returns what T5X's decode function gives around our network."""
  cfg = oracle.config(K)
  run = make_golden.t5x_decode(network.Transformer(cfg), name, **options)
  return run(oracle.params(cfg), oracle.prompt_batch(prompts), eos_id)


@pytest.mark.parametrize(('name', 'K'), make_golden.DECODES_AND_HEADS)
@pytest.mark.parametrize('ours', ['network', 'network and model class'])
def test_decode_functions_of_t5x(name, K, ours):
  """They give what T5X alone gives; so do ours, by the golden file."""
  model_class = None if ours == 'network' else models.EncoderDecoderModel
  for prompts, eos_id in make_golden.PROMPTS.values():
    got = our_decodes(K, name, prompts, eos_id, model_class=model_class)
    assert_decodes(got, t5x_decodes(K, name, prompts, eos_id))


PROMPTS, EOS_ID = make_golden.PROMPTS['prompted']
# Where lengths differ, T5X's beam search goes on with the rows of longer prompts beyond
# the end of the cache.
SAME_LENGTH = ((7, 3), (2, 9), (5, 4), (6, 6))


@pytest.mark.parametrize(
  ('name', 'prompts'), [('greedy', PROMPTS), ('beam3', SAME_LENGTH)]
)
@pytest.mark.parametrize('K', oracle.KV_HEADS)
def test_prompts_filled_in_one_pass(name, prompts, K):
  """T5X does so with our network; its own forces them token by token."""
  tokens, scores = our_decodes(K, name, prompts, EOS_ID, prefill=True)
  expected_tokens, expected_scores = t5x_decodes(K, name, prompts, EOS_ID)
  np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
  there = np.asarray(scores) > -1e6  # Of fewer ended beams than beams, not all are.
  assert there[:, -1].all()
  np.testing.assert_array_equal(tokens[there], expected_tokens[there])
