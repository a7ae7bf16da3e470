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

Macros of the gin files: NUM_SEQUENCES (rows of TASK_FEATURE_LENGTHS tokens, each
packed with as many examples as fit), SPLIT, BATCH_SIZE, and INCLUDE_ENCODER = True for
models whose encoder is to be converted, too. Text needs quotes of its own, as above.
The model is sharded as in training; nothing is left behind when a run fails, and
--verbosity=1 says where an error comes from.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf
from absl import app, flags, logging
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from t5x import gin_utils, models, partitioning, utils
from tqdm import tqdm

import gin
import gqa_t5x
from gqa_t5x.checkpoints import folders
from gqa_t5x.conversion import input_statistics
from gqa_t5x.conversion.input_sums import add_sums, input_sums, mean_moments
from gqa_t5x.errors import BadInput

Array = jax.Array
Batch = Mapping[str, np.ndarray]


def calibrate(
  *,
  model: models.BaseTransformerModel,
  dataset_cfg: utils.DatasetConfig,
  restore_checkpoint_cfg: utils.RestoreCheckpointConfig,
  partitioner: partitioning.PjitPartitioner,
  output: str,
  num_sequences: int,
  include_encoder: bool,
) -> None:
  """Collects the statistics of one checkpoint and writes their file.

  Args:
    model: of `gqa_t5x.training.models`.
    dataset_cfg: the data.
    restore_checkpoint_cfg: the checkpoint, mode "specific".
    partitioner: T5X's.
    output: the file to write.
    num_sequences: rows to run, at most.
    include_encoder: whether the encoder's self-attention is recorded, too.

  Raises:
    BadInput: bad input; nothing is left behind.
  """
  target = epath.Path(output)
  if target.exists():
    raise BadInput(f'{target} exists already; choose another OUTPUT')
  if num_sequences < 1:
    raise BadInput(f'NUM_SEQUENCES={num_sequences} must be at least 1')
  utils.verify_matching_vocabs(dataset_cfg, model)
  path, dtype = restore_checkpoint_cfg.path, restore_checkpoint_cfg.dtype
  values, layout, step = restore_params(model, partitioner, path, dtype)
  sum_inputs = partitioner.partition(
    lambda values, batch: input_sums(model.module, values, batch, include_encoder),
    (layout, partitioner.data_partition_spec),
    None,
  )
  sharding = NamedSharding(partitioner.mesh, partitioner.data_partition_spec)
  totals, rows = {}, 0
  first_host = jax.process_index() == 0
  with tqdm(
    total=num_sequences, unit='sequence', desc='Calibrating', disable=not first_host
  ) as progress:
    for size, batch in read_batches(model, dataset_cfg, num_sequences):
      sums = sum_inputs(values, _to_devices(batch, sharding))
      if first_host:
        add_sums(totals, sums)
      rows += size
      progress.update(size)
  if not rows:
    raise BadInput(
      f'{dataset_cfg.mixture_or_task_name} has no data in split {dataset_cfg.split}'
    )
  if first_host:
    info = {'checkpoint': path, 'step': step, **_describe(dataset_cfg, totals, rows)}
    moments = mean_moments(totals)
    input_statistics.write_statistics(target, moments, info)
    if rows < num_sequences:
      print(f'NUM_SEQUENCES={num_sequences}, but the data has {rows}: all were used')
    print(f'Statistics of {len(moments)} attention modules are in {target}')


def _describe(
  cfg: utils.DatasetConfig, totals: Mapping[str, np.ndarray], rows: int
) -> dict[str, Any]:
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


