"""Reads Hugging Face's folders of T5, mT5 and umT5 under T5X's names, tensor by tensor.

  config.json                     sizes, activation, and what else is computed
  model.safetensors               the tensors; or model.safetensors.index.json and
                                  the files that it names
  pytorch_model.bin               the same in PyTorch's format, or with an index

The logits are those of `lm_head.weight`; where that is missing, or equal to the
embedding, those of the embedding. The config says whether they are divided by sqrt(D).
T5X divides where it has no kernel of logits, and only there.

A linear layer's weight is [out, in] there and [in, out] in T5X, the relative position
bias [buckets, heads] there and [heads, buckets] in T5X. No step is kept: it reads as 0.

Source: T5ForConditionalGeneration of the library transformers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x.checkpoints.config import ModelConfig
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.checkpoints.tree import KINDS, TARGET, Architecture
from gqa_t5x.checkpoints.weight_files import open_weights, read_json
from gqa_t5x.errors import BadInput

CONFIG = 'config.json'
_EMBEDDING, _LOGITS = 'shared.weight', 'lm_head.weight'
# Copies of the embedding; and a bias that old checkpoints keep, but no model uses.
_EMBEDDING_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
_UNUSED = ('decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight',)
# model_type -> its feed_forward_proj where config.json has none.
_FAMILIES = {'t5': 'relu', 'mt5': 'gated-gelu', 'umt5': 'gated-gelu'}
# Relatives, and why they are not read.
_RELATIVES = {
  'longt5': 'its encoder attends locally, and to summaries of the rest',
  'switch_transformers': 'its MLPs are choices among experts',
  't5gemma': 'its positions are rotary, and its blocks are those of Gemma',
  't5gemma2': 'its positions are rotary, and its blocks are those of Gemma',
  'bart': 'its positions are learned, and its layer norms have a mean and a bias',
  'mbart': 'its positions are learned, and its layer norms have a mean and a bias',
  'pegasus': 'its positions are sinusoids, and its layer norms have a mean and a bias',
}
# Names of activations -> those of flax.linen, whose `gelu` is the tanh approximation.
ACTIVATIONS = {
  'relu': 'relu',
  'gelu_new': 'gelu',
  'gelu_pytorch_tanh': 'gelu',
  'silu': 'silu',
  'swish': 'silu',
}
# T5X's modules -> Hugging Face's, whose sublayers have numbers.
_IN_LAYERS = {
  'encoder': {
    'pre_attention_layer_norm': '0.layer_norm',
    'attention': '0.SelfAttention',
    'pre_mlp_layer_norm': '1.layer_norm',
    'mlp': '1.DenseReluDense',
  },
  'decoder': {
    'pre_self_attention_layer_norm': '0.layer_norm',
    'self_attention': '0.SelfAttention',
    'pre_cross_attention_layer_norm': '1.layer_norm',
    'encoder_decoder_attention': '1.EncDecAttention',
    'pre_mlp_layer_norm': '2.layer_norm',
    'mlp': '2.DenseReluDense',
  },
}
_KERNELS = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
_OUTSIDE = {
  'token_embedder': 'shared',
  'logits_dense': 'lm_head',
  'relpos_bias': '{}.block.{}.layer.0.SelfAttention.relative_attention_bias',
  'encoder_norm': '{}.final_layer_norm',
  'decoder_norm': '{}.final_layer_norm',
}


def open_folder(file: epath.Path) -> dict[str, LazyTensor]:
  """Opens a folder of a T5, by what `weights_file` found.

  Returns:
    "target/decoder/...", under T5X's names and in its layout, and "state/step", an
    int32 of 0. Matrices are transposed when they are read.

  Raises:
    BadInput: it is another model, or a part is missing or damaged.
  """
  config = read_json(file.parent / CONFIG)
  architecture = _architecture(file.parent / CONFIG, config)
  tensors = open_weights(file)
  tensors |= _embedding(file, tensors)
  architecture = _with_logits(architecture, tensors, _is_scaled(config))
  shapes = architecture.shapes()
  names = {path: name_of(path) for path in shapes}
  expected = {
    n: shapes[p] if n == _EMBEDDING else shapes[p][::-1] for p, n in names.items()
  }
  _check_shapes(file, tensors, expected)
  result = {f'{TARGET}{p}': in_other_layout(n, tensors[n]) for p, n in names.items()}
  return result | {'state/step': LazyTensor.of(np.zeros((), np.int32))}


def _embedding(
  file: epath.Path, tensors: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
  """The embedding, by any of its names; reading it compares it with its copies.

  Raises:
    BadInput: encoder and decoder have embeddings of different shapes.
  """
  there = [n for n in (_EMBEDDING, *_EMBEDDING_COPIES) if n in tensors]
  if not there:
    return {}
  first = tensors[there[0]]

  def differ(name: str) -> BadInput:
    return BadInput(
      f'{file}: {there[0]} and {name} differ; a T5 of this project has one embedding,'
      ' for encoder and decoder'
    )

  for name in there[1:]:
    if tensors[name].shape != first.shape:
      raise differ(name)

  def read() -> np.ndarray:
    embedding = first.read()
    for name in there[1:]:
      if not np.array_equal(embedding, tensors[name].read()):
        raise differ(name)
    return embedding

  return {_EMBEDDING: LazyTensor(first.shape, first.dtype, read)}


def _with_logits(
  architecture: Architecture, tensors: dict[str, LazyTensor], scaled: bool
) -> Architecture:
  """Says whether logits have a kernel of their own; in `tensors`, makes it T5X's."""
  embedding, logits = tensors.get(_EMBEDDING), tensors.get(_LOGITS)
  if embedding is None:
    return architecture  # `_check_shapes` says what is missing.
  # Old files of PyTorch hold a copy. The config says that it is one: then they scale.
  if logits is None or (scaled and _are_equal(embedding, logits)):
    tensors.pop(_LOGITS, None)
    if scaled:
      return dataclasses.replace(architecture, own_logits=False)
    tensors[_LOGITS] = embedding
  elif scaled:
    tensors[_LOGITS] = _divided(logits, architecture.emb_dim**0.5)
  return architecture


