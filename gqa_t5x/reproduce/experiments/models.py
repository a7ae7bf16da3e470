"""The models of the experiments: what each is, and where it comes from."""

import dataclasses
from typing import NamedTuple

from gqa_t5x.model import sizes


class Method(NamedTuple):
  """How a model with few heads is made.

  Attributes:
    name: of gqa_t5x.convert, or that of MHA or SCRATCH.
    statistics: 'none', 'weights' or 'calibrated': what the method knows of the inputs.
    grouping: 'contiguous' or 'similarity'.
  """

  name: str
  statistics: str = 'none'
  grouping: str = 'contiguous'

  @property
  def title(self) -> str:
    """What a reader calls it, e.g. 'svd (calibrated)'."""
    if self == MHA:
      return 'MHA'
    details = [self.statistics] if self.name == 'svd' else []
    details += [self.grouping] if self.grouping != 'contiguous' else []
    return f'{self.name} ({", ".join(details)})' if details else self.name


MHA = Method('none')  # no conversion: as pre-trained
SCRATCH = Method('scratch')  # pre-trained with few heads from the first step
MEAN, FIRST, RANDOM = Method('mean'), Method('first'), Method('random')
PAPER_METHODS = (MEAN, FIRST, RANDOM)
SVD, SVD_BY_WEIGHTS = Method('svd', 'calibrated'), Method('svd', 'weights')
METHODS = (
  *PAPER_METHODS,
  Method('procrustes', 'calibrated'),
  Method('procrustes_rms', 'calibrated'),
  Method('refit', 'calibrated'),
  SVD_BY_WEIGHTS,
  SVD,
  Method('svd', 'calibrated', 'similarity'),
)


@dataclasses.dataclass(frozen=True)
class Model:
  """One model of an experiment, before it is fine-tuned.

  Attributes:
    size: a key of sizes.SIZES.
    num_kv_heads: K.
    method: of conversion; MHA or SCRATCH: it is not converted.
    alpha: uptraining steps by pre-training steps.
    seed: of the data's order in uptraining, and of the method random; None: the gin
      file's and the command's own.
    kv_head_dim: R of the latent form; None: the head size.
  """

  size: str
  num_kv_heads: int
  method: Method = MHA
  alpha: float = 0.0
  seed: int | None = None
  kv_head_dim: int | None = None

  @property
  def is_mha(self) -> bool:
    """Whether it has all key/value heads."""
    return self.num_kv_heads == sizes.SIZES[self.size]['num_heads']

  @property
  def heads(self) -> str:
    """'mha', 'mqa', 'gqa8' or 'latent512': in names of folders."""
    return self._heads_label.lower().replace('-', '')

  @property
  def origin(self) -> str:
    """Name of what it is uptrained from: size, heads and method."""
    suffix = '' if self.method == MHA else f'_{self.method.name}'
    return f'{self.size}_{self.heads}{suffix}'

  @property
  def name(self) -> str:
    """Name of its folders: those of another alpha are others."""
    if self.method in (MHA, SCRATCH):
      return self.origin
    return f'{self.origin}_alpha{self.alpha:g}'

  @property
  def label(self) -> str:
    """What the paper calls it: MHA-XXL, GQA-8-XXL, MQA-XXL; ours: Latent-512-XXL."""
    size = self.size.upper() if self.size.startswith('x') else self.size.capitalize()
    return f'{self._heads_label}-{size}'

  @property
  def _heads_label(self) -> str:
    return heads_label(self.num_kv_heads, self.is_mha, self.kv_head_dim)

  @property
  def conversion_name(self) -> str:
    """Name of the converted checkpoint: seeds share it where nothing is drawn."""
    name, *more = self.method
    words = [name, *(word for word in more if word not in ('none', 'contiguous'))]
    words.append(str(self.num_kv_heads))
    words += [f'seed{self.seed}'] if self.method == RANDOM else []
    return '_'.join(words)

  @property
  def run_name(self) -> str:
    """Name of the uptraining run, which tells seeds apart."""
    name = self.conversion_name
    return name if self.method == RANDOM else f'{name}_seed{self.seed}'

  @property
  def method_suffix(self) -> str:
    """'_svd' and so on; nothing for MHA and for mean, the paper's own."""
    return '' if self.method in (MHA, MEAN) else f'_{self.method.name}'


def mha(size: str, alpha: float = 0.0, seed: int | None = None) -> Model:
  """Returns the model of a size that all others are converted from."""
  return Model(size, sizes.SIZES[size]['num_heads'], MHA, alpha, seed)


def heads_label(
  num_kv_heads: int, is_mha: bool = False, kv_head_dim: int | None = None
) -> str:
  """Returns 'MHA', 'MQA', 'GQA-8', or of one head of 512 numbers 'Latent-512'."""
  if kv_head_dim is not None:
    return f'Latent-{kv_head_dim}'
  if is_mha:
    return 'MHA'
  return 'MQA' if num_kv_heads == 1 else f'GQA-{num_kv_heads}'
