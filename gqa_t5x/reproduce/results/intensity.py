"""Arithmetic intensity of decoding, by Shazeer's formulas: why K/V heads matter."""

import json
import os
import pathlib
from typing import Any

from gqa_t5x.analysis.costs import formulas
from gqa_t5x.model import sizes

SIZE = 'xxl'
HEADS = (64, 8, 1)  # MHA, GQA-8, MQA
BATCHES = (1, 8, 32, 128, 512)
LENGTHS = (128, 512, 2048, 8192)
FILE = 'intensity.json'  # below the folder of all results


def rows() -> list[dict[str, Any]]:
  """Computes operations per memory access of one decode step.

  Returns:
    One row for each number of heads, batch size and length, with `intensity`: multiply-
    adds per number read, the inverse of Shazeer's ratio.

  Source: Shazeer 2019, sections 2.4 and 3.1.
  """
  dims = sizes.SIZES[SIZE]
  d, h = dims['emb_dim'], dims['num_heads']
  return [
    {
      'kind': 'intensity',
      'source': 'analytic',
      'command': 'python -m gqa_t5x.reproduce run intensity --scale=local',
      'size': SIZE,
      'num_kv_heads': heads,
      'batch_size': batch,
      'input_length': length,
      'intensity': 1 / formulas.shazeer_decoding_ratio(batch, length, d, h, heads),
    }
    for heads in HEADS
    for batch in BATCHES
    for length in LENGTHS
  ]


def write(output_dir: str) -> int:
  """Writes the rows; returns the exit code.

  Args:
    output_dir: folder of all results.
  """
  path = pathlib.Path(output_dir, FILE)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(rows(), indent=1))
  os.replace(temporary, path)
  return 0
