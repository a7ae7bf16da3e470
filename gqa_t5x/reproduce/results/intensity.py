"""Arithmetic intensity of decoding, by Shazeer's formulas: why K/V heads matter."""

from etils import epath

from gqa_t5x import files
from gqa_t5x.analysis.costs import formulas
from gqa_t5x.model import sizes
from gqa_t5x.reproduce.experiments.targets import intensity_file
from gqa_t5x.reproduce.results.rows import Row

SIZE = 'xxl'
HEADS = (64, 8, 1)  # MHA, GQA-8, MQA
BATCHES = (1, 8, 32, 128, 512)
LENGTHS = (128, 512, 2048, 8192)


def write(output_dir: str) -> None:
  """Writes the rows into the folder of all results."""
  files.write_json(intensity_file(epath.Path(output_dir)), rows())


def rows() -> list[Row]:
  """Returns rows with `intensity`: multiply-adds per number that a decode step reads.

  Source: the inverse of the ratio in Shazeer 2019, sections 2.4 and 3.1.
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
