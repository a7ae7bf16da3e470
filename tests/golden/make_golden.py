"""Writes t5x.npz: what T5X's own T5.1.1 computes, for machines without T5X.

Run it where Google's T5X is installed, from the repository root, after a change of
the model or the batches in tests/model_oracle.py:

    PYTHONPATH=. python tests/golden/make_golden.py

The file holds names, shapes, dtypes and axes of the parameters, the tokens of the
batches, logits, and greedy decodes with their scores. Parameters are not stored:
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

import model_oracle as oracle

PATH = pathlib.Path(__file__).with_name('t5x.npz')


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


def decode_batch(length=oracle.DECODE_LENGTH, prompts=()):
  """Returns a batch to decode: inputs, and prompts after the start token."""
  inputs = oracle.batch()['encoder_input_tokens']
  tokens = np.zeros((oracle.B, length), np.int32)
  for b, prompt in enumerate(prompts):
    tokens[b, 1 : 1 + len(prompt)] = prompt
  return {'encoder_input_tokens': inputs, 'decoder_input_tokens': tokens}


@functools.cache
def t5x_decode(module, how, num_decodes=1, prompted=False):
  """Compiles T5X's model class and decoding around a network.

  Args:
    module: T5X's network or ours.
    how: 'greedy' or 'beam'.
    num_decodes: decodes a row.
    prompted: whether the batch holds prompts.

  Returns:
    `(params, batch) -> (tokens [B, num_decodes, T], scores [B, num_decodes])`.
  """
  from t5x import adafactor, decoding, models

  greedy = functools.partial(
    decoding.temperature_sample, temperature=0.0, topk=0, rescale_log_probs=False
  )
  vocabulary = seqio.PassThroughVocabulary(size=oracle.V, eos_id=1)
  model = models.EncoderDecoderModel(
    module,
    vocabulary,
    vocabulary,
    adafactor.Adafactor(),
    decode_fn=greedy if how == 'greedy' else decoding.beam_search,
  )

  @oracle.jit
  def run(params, batch):
    tokens, aux = model.predict_batch_with_aux(
      params,
      batch,
      return_all_decodes=True,
      num_decodes=num_decodes,
      prompt_with_targets=prompted,
    )
    return tokens, aux['scores']

  return run


def make():
  """Returns the arrays of the file."""
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
  for K in oracle.KV_HEADS:
    tokens, scores = t5x_decode(module, 'greedy')(t5x_params(K), decode_batch())
    arrays[f'greedy/tokens/{K}'] = np.asarray(tokens[:, 0])
    arrays[f'greedy/scores/{K}'] = np.asarray(scores[:, 0])
  return arrays


if __name__ == '__main__':
  np.savez_compressed(PATH, **make())
  print(f'{PATH.name}: {PATH.stat().st_size} bytes')
