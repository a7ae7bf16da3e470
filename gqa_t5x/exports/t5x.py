"""Writes a T5X checkpoint with all key/value heads, for T5X's own network.

  checkpoint_N/   T5X's legacy layout: parameters and step, no optimizer state

Each key/value head is repeated for its query heads, or, of the latent form, mapped to
what each reads: the same function.
"""

import dataclasses

import numpy as np
from etils import epath

from gqa_t5x.checkpoints import config, tokenizer_files, writer
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.checkpoints.tree import TARGET
from gqa_t5x.errors import BadInput
from gqa_t5x.exports.source import Source

# What T5X's network computes in one way only; its activation can be set, and the end
# marker is the vocabulary's.
_FIXED = (
  *('relpos_num_buckets', 'relpos_max_distance'),
  *('layer_norm_epsilon', 'decoder_start_token_id'),
)


def write(source: Source, folder: epath.Path, *, num_kv_heads: str = 'all') -> None:
  """Fills a folder with a checkpoint of the source's step.

  Args:
    source: the model.
    folder: empty.
    num_kv_heads: 'all': as many as query heads.

  Raises:
    BadInput: other heads are asked for, or T5X's network cannot compute the model.
  """
  if num_kv_heads != 'all':
    raise BadInput(
      f'--num_kv_heads={num_kv_heads}: this format has all of them; for fewer, use'
      ' python -m gqa_t5x.convert'
    )
  _check(source)
  params = {f'{TARGET}{n}': t for n, t in source.with_all_heads().params.items()}
  params['state/step'] = LazyTensor.of(np.asarray(source.step, np.int32))

  def add_files(made: epath.Path, _) -> None:
    config.write(made, source.config)
    if source.folder is not None:
      tokenizer_files.copy(source.folder, made)

  writer.write_tensors(folder / f'checkpoint_{source.step}', params, add_files)


def _check(source: Source) -> None:
  published = dataclasses.asdict(config.ModelConfig())
  for name in _FIXED:
    if (value := getattr(source.config, name)) != published[name]:
      raise BadInput(
        f"{source.name} has {name}={value}, and T5X's own network computes"
        f' {published[name]} alone; train and evaluate this model with'
        ' gqa_t5x.model.network'
      )
  if source.architecture.bias_per_layer:
    raise BadInput(
      f"{source.name} is a umT5, with a position bias in every layer; T5X's own"
      ' network of T5.1.1 has one a stack'
    )