def restore_params(
  model: models.BaseTransformerModel,
  partitioner: partitioning.PjitPartitioner,
  path: str,
  dtype: str | None,
) -> tuple[Any, Any, int]:
  """Reads the parameters of a checkpoint onto the devices, laid out as in training.

  Args:
    model: the model that they fit.
    partitioner: says what is where.
    path: the checkpoint folder, of any layout that `gqa_t5x.convert` reads.
    dtype: of the parameters; None for the checkpoint's.

  Returns:
    (parameters, their PartitionSpecs, the checkpoint's step).
  """
  tokens = {'encoder_input_tokens': (1, 1), 'decoder_input_tokens': (1, 1)}
  initializer = utils.TrainStateInitializer(
    optimizer_def=None,
    init_fn=model.get_initial_variables,
    input_shapes=tokens,
    partitioner=partitioner,
    input_types=dict.fromkeys(tokens, jnp.int32),
  )
  tensors = folders.open_checkpoint(epath.Path(path))

  def put(keys, shape, spec):
    name = jax.tree_util.keystr(keys, simple=True, separator='/')
    value = tensors[f'target/{name}'].read()
    value = value.astype(dtype or value.dtype)
    sharding = NamedSharding(partitioner.mesh, spec or PartitionSpec())
    return jax.make_array_from_callback(shape.shape, sharding, lambda i: value[i])

  layout = initializer.train_state_axes.params
  shapes = initializer.global_train_state_shape.params
  values = jax.tree_util.tree_map_with_path(put, shapes, layout)
  return values, layout, int(tensors['state/step'].read())


def read_batches(
  model: models.BaseTransformerModel, cfg: utils.DatasetConfig, num_sequences: int
) -> Iterator[tuple[int, Batch]]:
  """Yields batches of model features; every host reads all of them.

  Args:
    model: gives the feature converter.
    cfg: the data.
    num_sequences: rows to read, at most.

  Yields:
    (rows, batch); a batch is filled up to its size with rows of padding.
  """
  dataset = seqio.get_dataset(
    cfg.mixture_or_task_name,
    cfg.task_feature_lengths,
    dataset_split=cfg.split,
    shuffle=cfg.shuffle,
    num_epochs=1,
    feature_converter=model.FEATURE_CONVERTER_CLS(pack=cfg.pack),
    use_cached=cfg.use_cached,
    seed=cfg.seed,
  )
  for batch in dataset.take(num_sequences).batch(cfg.batch_size).as_numpy_iterator():
    rows = len(batch['encoder_input_tokens'])
    missing = ((0, cfg.batch_size - rows), (0, 0))
    yield rows, {name: np.pad(array, missing) for name, array in batch.items()}


def _to_devices(batch: Batch, sharding: NamedSharding) -> dict[str, Array]:
  return {
    name: jax.make_array_from_callback(x.shape, sharding, lambda i, x=x: x[i])
    for name, x in batch.items()
  }


def _define_flags() -> None:
  text = 'A gin file. May be repeated; later files override earlier ones.'
  flags.DEFINE_multi_string('gin_file', [], text)
  text = 'NAME = VALUE, applied after the files; --gin.NAME=VALUE is short for it.'
  flags.DEFINE_multi_string('gin_bindings', [], text)
  text = 'Comma-separated folders that hold the gin files.'
  flags.DEFINE_list('gin_search_paths', ['.'], text)
  text = "Folder of TensorFlow Datasets; overrides every task's own."
  flags.DEFINE_string('tfds_data_dir', None, text)


def main(argv: Sequence[str]) -> int:
  """The command.

  Args:
    argv: program name, and what is left of the arguments after the flags.

  Returns:
    Exit code: 0, or 1 for bad input.
  """
  values = flags.FLAGS
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}; see --help')
    if not values.gin_file:
      raise ValueError('--gin_file is missing; see --help for an example')
    tf.config.set_visible_devices([], 'GPU')  # they are JAX's
    if values.tfds_data_dir:
      seqio.set_tfds_data_dir_override(values.tfds_data_dir)
    configured = gin.configurable(calibrate)
    folders = [*values.gin_search_paths, gqa_t5x.gin_search_path()]
    gin_utils.parse_gin_flags(folders, values.gin_file, values.gin_bindings)
    configured()
    return 0
  except (ValueError, OSError) as error:  # BadInput is a ValueError
    logging.debug('Where the error comes from:', exc_info=True)
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 1


if __name__ == '__main__':
  _define_flags()
  app.run(
    main,
    flags_parser=lambda argv: app.parse_flags_with_usage(
      list(gin_utils.rewrite_gin_args(argv))
    ),
  )
