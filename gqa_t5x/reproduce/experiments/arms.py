"""The models that the conversion study compares, and their names."""

import dataclasses

# Method, statistics, grouping. One group holds all heads: nothing to group at K = 1.
METHODS = (
  ('mean', 'none', 'contiguous'),
  ('first', 'none', 'contiguous'),
  ('random', 'none', 'contiguous'),
  ('procrustes', 'calibrated', 'contiguous'),
  ('procrustes_rms', 'calibrated', 'contiguous'),
  ('refit', 'calibrated', 'contiguous'),
  ('svd', 'weights', 'contiguous'),
  ('svd', 'calibrated', 'contiguous'),
  ('svd', 'calibrated', 'similarity'),
)
# The paper's three, and svd.
MAIN_METHODS = tuple(
  (method, statistics, grouping)
  for method, statistics, grouping in METHODS
  if method in ('mean', 'first', 'random', 'svd') and grouping == 'contiguous'
)
# The paper's three, and the best.
FOUR_METHODS = (*METHODS[:3], ('svd', 'calibrated', 'contiguous'))
SEEDED = ('random',)


@dataclasses.dataclass(frozen=True)
class Arm:
  """One model of the study.

  Attributes:
    method: of gqa_t5x.convert, or 'none' for MHA.
    statistics: 'none', 'weights' or 'calibrated': what the method knows of the inputs.
    grouping: 'contiguous' or 'similarity'.
    num_kv_heads: K.
    seed: of the data's order in uptraining, and of the method random.
  """

  method: str
  statistics: str
  grouping: str
  num_kv_heads: int
  seed: int

  @property
  def conversion(self) -> str:
    """Name of the converted checkpoint: seeds share it where nothing is drawn."""
    words = [self.method]
    words += [self.statistics] if self.statistics != 'none' else []
    words += [self.grouping] if self.grouping != 'contiguous' else []
    words.append(str(self.num_kv_heads))
    words += [f'seed{self.seed}'] if self.method in SEEDED else []
    return '_'.join(words)

  @property
  def name(self) -> str:
    """Name of the uptraining run."""
    base = self.conversion
    return base if self.method in SEEDED else f'{base}_seed{self.seed}'

  @property
  def title(self) -> str:
    """What a reader calls it."""
    return title(self.method, self.statistics, self.grouping)


def title(method: str, statistics: str, grouping: str) -> str:
  """What a reader calls a method.

  Args:
    method: of gqa_t5x.convert, or 'none' for MHA.
    statistics: 'none', 'weights' or 'calibrated'.
    grouping: 'contiguous' or 'similarity'.
  """
  if method == 'none':
    return 'MHA'
  details = [statistics] if method == 'svd' else []
  details += [grouping] if grouping != 'contiguous' else []
  return f'{method} ({", ".join(details)})' if details else method
