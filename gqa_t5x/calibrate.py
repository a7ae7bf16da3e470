"""Collects what `gqa_t5x.convert` needs to know of the data: calibration statistics.

Runs a few hundred sequences of a seqio task through a model and stores the second
moments of the inputs of its attention modules, one file a checkpoint, good for every
number of key/value heads:

  python -m gqa_t5x.calibrate --gin_file=gin/calibrate.gin \\
    --tfds_data_dir=gs://my-bucket/tfds \\
    --gin.CHECKPOINT_PATH=\\"gs://my-bucket/xxl/checkpoint_1000000\\" \\
    --gin.OUTPUT=\\"gs://my-bucket/xxl/checkpoint_1000000.statistics.npz\\"

That is T5.1.1-XXL on C4; others by --gin.MODEL_SIZE=\\"base\\" and
--gin.MODEL_PARTITIONS=1, other data by --gin.MIXTURE_OR_TASK_NAME. On a laptop, after
`make uptrain`, all is set but the checkpoint and the output:

  python -m gqa_t5x.calibrate --gin_file=gin/local/calibrate.gin \\
    --gin.CHECKPOINT_PATH=\\"runs/local/mha/checkpoint_1000\\" \\
    --gin.OUTPUT=\\"runs/local/mha/checkpoint_1000.statistics.npz\\"

Of a checkpoint that is converted, ORIGINAL_PATH names the one that it was made from:
then OUTPUT gets the sums by which gqa_t5x.convert --refit_outputs moves its outputs
closer to the original's on these sequences. NUM_KV_HEADS (and KV_HEAD_DIM) are its own:

  python -m gqa_t5x.calibrate --gin_file=gin/calibrate.gin --gin.NUM_KV_HEADS=8 \\
    --gin.CHECKPOINT_PATH=\\"gs://my-bucket/xxl_gqa8/checkpoint_1000000\\" \\
    --gin.ORIGINAL_PATH=\\"gs://my-bucket/xxl/checkpoint_1000000\\" \\
    --gin.OUTPUT=\\"gs://my-bucket/xxl_gqa8/checkpoint_1000000.sums.npz\\"

Macros of the gin files: NUM_SEQUENCES (rows of TASK_FEATURE_LENGTHS tokens, each
packed with as many examples as fit), SPLIT, BATCH_SIZE, and INCLUDE_ENCODER = True for
models whose encoder is to be converted, too. Text needs quotes of its own, as above.
The model is sharded as in training; nothing is left behind when a run fails, and
--verbosity=1 says where an error comes from.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
from absl import flags
from etils import epath
from tqdm import tqdm

import gin
import gqa_t5x
from gqa_t5x import files, quiet
from gqa_t5x.checkpoints import folders, tree
from gqa_t5x.command_line import Command
from gqa_t5x.conversion import (
  input_statistics,
  input_sums,
  module_arrays,
  output_refit,
  output_sums,
)
from gqa_t5x.errors import BadInput
from gqa_t5x.training import gin_command


def calibrate(
  *,
  model: Any,
  dataset_cfg: Any,
  restore_checkpoint_cfg: Any,
  partitioner: Any,
  output: str,
  num_sequences: int,
  include_encoder: bool,
  original: str | None = None,
) -> None:
  """Collects the statistics of one checkpoint and writes their file.

  Args:
    model, dataset_cfg, restore_checkpoint_cfg, partitioner, num_sequences: as of
      `calibration.map_batches`.
    output: the file to write.
    include_encoder: whether the encoder's self-attention is recorded, too.
    original: the checkpoint that this one was converted from; not statistics, but what
      refits its outputs is then collected.

  Raises:
    BadInput: bad input; nothing is left behind.
  """
  from gqa_t5x.training import calibration

  target = epath.Path(output)
  if target.exists():
    raise BadInput(f'{target} exists already; choose another OUTPUT')
  files.check_outputs(output, make_folders=True)
  if num_sequences < 1:
    raise BadInput(f'NUM_SEQUENCES={num_sequences} must be at least 1')
  if original is not None and include_encoder:
    raise BadInput(
      'INCLUDE_ENCODER is for statistics: with ORIGINAL_PATH all modules are taken that'
      ' have other heads; leave it out'
    )
  source = original and calibration.original_of(model, original)
  step, batches = calibration.map_batches(
    _function(model.module, source and source[0].module, include_encoder),
    model=model,
    dataset_cfg=dataset_cfg,
    restore_checkpoint_cfg=restore_checkpoint_cfg,
    partitioner=partitioner,
    num_sequences=num_sequences,
    original=source,
  )
  totals, rows = _add_up(batches, num_sequences)
  if not rows:
    raise BadInput(
      f'{dataset_cfg.mixture_or_task_name} has no data in split {dataset_cfg.split}'
    )
  if jax.process_index() == 0:
    path = restore_checkpoint_cfg.path
    info = {'checkpoint': path, 'step': step, **_describe(dataset_cfg, totals, rows)}
    what = _write(target, totals, info, refit=original is not None)
    if rows < num_sequences:
      print(f'NUM_SEQUENCES={num_sequences}, but the data has {rows}: all were used')
    print(f'{what} are in {target}')


def _function(module: Any, original: Any, include_encoder: bool) -> Any:
  """What is done with each batch; `original` is None where statistics are collected."""
  if original is None:
    return lambda values, batch: input_sums.sum_inputs(
      module, values, batch, include_encoder
    )
  return lambda values, originals, batch: output_sums.sum_outputs(
    original, originals, module.config, values, batch
  )


def _add_up(batches: Iterable, num_sequences: int) -> tuple[dict[str, np.ndarray], int]:
  """The totals of all batches, on the first host alone, and their rows."""
  totals, rows = {}, 0
  first_host = jax.process_index() == 0
  with tqdm(
    total=num_sequences, unit='sequence', desc='Calibrating', disable=not first_host
  ) as progress:
    for size, sums in batches:
      if first_host:
        input_sums.add_sums(totals, sums)
      rows += size
      progress.update(size)
  return totals, rows


def _write(target: epath.Path, totals: Any, info: dict[str, Any], refit: bool) -> str:
  """Writes statistics, or output sums; returns what they are, in words."""
  params = tree.parameters(folders.open_checkpoint(epath.Path(info['checkpoint'])))
  make = input_sums.means if refit else input_sums.mean_statistics
  write = output_refit.write_sums if refit else input_statistics.write_statistics
  modules = make(totals)
  info = {**info, 'kernels': module_arrays.samples(params, modules)}
  write(target, modules, info)
  return f'{"Sums" if refit else "Statistics"} of {len(modules)} attention modules'


def _describe(cfg: Any, totals: Mapping[str, np.ndarray], rows: int) -> dict[str, Any]:
  """What the statistics are from, for their file."""
  return {
    'task': str(cfg.mixture_or_task_name),
    'split': cfg.split,
    'seed': cfg.seed,
    'packed': cfg.pack,
    'num_sequences': rows,
    'num_tokens': {stack: int(totals[stack]) for stack in ('encoder', 'decoder')},
    'versions': {
      'gqa_t5x': gqa_t5x.__version__,
      'jax': jax.__version__,
      'flax': flax.__version__,
    },
  }


def _act(args: flags.FlagValues) -> None:
  if not args.gin_file:
    raise BadInput('--gin_file is missing; see --help for an example')
  quiet.import_tensorflow()
  quiet.find_devices()
  import seqio

  if args.tfds_data_dir:
    seqio.set_tfds_data_dir_override(args.tfds_data_dir)
  gin_command.parse(args.gin_file, args.gin_bindings, args.gin_search_paths)
  gin.get_configurable(calibrate)()


def main(argv: Sequence[str]) -> int:
  """The command; returns 0, 1 for bad input, 130 or 143 when stopped by a signal."""
  command = Command('gqa_t5x.calibrate', __doc__)
  gin_command.gin_flags(command)
  command.text(
    'tfds_data_dir', None, "Folder of TensorFlow Datasets; overrides every task's own."
  )
  # gin, seqio and T5X say of bad input by ValueErrors of their own.
  return command.run(argv, _act, expected=(ValueError,))


if __name__ == '__main__':
  sys.exit(main(sys.argv))
