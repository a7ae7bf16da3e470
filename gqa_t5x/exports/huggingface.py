"""Writes a Hugging Face folder of T5 or umT5, which the library transformers reads.

  config.json, generation_config.json
  model.safetensors   or model.safetensors.index.json and files of 5 GB
  tokenizer.json ...  where the folder of the input has them

transformers has as many key/value heads as query heads, so each of ours is repeated for
its queries, or of the latent form mapped to what each reads: the same function, without
the speed.
"""

from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from gqa_t5x import files
from gqa_t5x.checkpoints import huggingface, tokenizer_files
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.checkpoints.weight_files import write_weights
from gqa_t5x.errors import BadInput
from gqa_t5x.exports import vocabulary as vocabularies
from gqa_t5x.exports.source import Source

DTYPES = {
  'float32': np.dtype(np.float32),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
}


def write(
  source: Source,
  folder: epath.Path,
  *,
  vocabulary: str | None = None,
  dtype: str | None = None,
) -> None:
  """Fills a folder; one tensor is in memory at a time.

  Args:
    source: the model.
    folder: empty.
    vocabulary: a file of tokens, which is copied; None: the source's tokenizer is.
    dtype: of the tensors, one of DTYPES; None: that of the source, or float32 if it has
      several.

  Raises:
    BadInput: the dtype is unknown, or there is no such vocabulary.
  """
  tokenizer = vocabularies.find(source, vocabulary) if vocabulary else source.folder
  to = _dtype(source, dtype)
  whole = source.with_all_heads()
  names = {path: huggingface.name_of(path) for path in whole.params}
  write_weights(
    folder,
    {
      name: _as(to, huggingface.in_other_layout(name, whole.params[path]))
      for path, name in names.items()
    },
  )
  config = _config(source)
  special = {name: config[name] for name in config if name.endswith('_token_id')}
  files.write_json(folder / huggingface.CONFIG, config | {'torch_dtype': to.name})
  files.write_json(folder / 'generation_config.json', special)
  if tokenizer is not None:
    tokenizer_files.copy(tokenizer, folder)


def _dtype(source: Source, given: str | None) -> np.dtype:
  if given is not None and given not in DTYPES:
    raise BadInput(f'--dtype={given} is unknown; choose one of {", ".join(DTYPES)}')
  there = {tensor.dtype for tensor in source.params.values()}
  return DTYPES[given or 'float32'] if given or len(there) > 1 else there.pop()


def _as(dtype: np.dtype, tensor: LazyTensor) -> LazyTensor:
  return LazyTensor(
    tensor.shape, dtype, lambda: tensor.read().astype(dtype, copy=False)
  )


def _config(source: Source) -> dict[str, Any]:
  """What transformers computes with: the inverse of `huggingface.read_config`."""
  sizes, config = source.architecture, source.config
  kind = 'umt5' if sizes.bias_per_layer else 't5'
  return {
    'architectures': [f'{kind.upper()}ForConditionalGeneration'],
    'model_type': kind,
    'is_encoder_decoder': True,
    'vocab_size': sizes.vocab_size,
    'd_model': sizes.emb_dim,
    'd_ff': sizes.mlp_dim,
    'd_kv': sizes.head_dim,
    'num_heads': sizes.num_heads,
    'num_layers': sizes.num_layers['encoder'],
    'num_decoder_layers': sizes.num_layers['decoder'],
    'relative_attention_num_buckets': sizes.num_buckets,
    'relative_attention_max_distance': config.relpos_max_distance,
    'layer_norm_epsilon': config.layer_norm_epsilon,
    'feed_forward_proj': _projection(source),
    # It decides on the division of logits by sqrt(D), too.
    'tie_word_embeddings': not sizes.own_logits,
    'pad_token_id': 0,
    'eos_token_id': config.eos_token_id,
    'decoder_start_token_id': config.decoder_start_token_id,
  }


def _projection(source: Source) -> str:
  """The MLP as transformers writes it: relu, gated-gelu, ..."""
  here = source.network_config().mlp_activations[0]
  there = next(n for n, ours in huggingface.ACTIVATIONS.items() if ours == here)
  if not source.architecture.gated:
    return there
  # Which has always been the tanh form.
  return 'gated-gelu' if there == 'gelu_new' else f'gated-{there}'
