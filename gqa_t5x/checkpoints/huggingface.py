"""Reads Hugging Face's T5 v1.1 folders under T5X's names, a tensor at a time.

  config.json                     sizes, and whether it is of v1.1
  model.safetensors               the tensors; or model.safetensors.index.json and
                                  the files that it names
  pytorch_model.bin               the same in PyTorch's format, or with an index

A linear layer's weight is [out, in] there and [in, out] in T5X, the relative position
bias [buckets, heads] there and [heads, buckets] in T5X. No step is kept: it reads as 0.

Source: T5ForConditionalGeneration of the library transformers.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.checkpoints.safetensors import dtype_of, read_index
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
_EMBEDDING = 'shared.weight'
# Copies of the embedding; and a bias that old checkpoints keep, but no model uses.
_EMBEDDING_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
_UNUSED = ('decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight',)
# Hugging Face's sublayers in order: T5X's name of the layer norm, of the module, and
# Hugging Face's name of the module.
_SUBLAYERS = {
  'encoder': (
    ('pre_attention_layer_norm', 'attention', 'SelfAttention'),
    ('pre_mlp_layer_norm', 'mlp', 'DenseReluDense'),
  ),
  'decoder': (
    ('pre_self_attention_layer_norm', 'self_attention', 'SelfAttention'),
    (
      'pre_cross_attention_layer_norm',
      'encoder_decoder_attention',
      'EncDecAttention',
    ),
    ('pre_mlp_layer_norm', 'mlp', 'DenseReluDense'),
  ),
}


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """What config.json says; the names there are Hugging Face's."""

  vocab_size: int
  d_model: int
  d_ff: int
  d_kv: int
  num_heads: int
  num_layers: int
  num_decoder_layers: int
  relative_attention_num_buckets: int


def weights_file(folder: epath.Path) -> epath.Path | None:
  """Finds the file that holds or lists the tensors of a Hugging Face folder.

  Args:
    folder: any folder.

  Returns:
    The file; None if the folder is not of Hugging Face.

  Raises:
    BadInput: two files are there of which only one can be right, or only
      formats that are not read.
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
  """Opens a folder of T5 v1.1, flan-t5 or mT5.

  Args:
    file: what `weights_file` found.

  Returns:
    "target/decoder/...", under T5X's names and in its layout, and "state/step", an
    int32 of 0. Matrices are transposed when they are read.

  Raises:
    BadInput: it is another model, or a part is missing or damaged.
  """
  sizes = _read_config(file.parent / CONFIG)
  tensors = _open_weights(file)
  for copy in _EMBEDDING_COPIES:
    if copy in tensors:
      tensors.setdefault(_EMBEDDING, tensors[copy])
  table = dict(_table(sizes))
  _check_shapes(file, tensors, dict(table.values()))
  result = {
    f'target/{path}': _in_t5x_layout(path, tensors[name])
    for path, (name, _) in table.items()
  }
  return result | {'state/step': LazyTensor.of(np.zeros((), np.int32))}


def _table(sizes: _Sizes) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
  """Yields T5X's path, and Hugging Face's name and shape, of every parameter."""
  V, D, F = sizes.vocab_size, sizes.d_model, sizes.d_ff
  NH = sizes.num_heads * sizes.d_kv
  bias = 'block.0.layer.0.SelfAttention.relative_attention_bias.weight'
  attention = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
  yield 'token_embedder/embedding', (_EMBEDDING, (V, D))
  yield 'decoder/logits_dense/kernel', ('lm_head.weight', (V, D))
  layers = {'encoder': sizes.num_layers, 'decoder': sizes.num_decoder_layers}
  for stack, sublayers in _SUBLAYERS.items():
    buckets = (sizes.relative_attention_num_buckets, sizes.num_heads)
    yield f'{stack}/relpos_bias/rel_embedding', (f'{stack}.{bias}', buckets)
    yield f'{stack}/{stack}_norm/scale', (f'{stack}.final_layer_norm.weight', (D,))
    for i in range(layers[stack]):
      for j, (norm, module, there) in enumerate(sublayers):
        path, name = f'{stack}/layers_{i}', f'{stack}.block.{i}.layer.{j}'
        yield f'{path}/{norm}/scale', (f'{name}.layer_norm.weight', (D,))
        if module == 'mlp':
          shapes = {'wi_0': (F, D), 'wi_1': (F, D), 'wo': (D, F)}
          names = {kernel: kernel for kernel in shapes}
        else:
          shapes = {k: (D, NH) if k == 'out' else (NH, D) for k in attention}
          names = attention
        for kernel, shape in shapes.items():
          weight = f'{name}.{there}.{names[kernel]}.weight'
          yield f'{path}/{module}/{kernel}/kernel', (weight, shape)


def _in_t5x_layout(path: str, tensor: LazyTensor) -> LazyTensor:
  """Transposes every matrix but the embedding, once it is read."""
  if len(tensor.shape) != 2 or path == 'token_embedder/embedding':
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


def _read_config(file: epath.Path) -> _Sizes:
  config = _read_json(file)
  kind = config.get('model_type')
  if kind not in ('t5', 'mt5'):
    raise BadInput(f'{file} has model_type {kind!r}; T5 v1.1, flan-t5 or mT5 is needed')
  activation = config.get('feed_forward_proj')
  gated = config.get('is_gated_act', True)
  # transformers 5 always ties, and says by a second name what the first one meant.
  tied = config.get('scale_decoder_outputs', config.get('tie_word_embeddings', True))
  if activation != 'gated-gelu' or not gated or tied:
    raise BadInput(
      f'{file} is of another T5 (feed_forward_proj {activation!r}, tied output'
      f' embedding {bool(tied)}); T5 v1.1 or flan-t5 is needed, with gated-gelu and an'
      ' output projection of its own'
    )
  defaults = {
    'num_decoder_layers': config.get('num_layers'),
    'relative_attention_num_buckets': 32,
  }
  values = {}
  for field in dataclasses.fields(_Sizes):
    value = config.get(field.name)
    value = defaults.get(field.name) if value is None else value
    if type(value) is not int or value < 1:
      raise BadInput(f'{file} has {field.name} {value!r}, expected a number')
    values[field.name] = value
  return _Sizes(**values)


def _read_json(file: epath.Path) -> dict[str, Any]:
  if not file.exists():
    raise BadInput(f'{file} is missing: the folder is only partly copied')
  try:
    content = json.loads(file.read_text())
  except ValueError as error:
    raise BadInput(f'{file} is truncated or damaged: {error}') from error
  if not isinstance(content, dict):
    raise BadInput(f'{file} is damaged: it holds no JSON object')
  return content


def _open_weights(file: epath.Path) -> dict[str, LazyTensor]:
  """Opens one file, or an index and all files that it names."""
  opener = _open_torch if file.name.startswith('pytorch') else read_index
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
