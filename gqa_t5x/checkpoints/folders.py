"""Finds, lists and opens checkpoints of any layout, without T5X, Orbax or transformers.

  legacy   checkpoint_N/checkpoint             t5x_layouts.py
  Orbax    checkpoint_N/state/_METADATA        t5x_layouts.py
  Hugging Face   any_name/config.json          huggingface.py

Either way the result is path -> LazyTensor: nothing is read but names and shapes.
Paths are local or gs:// (pytorch_model.bin: local).
"""

import pathlib
import re
from typing import Any

from etils import epath

from gqa_t5x import files
from gqa_t5x.checkpoints import config, huggingface, t5x_layouts, tree, weight_files
from gqa_t5x.checkpoints.config import ModelConfig
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.checkpoints.t5x_layouts import METADATA, MSGPACK, STATE
from gqa_t5x.errors import BadInput

_STEP = re.compile(r'checkpoint_(\d+)')


def checkpoint_step(path: epath.Path) -> int | None:
  """The N of a folder named checkpoint_N, or None."""
  match = _STEP.fullmatch(path.name)
  return int(match[1]) if match else None


def list_checkpoints(folder: epath.Path) -> list[epath.Path]:
  """The checkpoint_N in a folder, by rising step."""
  found = folder.iterdir() if folder.is_dir() else ()
  return sorted(
    (p for p in found if checkpoint_step(p) is not None), key=checkpoint_step
  )


def find_checkpoint(path: epath.Path) -> epath.Path:
  """Finds the checkpoint folder that a path means.

  Args:
    path: such a folder, a file in it that says what it is (`checkpoint`,
      `model.safetensors`), or a model_dir (then the latest checkpoint_N in it).

  Raises:
    BadInput: there is none, or two in one folder.
  """
  if not path.exists():
    raise BadInput(
      f'there is no checkpoint at {path}: no such file or folder{_of_hub(path)}'
    )
  names = {MSGPACK, huggingface.CONFIG, *sum(weight_files.WEIGHTS, ())}
  if path.name in names and not path.is_dir():
    path = path.parent
  if _entry(path) is not None or (path / STATE).is_dir():
    return path
  checkpoints = list_checkpoints(path)
  if checkpoints:
    return find_checkpoint(checkpoints[-1])
  raise BadInput(
    f'there is no T5X checkpoint in {path}: expected a file named checkpoint, a folder'
    ' named state, or folders named checkpoint_<step>; nor is there a Hugging Face'
    ' model: model.safetensors or pytorch_model.bin, or an index of such files; '
    + _what_is_there(path)
  )


def _of_hub(path: epath.Path) -> str:
  """What to add for `google/flan-t5-small`, a name of the Hugging Face hub."""
  here = '://' not in str(path) and path.absolute().parent.parent == pathlib.Path.cwd()
  if not here or path.parent.exists():
    return ''
  name = f'{path.parent.name}/{path.name}'
  return (
    f'. If {name} is a name of the Hugging Face hub, download it first: hf download'
    f' {name} --local-dir {path.name}'
  )


def _what_is_there(path: epath.Path) -> str:
  """Names the weights that have another name; or why there may be none."""
  there = [path] if path.is_file() else path.iterdir() if path.is_dir() else ()
  weights = sorted(f.name for f in there if f.suffix in ('.safetensors', '.bin', '.pt'))
  if not weights:
    return 'it may be only partly copied'
  return (
    f'{", ".join(weights)} is there under another name: rename it to one of these, with'
    f' its {huggingface.CONFIG} beside it'
  )


def step_is_known(path: epath.Path) -> bool:
  """Whether a folder keeps its step; Hugging Face's do not: theirs reads as 0."""
  return weight_files.weights_file(path) is None


def _entry(path: epath.Path) -> epath.Path | None:
  """The file that lists a checkpoint's tensors; BadInput if two layouts have one."""
  orbax = [path / STATE / name for name in (METADATA, MSGPACK)]
  # Orbax itself wrote both for a while.
  orbax = [file for file in orbax if file.exists()][:1]
  found = [file for file in (path / MSGPACK, *orbax) if file.exists()]
  weights = weight_files.weights_file(path)
  found += [weights] if weights else []
  if len(found) > 1:
    raise BadInput(f'{path} has two checkpoints, {found[0]} and {found[1]}; keep one')
  return found[0] if found else None


def read_config(path: epath.Path) -> ModelConfig:
  """Reads what a checkpoint folder says of its model beyond the shapes of its tensors.

  Raises:
    BadInput: it is damaged, or a value is one that this project cannot compute with.
  """
  if weight_files.weights_file(path) is not None:
    return huggingface.read_config(path)
  return config.read(path) or ModelConfig()


def dataset_state(path: epath.Path) -> list[str]:
  """Names of the data pipeline's saved state in a checkpoint folder, if any."""
  there = [folder for folder in (path, path / 'dataset') if folder.is_dir()]
  found = [file for folder in there for file in folder.iterdir()]
  return sorted(
    str(file.relative_to(path)) for file in found if file.name.startswith('train_ds')
  )


def open_checkpoint(path: epath.Path, *, int8: bool = False) -> dict[str, LazyTensor]:
  """Opens a checkpoint folder of any layout.

  Args:
    path: of `find_checkpoint`.
    int8: whether parameters may be int8, as `Model.save` writes them.

  Returns:
    "target/decoder/...", "state/step", "state/param_states/..." -> tensor.

  Raises:
    BadInput: a part is missing or damaged, or int8; the message names file and tensor.
  """
  tensors = _open(path)
  if not int8 and (scales := tree.int8_scales(tensors)):
    raise BadInput(
      f'{path} has {len(scales)} kernels in int8, and here they must be float32 or'
      ' bfloat16: take the checkpoint that it was made from. gqa_t5x.load reads it'
    )
  return tensors


def _open(path: epath.Path) -> dict[str, LazyTensor]:
  file = _entry(path)
  if file is None:
    raise BadInput(
      f'{path / STATE} has neither {METADATA} nor {MSGPACK}: the checkpoint is only'
      ' partly written or copied'
    )
  files.refuse_pointer(file)
  if file.name in (MSGPACK, METADATA):
    return t5x_layouts.open_tree(file)
  return huggingface.open_folder(file)


def read_params(path: epath.PathLike) -> tuple[dict[str, Any], tree.Architecture]:
  """Reads the parameters of a checkpoint of any layout into memory, and its sizes.

  Parameters may be int8, with their scales beside them.

  Raises:
    BadInput: a part is missing or damaged, or it is not of a T5.
  """
  tensors = tree.parameters(open_checkpoint(epath.Path(path), int8=True))
  scales = tree.int8_scales(tensors)
  shapes = {name: t.shape for name, t in tensors.items() if name not in scales}
  architecture = tree.read_architecture(shapes)
  return tree.unflatten({name: t.read() for name, t in tensors.items()}), architecture
