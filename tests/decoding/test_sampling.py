"""Sampling against NumPy: what may be drawn, scores, and when it stops.

What is drawn, around the network, is compared with T5X's in test_golden.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x.decoding import sampling
from helpers import model_oracle as oracle

KEY = jax.random.PRNGKey(11)


def rules(log_probs, temperature=1.0, topk=0, topp=0.0):
  """Returns the probabilities `[V]` to draw with, from those of the model."""
  if temperature == 0 or topk == 1:
    return np.eye(len(log_probs))[np.argmax(log_probs)]
  probabilities = oracle.softmax(log_probs / temperature)
  kept = np.argsort(-probabilities)
  if topk:
    kept = kept[:topk]
  elif topp:
    total = 0.0
    for count, token in enumerate(kept):
      total += probabilities[token]
      if total >= topp:
        kept = kept[: count + 1]
        break
  allowed = np.isin(np.arange(len(log_probs)), kept)
  return np.where(allowed, probabilities, 0) / probabilities[kept].sum()


# A model of four tokens, each of which hangs on the last one alone.

CHAIN = np.log(
  [
    [0.4, 0.3, 0.2, 0.1],
    [0.1, 0.2, 0.3, 0.4],
    [0.5, 0.2, 0.2, 0.1],
    [0.2, 0.2, 0.3, 0.3],
  ]
)
CHAIN += np.arange(4)[:, None]  # Logits, not log-probabilities.


def chain(table, dtype=jnp.float32):
  table = jnp.asarray(table, dtype)
  return lambda state: (table[state.cur_token[:, 0]], state.cache)


def pairs(**drawn):
  """Returns the probabilities of the first two tokens, `[16]`."""
  log_probs = np.log(oracle.softmax(CHAIN))
  first = rules(log_probs[0], **drawn)
  return np.concatenate([first[i] * rules(log_probs[i], **drawn) for i in range(4)])


def draw(temperature, num_inputs=1, dtype=jnp.float32, **options):
  """Returns 50 pairs of tokens of each input, and their scores."""
  if isinstance(temperature, float):
    options['temperature'], traced = temperature, {}
  else:
    traced = {'temperature': temperature}

  @oracle.jit
  def run(**traced):
    return sampling.temperature_sample(
      jnp.zeros((num_inputs, 2), jnp.int32),
      {},
      chain(CHAIN, dtype),
      eos_id=-1,
      decode_rng=KEY,
      num_decodes=50,
      **(options | traced),
    )

  return [np.asarray(x) for x in run(**traced)]


def assert_scores(tokens, scores, **drawn):
  """Rescaled scores are the probabilities that tokens are drawn with."""
  expected = np.log(pairs(**drawn)[tokens[:, 0] * 4 + tokens[:, 1]])
  np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize(
  'options',
  [
    {'temperature': 1.0, 'topk': 0},
    {'temperature': 0.6, 'topk': 0},
    {'temperature': 1e6, 'topk': 0},
    {'temperature': 1.0, 'topk': 3},
    {'temperature': 0.8, 'topk': 0, 'topp': 0.65},
  ],
)
def test_scores(options):
  tokens, scores = draw(**options)
  assert_scores(tokens[0], scores[0], **options)


def test_a_temperature_for_each_row():
  tokens, scores = draw(np.array([0.5, 0.0, 2.0], np.float32), num_inputs=3, topk=0)
  assert_scores(tokens[0], scores[0], temperature=0.5)
  assert_scores(tokens[2], scores[2], temperature=2.0)
  np.testing.assert_array_equal(tokens[1], np.zeros((50, 2)))


def test_cuts_that_leave_all_tokens():
  expected, _ = draw(1.0, topk=0)
  for options in ({'topk': 9}, {'topk': 0, 'topp': 1.0}):
    np.testing.assert_array_equal(draw(1.0, **options)[0], expected)


def test_bfloat16_logits_have_float32_scores():
  tokens, scores = draw(1.0, dtype=jnp.bfloat16, topk=0)
  rounded = jnp.asarray(CHAIN, jnp.bfloat16).astype(jnp.float32)
  log_probs = np.asarray(jax.nn.log_softmax(rounded))
  first, second = np.moveaxis(tokens[0], -1, 0)
  assert scores.dtype == jnp.float32
  np.testing.assert_allclose(
    scores[0], log_probs[0, first] + log_probs[first, second], rtol=1e-5
  )


@pytest.mark.parametrize(
  'options',
  [
    {'temperature': 1.0},  # T5X's default is topk = 1.
    {'temperature': 1e-5, 'topk': 0},
    {'temperature': np.float32(0), 'topk': 3},
    {'temperature': 1.0, 'topk': 0, 'topp': 1e-6},
  ],
)
def test_settings_that_are_greedy(options):
  tokens, scores = draw(**options)
  np.testing.assert_array_equal(tokens, np.zeros((1, 50, 2)))
  # T5X gives 0: of a draw from one token. Greedy decoding has the model's probability.
  log_probs = np.log(oracle.softmax(CHAIN))
  expected = 0 if options.get('topp') else log_probs[0, 0] + log_probs[0, 0]
  np.testing.assert_allclose(scores, np.full((1, 50), expected), rtol=1e-5, atol=1e-6)


def test_scores_that_are_not_rescaled():
  """They are of the model's distribution, not of the one that is drawn from."""
  tokens, scores = draw(0.5, topk=2, rescale_log_probs=False)
  first, second = np.moveaxis(tokens[0], -1, 0)
  log_probs = np.log(oracle.softmax(CHAIN))
  expected = log_probs[0, first] + log_probs[first, second]
  np.testing.assert_allclose(scores[0], expected, rtol=1e-5)


