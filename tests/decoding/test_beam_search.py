"""Beam search against T5X's rules in plain Python, and what it costs.

Around the network it is compared with T5X's in test_golden.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from gqa_t5x.decoding import beam_search, generate
from gqa_t5x.model import network
from helpers import model_oracle as oracle

B, LENGTH = oracle.B, oracle.DECODE_LENGTH
NONE = -1.0e7  # The score of a result that is not there.


def search(log_probs, prompts, length, n, eos_id, alpha):
  """The oracle: T5X's rules in plain Python, for one batch.

  Args:
    log_probs: (row, tokens so far) -> log-probabilities `[V]` of the next token.
    prompts: the forced tokens of each row.
    length: most tokens of a result, n: beams.

  Returns:
    (results, steps): for each row n pairs (score, tokens), the best last.
  """
  rows = [([(0.0, ())], []) for _ in prompts]  # Live and ended (score, tokens).
  for step in range(length):
    if all(is_settled(*row, n, length, alpha) for row in rows):
      return [results(*row, n) for row in rows], step
    for b, prompt in enumerate(prompts):
      live, ended = rows[b]
      if step < len(prompt):
        longer = [(0.0, (*live[0][1], prompt[step]))]
      else:
        longer = [
          (score + x, (*tokens, v))
          for score, tokens in live
          for v, x in enumerate(log_probs(b, tokens))
        ]
      longer = sorted(longer, reverse=True)[: 2 * n]
      penalty = ((5 + step + 1) / 6) ** alpha
      ended += [(s / penalty, tokens) for s, tokens in longer if tokens[-1] == eos_id]
      live = [(s, tokens) for s, tokens in longer if tokens[-1] != eos_id]
      rows[b] = live[:n], sorted(ended, reverse=True)[:n]
  return [results(*row, n) for row in rows], length


def is_settled(live, ended, n, length, alpha):
  """Whether no live beam can become better than the worst of n ended ones."""
  best = max((score for score, _ in live), default=NONE)
  bound = best / ((5 + length + 1) / 6) ** alpha
  return len(ended) == n and min(ended)[0] > bound


def results(live, ended, n):
  best = ended or live
  return sorted([*best, *[(NONE, ())] * (n - len(best))])


def assert_decodes(tokens, scores, expected):
  for b, row in enumerate(expected):
    padded = [[*tokens, *[0] * LENGTH][:LENGTH] for _, tokens in row]
    np.testing.assert_array_equal(tokens[b], padded, err_msg=f'row {b}')
    np.testing.assert_allclose(scores[b], [s for s, _ in row], rtol=1e-5, atol=1e-4)


# A model whose next token hangs on the last one and the row.


def table(seed, rows, size):
  """Returns log-probabilities `[row, last token, V]`."""
  logits = 1.5 * np.random.default_rng(seed).standard_normal((rows, size, size))
  return np.log(oracle.softmax(logits))


@functools.cache
def table_search(n):
  """Compiles `(table, prompts, eos_id, **options) -> (tokens, scores, steps)`."""
  taken = []

  @oracle.jit
  def run(table, prompts, eos_id, **options):
    rows = jnp.arange(len(prompts) * n) // n

    def tokens_to_logits(state):
      jax.debug.callback(lambda: taken.append(1))
      logits = table[rows, state.cur_token[:, 0]]
      # Some rows' logits are moved: only differences count.
      return logits + (jnp.arange(len(rows)) % 2)[:, None], state.cache

    layer = dict.fromkeys(('cached_key', 'cached_value'), jnp.zeros((2, 1, 1, 1)))
    cache = {'cache_index': jnp.zeros((), jnp.int32), 'layer': layer}
    return beam_search.beam_search(
      prompts, {'decoder': cache}, tokens_to_logits, eos_id, n, **options
    )

  def call(*args, **options):
    taken.clear()
    tokens, scores = run(*args, **options)
    jax.effects_barrier()
    return np.asarray(tokens), np.asarray(scores), len(taken)

  return call


def table_prompts(prompts, length):
  padded = [[0, *prompt, *[0] * length][:length] for prompt in prompts]
  return np.array(padded, np.int32)


def test_many_small_models():
  """Random tables, prompts and markers; the steps taken are the rule's, too."""
  n, size, seeds = 3, 7, 60
  rng = np.random.default_rng(0)
  steps, ended = [], []
  for seed in range(seeds):
    log_probs = table(seed, 2, size)
    eos_id, alpha = int(rng.integers(size)), float(rng.choice([0.0, 0.6, 1.5]))
    others = np.setdiff1d(np.arange(1, size), eos_id)
    prompts = [tuple(rng.choice(others, rng.integers(0, 4))) for _ in range(2)]
    expected, expected_steps = search(
      lambda b, tokens, p=log_probs: p[b, tokens[-1] if tokens else 0],
      prompts,
      LENGTH,
      n,
      eos_id,
      alpha,
    )
    tokens, scores, taken = table_search(n)(
      log_probs, table_prompts(prompts, LENGTH), eos_id, alpha=alpha
    )
    assert_decodes(tokens, scores, expected)
    assert taken == expected_steps, seed
    steps.append(taken)
    ended.append(sum(score > NONE for row in expected for score, _ in row))
  assert len(set(steps)) > 3  # Some searches stop early, some do not.
  assert len(set(ended)) > 2


