"""The models of the experiments: what each is, and where it comes from."""

import dataclasses

from gqa_t5x.model import sizes

PRETRAINED = 'none'  # no conversion: MHA as pre-trained
SCRATCH = 'scratch'  # pre-trained with few heads from the first step

# Method, statistics and grouping of a conversion.
Method = tuple[str, str, str]
MHA: Method = (PRETRAINED, 'none', 'contiguous')
MEAN: Method = ('mean', 'none', 'contiguous')
FIRST: Method = ('first', 'none', 'contiguous')
RANDOM: Method = ('random', 'none', 'contiguous')
SVD: Method = ('svd', 'calibrated', 'contiguous')
METHODS: tuple[Method, ...] = (
  MEAN,
  FIRST,
  RANDOM,
  ('procrustes', 'calibrated', 'contiguous'),
  ('procrustes_rms', 'calibrated', 'contiguous'),
  ('refit', 'calibrated', 'contiguous'),
  ('svd', 'weights', 'contiguous'),
  SVD,
  ('svd', 'calibrated', 'similarity'),
)


@dataclasses.dataclass(frozen=True)
class Model:
  """One model of an experiment, before it is fine-tuned.

  Attributes:
    size: a key of sizes.SIZES.
    num_kv_heads: K.
    method: of gqa_t5x.convert, PRETRAINED or SCRATCH.
    alpha: uptraining steps by pre-training steps.
    statistics: 'none', 'weights' or 'calibrated': what the method knows of the inputs.
    grouping: 'contiguous' or 'similarity'.
    seed: of the data's order in uptraining, and of the method random; None: the gin
      file's and the command's own.
  """

  size: str
  num_kv_heads: int
  method: str = PRETRAINED
  alpha: float = 0.0
  statistics: str = 'none'
  grouping: str = 'contiguous'
  seed: int | None = None

  @property
  def is_mha(self) -> bool:
    """Whether it has all key/value heads."""
    return self.num_kv_heads == sizes.SIZES[self.size]['num_heads']

  @property
  def is_seeded(self) -> bool:
    """Whether its conversion draws numbers."""
    return self.method == 'random'

  @property
  def heads(self) -> str:
    """'mha', 'mqa' or 'gqa8': in names of folders."""
    if self.is_mha:
      return 'mha'
    return 'mqa' if self.num_kv_heads == 1 else f'gqa{self.num_kv_heads}'

  @property
  def origin(self) -> str:
    """Name of what it is uptrained from: size, heads and method."""
    if self.method == PRETRAINED:
      return f'{self.size}_{self.heads}'
    return f'{self.size}_{self.heads}_{self.method}'

  @property
  def name(self) -> str:
    """Name of its folders: those of another alpha are others."""
    if self.method in (PRETRAINED, SCRATCH):
      return self.origin
    return f'{self.origin}_alpha{self.alpha:g}'

  @property
  def label(self) -> str:
    """What the paper calls it: MHA-XXL, GQA-8-XXL, MQA-XXL."""
    size = self.size.upper() if self.size.startswith('x') else self.size.capitalize()
    return f'{heads_label(self.num_kv_heads, self.is_mha)}-{size}'

  @property
  def conversion_name(self) -> str:
    """Name of the converted checkpoint: seeds share it where nothing is drawn."""
    words = [self.method]
    words += [self.statistics] if self.statistics != 'none' else []
    words += [self.grouping] if self.grouping != 'contiguous' else []
    words.append(str(self.num_kv_heads))
    words += [f'seed{self.seed}'] if self.is_seeded else []
    return '_'.join(words)

  @property
  def run_name(self) -> str:
    """Name of the uptraining run, which tells seeds apart."""
    name = self.conversion_name
    return name if self.is_seeded else f'{name}_seed{self.seed}'

  @property
  def method_suffix(self) -> str:
    """'_svd' and so on; nothing for MHA and for mean, the paper's own."""
    return '' if self.method in (PRETRAINED, 'mean') else f'_{self.method}'

  @property
  def title(self) -> str:
    """What a reader calls its method."""
    return title((self.method, self.statistics, self.grouping))


def mha(size: str, alpha: float = 0.0, seed: int | None = None) -> Model:
  """Returns the model of a size that all others are converted from."""
  return Model(size, sizes.SIZES[size]['num_heads'], alpha=alpha, seed=seed)


def converted(
  size: str, num_kv_heads: int, method: Method, alpha: float, seed: int | None = None
) -> Model:
  """Returns a model that is converted by a method, and uptrained."""
  name, statistics, grouping = method
  return Model(size, num_kv_heads, name, alpha, statistics, grouping, seed)


def title(method: Method) -> str:
  """Returns what a reader calls a method, e.g. 'svd (calibrated)'."""
  name, statistics, grouping = method
  if name == PRETRAINED:
    return 'MHA'
  details = [statistics] if name == 'svd' else []
  details += [grouping] if grouping != 'contiguous' else []
  return f'{name} ({", ".join(details)})' if details else name


def heads_label(num_kv_heads: int, is_mha: bool = False) -> str:
  """Returns 'MHA', 'MQA' or 'GQA-8'."""
  if is_mha:
    return 'MHA'
  return 'MQA' if num_kv_heads == 1 else f'GQA-{num_kv_heads}'
