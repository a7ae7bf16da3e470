"""The tensors of a Hugging Face folder: safetensors or PyTorch's, in a file or more.

model.safetensors, pytorch_model.bin    all tensors
....index.json                          which of several files holds which tensor
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x import files
from gqa_t5x.checkpoints import safetensors
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.errors import BadInput, first_line

# As transformers does: safetensors goes first if the folder has both formats.
WEIGHTS = (
  ('model.safetensors', 'model.safetensors.index.json'),
  ('pytorch_model.bin', 'pytorch_model.bin.index.json'),
)
MOST_BYTES = 5 * 10**9  # Of tensors in a file that is written.
_OTHER_WEIGHTS = ('flax_model.msgpack', 'tf_model.h5')
_SAVE = 'save the model as safetensors: model.save_pretrained(FOLDER)'
# PyTorch's names of dtypes -> those of safetensors.
_KINDS = {'float16': 'F16', 'bfloat16': 'BF16', 'float32': 'F32', 'float64': 'F64'}


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


def open_weights(file: epath.Path) -> dict[str, LazyTensor]:
  """Opens one file, or an index and all files that it names."""
  read = _open_torch if file.name.startswith('pytorch') else safetensors.read_index

  def opener(file: epath.Path) -> dict[str, LazyTensor]:
    files.refuse_pointer(file)
    return read(file)

  if file.suffix != '.json':
    return opener(file)
  shard_of = read_json(file).get('weight_map')
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


def write_weights(folder: epath.Path, tensors: Mapping[str, LazyTensor]) -> None:
  """Writes safetensors, and an index if they are more than MOST_BYTES.

  A tensor that is larger by itself has a file of its own. One tensor is in memory at a
  time.
  """
  name, index = WEIGHTS[0]
  parts: list[dict[str, LazyTensor]] = [{}]
  nbytes = 0
  for path, tensor in tensors.items():
    nbytes += tensor.nbytes
    if parts[-1] and nbytes > MOST_BYTES:
      parts.append({})
      nbytes = tensor.nbytes
    parts[-1][path] = tensor
  if len(parts) == 1:
    safetensors.write(folder / name, tensors)
    return
  shard_of = {}
  for i, part in enumerate(parts, 1):
    file = f'model-{i:05}-of-{len(parts):05}.safetensors'
    safetensors.write(folder / file, part)
    shard_of |= dict.fromkeys(part, file)
  size = {'total_size': sum(tensor.nbytes for tensor in tensors.values())}
  files.write_json(folder / index, {'metadata': size, 'weight_map': shard_of})


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
    dtype = safetensors.dtype_of(file, name, _KINDS.get(kind, kind))
    read_it = functools.partial(read, name, dtype)
    tensors[name] = LazyTensor(tuple(tensor.shape), dtype, read_it)
  return tensors


def read_json(file: epath.Path) -> dict[str, Any]:
  if not file.exists():
    raise BadInput(f'{file} is missing: the folder is only partly copied')
  try:
    content = json.loads(file.read_bytes())
  except ValueError as error:
    raise BadInput(f'{file} is truncated or damaged: {error}') from error
  if not isinstance(content, dict):
    raise BadInput(f'{file} is damaged: it holds no JSON object')
  return content
