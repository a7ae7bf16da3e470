"""How many chip-hours a run takes, by the cost model, before it is started.

Of what a chip can do at best, a training run reaches `UTILISATION`: with that number
the formula gives the 600 TPUv3 chip-days that the paper reports for uptraining T5-XXL,
alpha = 0.05 (a test says so). Analytic; no more than a plan needs.

Chips are those of analysis/tpu/chips.py; lengths are tokens of each row of a batch.
"""

from typing import NamedTuple

from gqa_t5x.analysis.costs import formulas
from gqa_t5x.analysis.tpu.chips import CHIPS
from gqa_t5x.model import network

UTILISATION = 0.3  # of the peak FLOP/s, in training
BANDWIDTH_SHARE = 0.5  # of the peak bytes/s, in decoding
HOUR_S = 3600


class Run(NamedTuple):
  """What is trained or decoded, a batch at a time."""

  size: str
  num_kv_heads: int
  chip: str
  batch_size: int
  input_length: int
  output_length: int
  kv_head_dim: int | None = None

  def training_hours(self, steps: int) -> float:
    """Returns the chip-hours of training steps."""
    flops = formulas.training_step(self._config('float32'), *self[3:6]).flops
    return steps * flops / (UTILISATION * CHIPS[self.chip].flops) / HOUR_S

  def decoding_hours(self, num_samples: int) -> float:
    """Returns the chip-hours of decoding samples, every output at its full length."""
    cfg, chip = self._config('bfloat16'), CHIPS[self.chip]
    batch_size, input_length, output_length = self[3:6]
    encode = formulas.prepare_flops(cfg, batch_size, input_length)
    step = formulas.decode_step(cfg, *self[3:6], param_itemsize=2)
    seconds = encode / (UTILISATION * chip.flops)
    seconds += output_length * step.bytes / (BANDWIDTH_SHARE * chip.bandwidth)
    return num_samples / batch_size * seconds / HOUR_S

  def _config(self, dtype: str) -> network.T5Config:
    heads = {'num_kv_heads': self.num_kv_heads, 'kv_head_dim': self.kv_head_dim}
    return network.config(self.size, **heads, dtype=dtype)
