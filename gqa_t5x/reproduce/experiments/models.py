"""The models of the experiments: what each is, and where it comes from."""

import dataclasses

PRETRAINED = 'none'  # no conversion: MHA as pre-trained
SCRATCH = 'scratch'  # pre-trained with few heads from the first step


@dataclasses.dataclass(frozen=True)
class Model:
  """One model, before it is fine-tuned.

  Attributes:
    size: a key of sizes.SIZES.
    num_kv_heads: K; None for all heads (MHA).
    method: of gqa_t5x.convert, PRETRAINED or SCRATCH.
    alpha: uptraining steps by pre-training steps.
  """

  size: str
  num_kv_heads: int | None = None
  method: str = PRETRAINED
  alpha: float = 0.0

  @property
  def heads(self) -> str:
    """'mha', 'mqa' or 'gqa8': in names of folders."""
    if self.num_kv_heads is None:
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
    heads = self.heads.upper()
    heads = f'GQA-{self.num_kv_heads}' if heads.startswith('GQA') else heads
    return f'{heads}-{size}'
