"""Writes the whole decoder as one program, for whoever has JAX, but not this project.

  model.stablehlo  of `jax.export`: from parameters and int32 tokens `[B, S]` to tokens
                   `[B, n, T]` and float32 scores `[B, n]`, the best decode last; for
                   all PLATFORMS
  params.npz       the parameters by their paths; NumPy reads bfloat16 as two bytes, V2
  config.json      B, S, T, n, dtype, the end marker, versions

Shapes are fixed: inputs are padded with 0.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

import gqa_t5x
from gqa_t5x import files
from gqa_t5x.checkpoints import tree
from gqa_t5x.errors import BadInput
from gqa_t5x.exports.source import Source

# JAX's names of platforms -> those that a program is traced for.
PLATFORMS = {'cpu': 'cpu', 'cuda': 'gpu', 'tpu': 'tpu'}
DTYPES = ('float32', 'bfloat16')


def write(
  source: Source,
  folder: epath.Path,
  *,
  batch_size: int = 1,
  input_length: int = 512,
  output_length: int = 64,
  num_beams: int = 1,
  dtype: str = 'float32',
) -> None:
  """Fills a local folder; the whole model is in memory.

  Args:
    source: the model.
    folder: empty.
    batch_size: B, inputs that are decoded together.
    input_length: S, tokens.
    output_length: T, tokens; decoding ends before if all rows have.
    num_beams: n; 1 decodes greedily, more is beam search with T5X's alpha of 0.6.
    dtype: of parameters, activations and cache, one of DTYPES; logits and scores are
      float32.

  Raises:
    BadInput: a number is below 1, or the dtype is unknown.
  """
  import jax

  numbers = dict(
    batch_size=batch_size,
    input_length=input_length,
    output_length=output_length,
    num_beams=num_beams,
  )
  for name, number in numbers.items():
    if number < 1:
      raise BadInput(f'--{name}={number} must be at least 1')
  if dtype not in DTYPES:
    raise BadInput(f'--dtype={dtype} is unknown; choose one of {", ".join(DTYPES)}')
  params = {n: source.read(n).astype(np.dtype(dtype)) for n in source.params}
  tokens = jax.ShapeDtypeStruct((batch_size, input_length), np.int32)
  shapes = {n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in params.items()}
  decode = _decode(source, output_length, num_beams, dtype)
  exported = jax.export.export(jax.jit(decode), platforms=tuple(PLATFORMS))(
    shapes, tokens
  )
  (folder / 'model.stablehlo').write_bytes(exported.serialize())
  with (folder / 'params.npz').open('wb') as file:
    np.savez(file, **params)
  numbers['dtype'] = dtype
  versions = {'gqa_t5x': gqa_t5x.__version__, 'jax': jax.__version__}
  facts = {'platforms': list(PLATFORMS), 'eos_token_id': source.config.eos_token_id}
  files.write_json(folder / 'config.json', {**numbers, **facts, 'versions': versions})


def _decode(source: Source, T: int, num_beams: int, dtype: str) -> Callable[..., Any]:
  """From (path -> parameter, tokens `[B, S]`) to tokens and scores.

  The model computes in another way on a CPU and on a TPU, so it is traced for each.
  """
  import jax
  import jax.numpy as jnp

  from gqa_t5x.decoding import beam_search, generate, sampling
  from gqa_t5x.model import network, sharding

  module = network.Transformer(source.network_config(dtype))
  decode_fn = beam_search.beam_search if num_beams > 1 else sampling.greedy
  options = {'eos_id': source.config.eos_token_id, 'num_decodes': num_beams}

  def decode_on(platform, params, tokens_BS):
    start = source.config.decoder_start_token_id
    prompts_BT = jnp.zeros((len(tokens_BS), T), jnp.int32).at[:, 0].set(start)
    with sharding.traced_for(platform):
      return generate.generate(
        module, tree.unflatten(params), tokens_BS, prompts_BT, decode_fn, **options
      )

  on = {name: functools.partial(decode_on, p) for name, p in PLATFORMS.items()}
  return lambda params, tokens: jax.lax.platform_dependent(params, tokens, **on)
