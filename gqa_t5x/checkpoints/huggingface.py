"""Reads Hugging Face's T5 v1.1 folders under T5X's names, a tensor at a time.

  config.json                     sizes, and whether it is of v1.1
  model.safetensors               the tensors; or model.safetensors.index.json and
                                  the files that it names
  pytorch_model.bin               the same in PyTorch's format, or with an index

The logits are those of `lm_head.weight`; where that is missing, of the embedding, and
the config says whether divided by sqrt(D). T5X's kernel is the same.

A linear layer's weight is [out, in] there and [in, out] in T5X, the relative position
bias [buckets, heads] there and [heads, buckets] in T5X. No step is kept: it reads as 0.

Source: T5ForConditionalGeneration of the library transformers.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x import files
from gqa_t5x.checkpoints.config import ModelConfig
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.checkpoints.safetensors import dtype_of, read_index
from gqa_t5x.checkpoints.tree import KINDS, TARGET, Architecture
from gqa_t5x.errors import BadInput, first_line

CONFIG = 'config.json'
# As transformers does: safetensors goes first if the folder has both formats.
WEIGHTS = (
  ('model.safetensors', 'model.safetensors.index.json'),
  ('pytorch_model.bin', 'pytorch_model.bin.index.json'),
)
_OTHER_WEIGHTS = ('flax_model.msgpack', 'tf_model.h5')
_SAVE = 'save the model as safetensors: model.save_pretrained(FOLDER)'
# PyTorch's names of dtypes -> those of safetensors.
_KINDS = {'float16': 'F16', 'bfloat16': 'BF16', 'float32': 'F32', 'float64': 'F64'}
_EMBEDDING, _LOGITS = 'shared.weight', 'lm_head.weight'
# Copies of the embedding; and a bias that old checkpoints keep, but no model uses.
_EMBEDDING_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
_UNUSED = ('decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight',)
# Values of config.json that decide what is computed -> those that are computed here.
# `gelu_new` is the tanh approximation, T5X's `gelu`.
_WANTED = {
  'feed_forward_proj': ('gated-gelu', 'gated-gelu_new'),
  'dense_act_fn': ('gelu_new', 'gelu_pytorch_tanh'),
  'is_gated_act': (True,),
  'is_encoder_decoder': (True,),
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
  'relpos_bias': '{}.block.0.layer.0.SelfAttention.relative_attention_bias',
  'encoder_norm': '{}.final_layer_norm',
  'decoder_norm': '{}.final_layer_norm',
}


def weights_file(folder: epath.Path) -> epath.Path | None:
  """Finds the file that holds or lists the tensors of a Hugging Face folder.

  Raises:
    BadInput: two files are there of which only one can be right, or only formats that
      are not read.
  """
  for names in WEIGHTS:
    found = [folder / name for name in names if (folder / name).exists()]
    if len(found) == 2:
      raise BadInput(
        f'{folder} has two models, {found[0].name} and {found[1].name}; keep one'
      )
    if found:
      return found[0]
  for name in _OTHER_WEIGHTS:
    if (folder / name).exists():
      raise BadInput(f'{folder / name} is of a format that is not read; {_SAVE}')
  return None


def open_folder(file: epath.Path) -> dict[str, LazyTensor]:
  """Opens a folder of T5 v1.1, flan-t5 or mT5, by what `weights_file` found.

  Returns:
    "target/decoder/...", under T5X's names and in its layout, and "state/step", an
    int32 of 0. Matrices are transposed when they are read.

  Raises:
    BadInput: it is another model, or a part is missing or damaged.
  """
  config = _read_json(file.parent / CONFIG)
  architecture = _architecture(file.parent / CONFIG, config)
  shapes, tensors = architecture.shapes(), _open_weights(file)
  tensors |= _embedding(file, tensors)
  if _LOGITS not in tensors and _EMBEDDING in tensors:
    tensors[_LOGITS] = tensors[_EMBEDDING]
  if _is_scaled(config) and _LOGITS in tensors:
    tensors[_LOGITS] = _divided(tensors[_LOGITS], architecture.emb_dim**0.5)
  names = {path: _name(path) for path in shapes}
  expected = {
    n: shapes[p] if n == _EMBEDDING else shapes[p][::-1] for p, n in names.items()
  }
  _check_shapes(file, tensors, expected)
  result = {f'{TARGET}{p}': _in_t5x_layout(n, tensors[n]) for p, n in names.items()}
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


def _is_scaled(config: Mapping[str, Any]) -> bool:
  """Whether logits are divided by sqrt(D), as transformers 4 and 5 write it.

  transformers 5 has a name for it; before, it was so for a T5 whose output was tied.
  """
  if config.get('scale_decoder_outputs') is not None:
    return bool(config['scale_decoder_outputs'])
  return (
    config.get('model_type') == 't5' and config.get('tie_word_embeddings') is not False
  )


def _divided(tensor: LazyTensor, divisor: float) -> LazyTensor:
  """Divides a tensor once it is read; the result is float32."""
  dtype = np.dtype(np.float32)

  def read() -> np.ndarray:
    return np.divide(tensor.read(), divisor, dtype=np.float32)

  return LazyTensor(tensor.shape, dtype, read)


def _name(path: str) -> str:
  """Hugging Face's name of a parameter."""
  parts = path.split('/')[:-1]
  stack = parts[0]
  if parts[-1] in _OUTSIDE:
    return _OUTSIDE[parts[-1]].format(stack) + '.weight'
  _, layer, module, *kernel = parts
  there = [stack, 'block', layer.removeprefix('layers_'), 'layer']
  there += [_IN_LAYERS[stack][module], *(_KERNELS.get(k, k) for k in kernel)]
  return '.'.join([*there, 'weight'])