@pytest.mark.parametrize(('ratio', 'steps'), [(1.62, 2), (1.70, 1)])
def test_the_bound_on_what_live_beams_may_reach(ratio, steps):
  """It has the penalty of 9 tokens, ((5 + 9) / 6)^0.6 = 1.66, where 8 fit; T5X's rule.

  The first step ends a beam; the live one has `ratio` times its log-probability.
  """
  ends, goes_on, eos_id = 0.3, 0.3**ratio, 6
  probabilities = np.full((7, 7), 0.098)
  probabilities[:, [1, eos_id]] = 0.5, 0.01
  probabilities[0] = (1 - ends - goes_on) / 5
  probabilities[0, [1, eos_id]] = goes_on, ends
  tokens, scores, taken = table_search(1)(
    np.log([probabilities] * 2), table_prompts([(), ()], LENGTH), eos_id, alpha=0.6
  )
  assert taken == steps
  np.testing.assert_array_equal(tokens[:, 0], [[eos_id, *[0] * (LENGTH - 1)]] * 2)
  np.testing.assert_allclose(scores, np.log([[ends]] * 2), rtol=1e-5)


@pytest.mark.parametrize(
  ('limit', 'steps'), [(-1, LENGTH), (3, 3), (4, 4), (99, LENGTH)]
)
def test_most_steps(limit, steps):
  """As if results were that long; forced tokens count as steps."""
  run, log_probs, prompts = table_search(3), table(0, 2, 7), [(4, 2), ()]
  tokens, _, taken = run(
    log_probs, table_prompts(prompts, LENGTH), -1, alpha=0.6, max_decode_step=limit
  )
  expected, _, _ = run(log_probs, table_prompts(prompts, steps), -1, alpha=0.6)
  assert taken == steps
  np.testing.assert_array_equal(tokens[:, :, :steps], expected)
  assert not tokens[:, :, steps:].any()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_decodes': -2}, 'num_decodes=-2 must be at least 1.'),
    ({'cache_offset': 1}, 'cache_offset=1: layers are not scanned here; use 0.'),
  ],
)
def test_bad_input(options, message):
  with pytest.raises(ValueError) as error:
    beam_search.beam_search(jnp.zeros((1, 3), jnp.int32), {}, None, 1, **options)
  assert str(error.value) == message


# What it costs: K and V are neither repeated nor moved.

BEAMS, INPUT_LENGTH = 4, 40
BIG = 64  # Head size, so that keys and values outgrow all else.


def every_equation(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax_core.jaxprs_in_params(equation.params):
      yield from every_equation(inner)


def traced_step(K):
  """Returns the jaxpr of a step of beam search."""
  module = network.Transformer(oracle.config(K, head_dim=BIG))
  params = oracle.initial_shapes(module.config)['params']
  inputs = jax.ShapeDtypeStruct((B, INPUT_LENGTH), jnp.int32)
  prompts = jax.ShapeDtypeStruct((B, LENGTH), jnp.int32)
  search = functools.partial(beam_search.beam_search, num_decodes=BEAMS)
  jaxpr = jax.make_jaxpr(
    lambda *args: generate.generate(module, *args, search, eos_id=1)
  )(params, inputs, prompts)
  (loop,) = (x for x in every_equation(jaxpr.jaxpr) if x.primitive.name == 'while')
  return loop.params['body_jaxpr'].jaxpr


@pytest.mark.parametrize('K', [1, oracle.N])
def test_keys_and_values_are_neither_repeated_nor_moved(K):
  step = traced_step(K)
  shapes = [x.aval.shape for x in step.invars]
  for positions in (INPUT_LENGTH, LENGTH * BEAMS):  # Of cross- and self-attention.
    key, value = (B, K, BIG, positions), (B, K, positions, BIG)
    assert shapes.count(key) == shapes.count(value) == oracle.DECODER_LAYERS
  # Of all that a step reads or computes, nothing is as large as what T5X's beams read.
  computed = [
    (equation.primitive.name, x.aval.size)
    for equation in every_equation(step)
    for x in equation.outvars
  ]
  sizes = [x.aval.size for x in step.invars] + [size for _, size in computed]
  assert max(sizes) < BEAMS * B * K * INPUT_LENGTH * BIG
  cache_size = B * K * LENGTH * BEAMS * BIG
  written = {name for name, size in computed if size == cache_size}
  assert written == {'dynamic_update_slice'}