def _are_equal(a: LazyTensor, b: LazyTensor) -> bool:
  return a.shape == b.shape and np.array_equal(a.read(), b.read())


def _is_scaled(config: Mapping[str, Any]) -> bool:
  """Whether logits are divided by sqrt(D), as transformers 4 and 5 write it.

  transformers 5 has a name for it; before, it was so where the output was tied, as it
  is by default but in mT5.
  """
  if config.get('scale_decoder_outputs') is not None:
    return bool(config['scale_decoder_outputs'])
  return (
    config.get('model_type') != 'mt5' and config.get('tie_word_embeddings') is not False
  )


def _divided(tensor: LazyTensor, divisor: float) -> LazyTensor:
  """Divides a tensor once it is read; the result is float32."""
  dtype = np.dtype(np.float32)

  def read() -> np.ndarray:
    return np.divide(tensor.read(), divisor, dtype=np.float32)

  return LazyTensor(tensor.shape, dtype, read)


def name_of(path: str) -> str:
  """Hugging Face's name of a parameter of T5X."""
  parts = path.split('/')[:-1]
  stack = parts[0]
  layer = parts[1].removeprefix('layers_') if len(parts) > 2 else '0'
  if parts[-1] in _OUTSIDE:
    return _OUTSIDE[parts[-1]].format(stack, layer) + '.weight'
  _, _, module, *kernel = parts
  there = [stack, 'block', layer, 'layer']
  there += [_IN_LAYERS[stack][module], *(_KERNELS.get(k, k) for k in kernel)]
  return '.'.join([*there, 'weight'])


def in_other_layout(name: str, tensor: LazyTensor) -> LazyTensor:
  """Transposes every matrix but the embedding, once it is read: there, or back.

  `name` is Hugging Face's.
  """
  if len(tensor.shape) != 2 or name == _EMBEDDING:
    return tensor
  return LazyTensor(
    tensor.shape[::-1], tensor.dtype, lambda: np.ascontiguousarray(tensor.read().T)
  )


def _check_shapes(
  file: epath.Path, tensors: Mapping[str, LazyTensor], expected: Mapping[str, tuple]
) -> None:
  """Raises unless the tensors are those that config.json speaks of."""
  ignored = {*_EMBEDDING_COPIES, *_UNUSED}
  missing = sorted(expected.keys() - tensors.keys())
  extra = sorted(tensors.keys() - expected.keys() - ignored)
  problems = [f'{name} is missing' for name in missing]
  problems += [f'{name} is extra' for name in extra]
  problems += [
    f'{name} has shape {tensors[name].shape}, expected {shape}'
    for name, shape in expected.items()
    if name in tensors and tensors[name].shape != shape
  ]
  if problems:
    raise BadInput(f'{file} does not fit {CONFIG} beside it: {"; ".join(problems)}')