def _in_t5x_layout(name: str, tensor: LazyTensor) -> LazyTensor:
  """Transposes every matrix but the embedding, once it is read."""
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
  config = _read_json(file)
  pad = _number(file, config, 'pad_token_id', 0)
  if pad != 0:
    raise BadInput(
      f'{file} has pad_token_id {pad!r}; here padding is 0, as in every T5'
    )
  start = _number(file, config, 'decoder_start_token_id', pad)
  return ModelConfig(
    relpos_num_buckets=_number(file, config, 'relative_attention_num_buckets', 32),
    relpos_max_distance=_number(file, config, 'relative_attention_max_distance', 128),
    layer_norm_epsilon=_number(file, config, 'layer_norm_epsilon', 1e-6),
    decoder_start_token_id=start,
    eos_token_id=_number(file, config, 'eos_token_id', 1),
  )


def _architecture(file: epath.Path, config: Mapping[str, Any]) -> Architecture:
  """Reads the sizes, and refuses by name what this project does not compute."""
  kind = config.get('model_type')
  if kind not in ('t5', 'mt5'):
    raise BadInput(f'{file} has model_type {kind!r}; T5 v1.1, flan-t5 or mT5 is needed')
  for name, wanted in _WANTED.items():
    if config.get(name, wanted[0]) not in wanted:
      raise BadInput(
        f'{file} is of another T5: it has {name} {config[name]!r}; T5 v1.1, flan-t5 or'
        f' mT5 is needed, with {wanted[0]!r}'
      )
  if 'feed_forward_proj' not in config and kind == 't5':
    raise BadInput(
      f'{file} is of another T5: without feed_forward_proj it is of T5 1.0 (relu); T5'
      " v1.1, flan-t5 or mT5 is needed, with 'gated-gelu'"
    )

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
  )


def _number(
  file: epath.Path, config: Mapping[str, Any], name: str, default: Any
) -> Any:
  value = default if config.get(name) is None else config[name]
  if type(value) not in (int, float) or value < 0:
    raise BadInput(f'{file} has {name} {value!r}, expected a number')
  return value


def _read_json(file: epath.Path) -> dict[str, Any]:
  if not file.exists():
    raise BadInput(f'{file} is missing: the folder is only partly copied')
  try:
    content = json.loads(file.read_bytes())
  except ValueError as error:
    raise BadInput(f'{file} is truncated or damaged: {error}') from error
  if not isinstance(content, dict):
    raise BadInput(f'{file} is damaged: it holds no JSON object')
  return content


def _open_weights(file: epath.Path) -> dict[str, LazyTensor]:
  """Opens one file, or an index and all files that it names."""
  read = _open_torch if file.name.startswith('pytorch') else read_index

  def opener(file: epath.Path) -> dict[str, LazyTensor]:
    files.refuse_pointer(file)
    return read(file)

  if file.suffix != '.json':
    return opener(file)
  shard_of = _read_json(file).get('weight_map')
  if not isinstance(shard_of, dict) or not shard_of:
    raise BadInput(f'{file} is damaged: it has no weight_map')
  names = sorted(set(map(str, shard_of.values())))
  missing = [name for name in names if not (file.parent / name).exists()]
  if missing:
    raise BadInput(
      f'{file} names {", ".join(missing)}, which is not there: the folder is only'
      ' partly copied'
    )
  shards = {name: opener(file.parent / name) for name in names}
  tensors = {}
  for tensor, shard in shard_of.items():
    if tensor not in shards[shard]:
      raise BadInput(f'{file} says that {tensor} is in {shard}; it is not')
    tensors[tensor] = shards[shard][tensor]
  return tensors


def _open_torch(file: epath.Path) -> dict[str, LazyTensor]:
  if str(file).startswith('gs://'):
    raise BadInput(f'{file} must be on a local disk, as PyTorch reads it; {_SAVE}')
  try:
    import torch
  except ImportError as error:
    raise BadInput(
      f"{file} needs PyTorch: pip install 'gqa_t5x[torch]', or {_SAVE}"
    ) from error

  try:
    state = torch.load(str(file), map_location='cpu', mmap=True, weights_only=True)
  except Exception as error:  # of many types, for many kinds of damage
    raise BadInput(f'cannot read {file}: {first_line(error)}; {_SAVE}') from error

  def read(name: str, dtype: np.dtype) -> np.ndarray:
    try:
      tensor = state[name].contiguous()
      # NumPy has no bfloat16: the bits go over as integers.
      bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
      return np.array(bits.numpy()).view(dtype)
    except Exception as error:  # the file changed, or is damaged inside
      raise BadInput(
        f'cannot read the tensor {name} of {file}: {first_line(error)}'
      ) from error

  tensors = {}
  for name, tensor in state.items():
    kind = str(tensor.dtype).removeprefix('torch.')
    dtype = dtype_of(file, name, _KINDS.get(kind, kind))
    read_it = functools.partial(read, name, dtype)
    tensors[name] = LazyTensor(tuple(tensor.shape), dtype, read_it)
  return tensors
