"""Writes a model of CTranslate2, which keeps the few key/value heads.

  model.bin               the tensors; a linear layer's weight is [out, in]
  config.json             start, end and unknown token, epsilon of the layer norm
  shared_vocabulary.json  the tokens, by id

Source: `specs.TransformerSpec` of CTranslate2 4.8.5, and its docs/quantization.md.
"""

import importlib.util
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x.checkpoints import tree
from gqa_t5x.errors import BadInput
from gqa_t5x.exports import vocabulary as vocabularies
from gqa_t5x.exports.source import Source

QUANTIZATIONS = (
  *('float32', 'float16', 'bfloat16', 'int16', 'int8'),
  *('int8_float32', 'int8_float16', 'int8_bfloat16'),
)
# Of flax.linen, whose `gelu` is the tanh form -> of CTranslate2.
_ACTIVATIONS = {'relu': 'RELU', 'gelu': 'GELUTanh', 'silu': 'SWISH'}
_UNKNOWN_TOKEN = 2  # Of every T5's vocabulary; 0 is padding.


def write(
  source: Source,
  folder: epath.Path,
  *,
  vocabulary: str | None = None,
  quantization: str = 'float32',
) -> None:
  """Fills a local folder; the whole model is in memory, in float32.

  Args:
    source: the model.
    folder: empty.
    vocabulary: a file of tokens, as of `vocabulary.read_tokens`.
    quantization: one of QUANTIZATIONS, of the weights on disk.

  Raises:
    BadInput: CTranslate2 is not installed, the quantization is unknown, the vocabulary
      does not fit, or the model is of the latent form.
  """
  _check(source, quantization)
  tokens = vocabularies.read_tokens(source, vocabulary)
  spec = _spec(source)
  spec.register_source_vocabulary(tokens)
  spec.register_target_vocabulary(tokens)
  spec.config.bos_token = tokens[0]
  spec.config.eos_token = tokens[source.config.eos_token_id]
  spec.config.unk_token = tokens[_UNKNOWN_TOKEN]
  spec.config.decoder_start_token = tokens[source.config.decoder_start_token_id]
  spec.config.layer_norm_epsilon = source.config.layer_norm_epsilon
  spec.validate()
  spec.optimize(quantization)
  spec.save(str(folder))


def _check(source: Source, quantization: str) -> None:
  if (R := source.architecture.kv_head_dim) is not None:
    raise BadInput(
      f'{source.name} is of the latent form, with key/value heads of {R} numbers, and'
      f' CTranslate2 knows none but of the head size, {source.architecture.head_dim};'
      ' choose --format=stablehlo, which keeps it, or convert without --kv_head_dim'
    )
  if quantization not in QUANTIZATIONS:
    known = ', '.join(QUANTIZATIONS)
    raise BadInput(f'--quantization={quantization} is unknown; choose one of {known}')
  needed = {'ctranslate2': 'ctranslate2'}
  if 'bfloat16' in quantization:
    needed['torch'] = 'torch'
  for package, extra in needed.items():
    if importlib.util.find_spec(package) is None:
      raise BadInput(
        f'--format=ctranslate2 --quantization={quantization} needs the package'
        f" {package}: pip install 'gqa_t5x[{extra}]'"
      )


def _spec(source: Source) -> Any:
  """CTranslate2's description of the model, with its tensors."""
  from ctranslate2 import specs

  sizes = source.architecture
  common = dict(
    activation=specs.Activation[
      _ACTIVATIONS[source.network_config().mlp_activations[0]]
    ],
    relative_attention_bias=True,
    ffn_glu=sizes.gated,
    rms_norm=True,
    head_dim=sizes.head_dim,
  )
  stacks = {
    'encoder': specs.TransformerEncoderSpec(
      sizes.num_layers['encoder'],
      sizes.num_heads,
      num_heads_kv=sizes.num_kv_heads['encoder'],
      **common,
    ),
    'decoder': specs.TransformerDecoderSpec(
      sizes.num_layers['decoder'],
      sizes.num_heads,
      num_heads_kv=sizes.num_kv_heads['self_attention'],
      **common,
    ),
  }
  embedding = source.read(tree.EMBEDDING)
  for name, stack in stacks.items():
    stack.scale_embeddings = False
    stack.layer_norm.gamma = source.read(f'{name}/{name}_norm/scale')
    for i, layer in enumerate(stack.layer):
      _fill_mlp(layer.ffn, source, f'{name}/layers_{i}')
  stacks['encoder'].embeddings[0].weight = embedding
  decoder = stacks['decoder']
  decoder.embeddings.weight = embedding
  if sizes.own_logits:
    decoder.projection.weight = _weight(source, 'decoder/logits_dense')
  else:
    decoder.projection.weight = embedding
    decoder.scale_outputs = sizes.emb_dim**-0.5
  for kind, path in sizes.attention_modules():
    stack, layer = path.split('/')[:2]
    layer = stacks[stack].layer[int(layer.removeprefix('layers_'))]
    attention = layer.attention if kind == 'cross_attention' else layer.self_attention
    _fill_attention(attention, source, kind, path)
  return specs.TransformerSpec(**stacks)


def _fill_mlp(ffn: Any, source: Source, layer: str) -> None:
  ffn.layer_norm.gamma = source.read(f'{layer}/pre_mlp_layer_norm/scale')
  if source.architecture.gated:
    ffn.linear_0.weight = _weight(source, f'{layer}/mlp/wi_0')
    ffn.linear_0_noact.weight = _weight(source, f'{layer}/mlp/wi_1')
  else:
    ffn.linear_0.weight = _weight(source, f'{layer}/mlp/wi')
  ffn.linear_1.weight = _weight(source, f'{layer}/mlp/wo')


def _fill_attention(attention: Any, source: Source, kind: str, path: str) -> None:
  """Queries, keys and values are one weight, but for the queries that look across."""
  query, key, value = (
    _weight(source, f'{path}/{name}') for name in ('query', 'key', 'value')
  )
  norm, _ = tree.norms_before(kind, path)
  attention.layer_norm.gamma = source.read(norm)
  attention.queries_scale = 1.0  # T5 does not divide by sqrt(H).
  attention.num_heads_kv = np.int32(source.architecture.num_kv_heads[kind])
  attention.linear[-1].weight = _weight(source, f'{path}/out')
  if kind == 'cross_attention':
    attention.linear[0].weight = query
    attention.linear[1].weight = np.concatenate([key, value])
    return
  attention.linear[0].weight = np.concatenate([query, key, value])
  bias_NR = source.read(source.architecture.bias_path(path))
  attention.relative_attention_bias = np.ascontiguousarray(bias_NR.T)
  distance = np.int32(source.config.relpos_max_distance)
  attention.relative_attention_max_distance = distance


def _weight(source: Source, module: str) -> np.ndarray:
  """A kernel `[in, out]` as CTranslate2's `[out, in]`."""
  return np.ascontiguousarray(source.read(f'{module}/kernel').T)