# Stopping: after 0, 1, 2, 3 come 1, 2, 3, 1, with a probability of 0.9.

CYCLE = np.log(np.full((4, 5), 0.025))
CYCLE[np.arange(4), [1, 2, 3, 1]] = np.log(0.9)
FORCED = np.array([[0, 0, 0, 0, 0, 0, 0], [0, 3, 0, 0, 0, 0, 0], [0, 2, 3, 3, 0, 0, 0]])


@pytest.mark.parametrize(
  ('eos_id', 'limit', 'steps', 'expected', 'free'),
  [
    (3, None, 6, ['1230000', '3123000', '2331230'], [3, 3, 3]),
    (4, None, 7, ['1231231', '3123123', '2331231'], [7, 6, 4]),
    (3, 2, 5, ['1200000', '3120000', '2331200'], [2, 2, 2]),
    (1, None, 4, ['1000000', '3100000', '2331000'], [1, 1, 1]),
  ],
)
def test_stopping(eos_id, limit, steps, expected, free):
  """A forced end marker ends nothing; no step is taken once all rows have ended."""
  taken = []
  table = jnp.asarray(CYCLE, jnp.float32)

  def tokens_to_logits(state):
    jax.debug.callback(lambda: taken.append(1))
    token = state.sequences[jnp.arange(3), state.cur_index]
    return table[token], state.cache

  prompts = jnp.asarray(FORCED)
  tokens, scores = oracle.jit(
    lambda: sampling.greedy(
      prompts, {}, tokens_to_logits, eos_id, max_decode_steps=limit
    )
  )()
  jax.effects_barrier()
  assert [''.join(map(str, row)) for row in tokens[:, 0].tolist()] == expected
  expected_scores = np.log(0.9) * np.array(free)[:, None]
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
  assert len(taken) == steps


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'topk': 2, 'topp': 0.5}, 'topk=2 and topp=0.5 were given; set one of them to 0.'),
    ({'topk': -1}, 'topk=-1 must be 0 or more, topp=0.0 from 0 to 1.'),
    ({'topk': 0, 'topp': -0.1}, 'topk=0 must be 0 or more, topp=-0.1 from 0 to 1.'),
    ({'topk': 0, 'topp': 1.5}, 'topk=0 must be 0 or more, topp=1.5 from 0 to 1.'),
    ({'num_decodes': 0}, 'num_decodes=0 must be at least 1.'),
    ({'cache_offset': 1}, 'cache_offset=1: layers are not scanned here; use 0.'),
  ],
)
def test_bad_input(options, message):
  with pytest.raises(ValueError) as error:
    sampling.temperature_sample(FORCED, {}, chain(CHAIN), 1, **options)
  assert str(error.value) == message


def test_bad_input_of_greedy():
  with pytest.raises(ValueError, match='num_decodes=4, but greedy decoding has one'):
    sampling.greedy(FORCED, {}, chain(CHAIN), 1, num_decodes=4)
