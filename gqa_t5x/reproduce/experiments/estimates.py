"""How many chip-hours a run takes, by the cost model, before it is started.

Of what a chip can do at best, a training run reaches `UTILISATION`: with that number
the formula gives the 600 TPUv3 chip-days that the paper reports for uptraining T5-XXL,
alpha = 0.05 (a test says so). Analytic; no more than a plan needs.

Chips are those of analysis/tpu/chips.py; lengths are tokens of each row of a batch.
"""

from gqa_t5x.analysis.costs import formulas
from gqa_t5x.analysis.tpu.chips import CHIPS
from gqa_t5x.model import network

UTILISATION = 0.3  # of the peak FLOP/s, in training
BANDWIDTH_SHARE = 0.5  # of the peak bytes/s, in decoding
HOUR_S = 3600


def training_hours(
  size: str,
  num_kv_heads: int,
  chip: str,
  batch_size: int,
  input_length: int,
  target_length: int,
  steps: int,
) -> float:
  """Returns the chip-hours of training steps."""
  cfg = network.config(size, num_kv_heads=num_kv_heads)
  flops = formulas.training_step(cfg, batch_size, input_length, target_length).flops
  return steps * flops / (UTILISATION * CHIPS[chip].flops) / HOUR_S


def decoding_hours(
  size: str,
  num_kv_heads: int,
  chip: str,
  batch_size: int,
  input_length: int,
  output_length: int,
  num_samples: int,
) -> float:
  """Returns the chip-hours of decoding samples, every output at its full length."""
  cfg = network.config(size, num_kv_heads=num_kv_heads, dtype='bfloat16')
  encode = formulas.prepare_flops(cfg, batch_size, input_length)
  step = formulas.decode_step(
    cfg, batch_size, input_length, output_length, param_itemsize=2
  )
  seconds = encode / (UTILISATION * CHIPS[chip].flops)
  seconds += output_length * step.bytes / (BANDWIDTH_SHARE * CHIPS[chip].bandwidth)
  return num_samples / batch_size * seconds / HOUR_S
