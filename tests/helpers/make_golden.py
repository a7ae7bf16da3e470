"""Writes t5x.npz: what T5X's own T5.1.1 computes, for machines without T5X.

Run it where Google's T5X is installed, from the repository root, after a change of
the model or the batches in tests/helpers/model_oracle.py:

    PYTHONPATH=. python tests/helpers/make_golden.py

The file holds names, shapes, dtypes and axes of the parameters, the tokens of the
batches, logits, and decodes with their scores (DECODES). Parameters are not stored:
`model_oracle.random_value` makes them from their names. T5X has no K/V heads, so the
results for K < N are those of its multi-head network with every K/V head repeated.
"""

import functools
import json
import pathlib
import sys

import jax
import numpy as np
import seqio

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from helpers import model_oracle as oracle

# Name: T5X's decode function, decodes an input, what else the function takes.
DECODES = {
  'greedy': (
    'temperature_sample',
    1,
    {'temperature': 0.0, 'topk': 0, 'rescale_log_probs': False},
  ),
  'topk': ('temperature_sample', 2, {'temperature': 0.8, 'topk': 5}),
  'topp': (
    'temperature_sample',
    1,
    {'topk': 0, 'topp': 0.7, 'rescale_log_probs': False},
  ),
  'beam1': ('beam_search', 1, {}),
  'beam3': ('beam_search', 3, {}),
}
# All with K = 2 heads, drawing and several beams with any.
DECODES_AND_HEADS = [
  (name, K)
  for name in DECODES
  for K in oracle.KV_HEADS
  if K == 2 or name in ('topk', 'beam3')
]
# Prompts of each row, and an end marker.
PROMPTS = {
  'plain': ((), 1),
  'prompted': (((7, 3, 9), (), (5, 2, 8, 3, 3), (6,)), 26),
}
RNG = np.array([0, 3], np.uint32)
PATH = pathlib.Path(__file__).parents[1] / 'golden' / 't5x.npz'


@functools.cache
def t5x_module(**overrides):
  """Returns T5X's network at the oracle's sizes."""
  from t5x.examples.t5 import network

  return network.Transformer(network.T5Config(**(oracle.SIZES | overrides)))


def t5x_params(num_kv_heads):
  """Returns the parameters of K heads, repeated for T5X's network."""
  params = oracle.params(oracle.config(num_kv_heads))
  return oracle.repeat_kv_heads(params, num_kv_heads)


def describe(variables):
  """Returns parameter path -> [shape, dtype, axes], as JSON has them."""
  names = oracle.axis_names(variables)
  return {
    path: [list(leaf.shape), str(leaf.dtype), list(names[path])]
    for path, leaf in oracle.flat(variables['params']).items()
  }


@functools.cache
def t5x_decode(module, name, prefill=False, model_class=None):
  """Compiles T5X's model class and decoding around a network.

  Args:
    module: T5X's network or ours.
    name: a key of DECODES.
    prefill: whether prompts are filled into the cache in one pass, T5X's default, not
      forced token by token.
    model_class: T5X's; a subclass of it may stand in.

  Returns:
    `(params, prompts, eos_id) -> (tokens [B, num_decodes, T], scores)`.
  """
  from t5x import adafactor, decoding, models

  function, num_decodes, options = DECODES[name]
  decode_fn = functools.partial(getattr(decoding, function), **options)

  def step_by_step(inputs, cache, tokens_to_logits, **kwargs):
    return decode_fn(inputs, cache, tokens_to_logits, **kwargs)

  vocabulary = seqio.PassThroughVocabulary(size=oracle.V, eos_id=1)
  model = (model_class or models.EncoderDecoderModel)(
    module,
    vocabulary,
    vocabulary,
    adafactor.Adafactor(),
    # T5X fills prompts in if the decode function has an argument for where to begin.
    decode_fn=decode_fn if prefill else step_by_step,
  )

  @oracle.jit
  def run(params, prompts, eos_id):
    tokens, aux = model.predict_batch_with_aux(
      params,
      oracle.batch() | {'decoder_input_tokens': prompts},
      decoder_params={'eos_id': eos_id, 'decode_rng': RNG},
      return_all_decodes=True,
      num_decodes=num_decodes,
      prompt_with_targets=True,
    )
    return tokens, aux['scores']

  return run


@functools.cache
def stored():
  """Returns the arrays of the file as it is."""
  with np.load(PATH) as file:
    return dict(file)


def make():
  """Returns the arrays of the file as they would be now."""
  module = t5x_module()
  variables = jax.eval_shape(lambda: oracle.init(module))
  arrays = {'parameters': np.array(json.dumps(describe(variables)))}
  batches = {'padded': oracle.batch(), 'packed': oracle.packed_batch()}
  apply = oracle.jit(
    lambda params, batch: module.apply(
      {'params': params}, **batch, enable_dropout=False
    )
  )
  for kind, batch in batches.items():
    arrays |= {f'{kind}/{name}': value for name, value in batch.items()}
    for K in oracle.KV_HEADS:
      arrays[f'{kind}/logits/{K}'] = np.asarray(apply(t5x_params(K), batch))
  for kind, (prompts, eos_id) in PROMPTS.items():
    for name, K in DECODES_AND_HEADS:
      tokens, scores = t5x_decode(module, name)(
        t5x_params(K), oracle.prompt_batch(prompts), eos_id
      )
      arrays[f'{name}/{kind}/tokens/{K}'] = np.asarray(tokens)
      arrays[f'{name}/{kind}/scores/{K}'] = np.asarray(scores)
  return arrays


if __name__ == '__main__':
  np.savez_compressed(PATH, **make())
  print(f'{PATH.name}: {PATH.stat().st_size} bytes')