def read_config(folder: epath.Path) -> ModelConfig:
  """Reads what the shapes do not show from the folder's config.json.

  Raises:
    BadInput: a value is no number, or one that this project cannot compute with.
  """
  file = folder / CONFIG
  config = read_json(file)
  pad = _number(file, config, 'pad_token_id', 0)
  if pad != 0:
    raise BadInput(
      f'{file} has pad_token_id {pad!r}; here padding is 0, as in every T5'
    )
  start = _number(file, config, 'decoder_start_token_id', pad)
  gated, activation = _activation(file, config)
  return ModelConfig(
    relpos_num_buckets=_number(file, config, 'relative_attention_num_buckets', 32),
    relpos_max_distance=_number(file, config, 'relative_attention_max_distance', 128),
    layer_norm_epsilon=_number(file, config, 'layer_norm_epsilon', 1e-6),
    decoder_start_token_id=start,
    eos_token_id=_number(file, config, 'eos_token_id', 1),
    mlp_activation=None if activation == ('gelu' if gated else 'relu') else activation,
  )


def _architecture(file: epath.Path, config: Mapping[str, Any]) -> Architecture:
  """Reads the sizes, and refuses by name what this project does not compute."""
  kind = config.get('model_type')
  if kind not in _FAMILIES:
    why = f': {_RELATIVES[kind]}' if kind in _RELATIVES else ''
    known = ', '.join(_FAMILIES)
    raise BadInput(f'{file} has model_type {kind!r}, not one of {known}{why}')
  if config.get('is_encoder_decoder', True) is not True:
    raise BadInput(
      f'{file} has is_encoder_decoder {config["is_encoder_decoder"]!r}; a model with an'
      ' encoder and a decoder is needed'
    )
  gated, _ = _activation(file, config)

  def size(name: str, default: int | None = None) -> int:
    value = _number(file, config, name, default)
    if type(value) is not int or value < 1:
      raise BadInput(f'{file} has {name} {value!r}, expected a number')
    return value

  layers = size('num_layers')
  return Architecture(
    vocab_size=size('vocab_size'),
    emb_dim=size('d_model'),
    mlp_dim=size('d_ff'),
    num_heads=size('num_heads'),
    head_dim=size('d_kv'),
    num_buckets=size('relative_attention_num_buckets', 32),
    num_layers={'encoder': layers, 'decoder': size('num_decoder_layers', layers)},
    num_kv_heads=dict.fromkeys(KINDS, size('num_heads')),
    gated=gated,
    bias_per_layer=kind == 'umt5',
  )


def _activation(file: epath.Path, config: Mapping[str, Any]) -> tuple[bool, str]:
  """Whether the MLP has a gate, and its activation, by flax's name.

  Raises:
    BadInput: it is not computed here, or values contradict each other.
  """
  default = _FAMILIES.get(config.get('model_type'))
  projection = str(config.get('feed_forward_proj', default))
  gated, name = projection.startswith('gated-'), projection.removeprefix('gated-')
  # transformers does the same: T5 v1.1's gelu has always been the approximation.
  name = 'gelu_new' if projection == 'gated-gelu' else name
  said = config.get('dense_act_fn', name)
  if name not in ACTIVATIONS:
    raise BadInput(
      f'{file} has feed_forward_proj {projection!r}; this project computes'
      f' {", ".join(ACTIVATIONS)}, gated or not'
    )
  if ACTIVATIONS.get(said) != ACTIVATIONS[name]:
    raise BadInput(
      f'{file} has dense_act_fn {said!r}, and feed_forward_proj {projection!r}'
    )
  if config.get('is_gated_act', gated) is not gated:
    raise BadInput(
      f'{file} has is_gated_act {config["is_gated_act"]!r}, and feed_forward_proj'
      f' {projection!r}'
    )
  return gated, ACTIVATIONS[name]


def _number(
  file: epath.Path, config: Mapping[str, Any], name: str, default: Any
) -> Any:
  value = default if config.get(name) is None else config[name]
  if type(value) not in (int, float) or value < 0:
    raise BadInput(f'{file} has {name} {value!r}, expected a number')
  return value
