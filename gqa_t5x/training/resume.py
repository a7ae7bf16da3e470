"""What a training run does before T5X opens its checkpoints.

It locks the folder, sets checkpoints aside that cannot be read, so that T5X takes the
one before, and goes on with the data where it was. The gin files give `get_dataset` to
`t5x.train`, which calls it first.
"""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import clu.data
import jax
import numpy as np
import seqio
import tensorflow as tf
from absl import flags, logging
from etils import epath
from jax.experimental import multihost_utils
from t5x import utils

import gin
from gqa_t5x import files
from gqa_t5x.checkpoints import config, folders, tokenizer_files, tree
from gqa_t5x.data import vocabulary
from gqa_t5x.errors import BadInput
from gqa_t5x.training import restore, run_lock

# What the contents of a folder were made with; {} is of one job of an inference.
SETTINGS = 'gqa_t5x_settings{}.json'
_SHARD = re.compile(r'-\d{5,}-of-\d{5,}')  # As T5X names the results of a job.


def get_dataset(
  cfg: utils.DatasetConfig,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
  *,
  model: Any,
  model_dir: str,
  save_dataset: bool,
) -> Any:
  """Prepares `model_dir`, and returns the training data.

  Args are those of T5X's `get_dataset`, and:
    model: that is trained.
    model_dir: the run's folder.
    save_dataset: whether checkpoints keep the position in the data.

  Returns:
    Batches: a `tf.data.Dataset`, or an iterator whose position is saved.

  Raises:
    BadInput: the folder is in use, cannot be written, or none of its checkpoints can
      be read or fits the model; or the data is less than a batch.
  """
  folder = epath.Path(model_dir)
  claim(folder)
  latest = latest_readable(folder)
  if latest is not None:
    restore.check_fits(latest, model)
  else:
    _check_batch(cfg, feature_converter_cls)
  settings = _data_settings(cfg)
  if not jax.process_index():
    if save_dataset and latest is not None and _settings(folder).exists():
      _check_data(folder, settings)
    config.write(folder, restore.config_of(model))
    if tokenizer_files.find(folder) is None:
      vocabulary.write_tokenizer(model.output_vocabulary, folder)
  dataset = utils.get_dataset(cfg, shard_id, num_shards, feature_converter_cls)
  return Batches(dataset, folder, settings) if save_dataset else dataset


def _check_batch(
  cfg: utils.DatasetConfig, feature_converter_cls: Callable[..., Any]
) -> None:
  """Raises BadInput if all of the data is less than a batch."""
  once = dataclasses.replace(cfg, shuffle=False)
  batches = utils.get_dataset(once, 0, 1, feature_converter_cls, 1)
  if not any(True for _ in batches.take(1)):
    raise BadInput(
      f'{cfg.mixture_or_task_name}: the split {cfg.split} gives fewer rows of'
      f' {dict(cfg.task_feature_lengths)} tokens than BATCH_SIZE={cfg.batch_size}, so'
      ' that a batch would hold a row twice. Give more data, or a smaller batch.'
    )


def _data_settings(cfg: utils.DatasetConfig) -> dict[str, str]:
  """What a position in the data depends on."""
  return {
    'BATCH_SIZE': str(cfg.batch_size),
    'MIXTURE_OR_TASK_NAME': str(cfg.mixture_or_task_name),
    'TASK_FEATURE_LENGTHS': str(dict(cfg.task_feature_lengths)),
    'hosts': str(jax.process_count()),
  }


def _settings(folder: epath.Path, shard: str = '') -> epath.Path:
  return folder / SETTINGS.format(shard)


def _check_data(folder: epath.Path, settings: Mapping[str, str]) -> None:
  """Raises BadInput if the saved positions in the data are of other settings."""
  try:
    _check_settings(_settings(folder), settings)
  except BadInput as error:
    raise BadInput(
      f'{error} Or --gin.SAVE_DATASET=False: the data then begins anew.'
    ) from error


def claim(
  folder: epath.Path, macro: str = 'MODEL_DIR', name: str = run_lock.NAME
) -> None:
  """Makes a run's folder, and keeps other runs out of it until this process ends.

  Args:
    folder: local or gs://.
    macro: what the user calls it.
    name: of the file that locks it.

  Raises:
    BadInput: it is in use, or cannot be written.
  """
  if jax.process_index():
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    run_lock.hold(folder, name)
  except OSError as error:
    raise BadInput(
      f'{macro}={folder} cannot be written ({error.strerror or error}); give a folder'
      ' that can.'
    ) from error


def inference_folder(path: str) -> str:
  """Makes the folder of a run of inference, and keeps other runs out of it.

  A run goes on with the parts that another one left, so that both must be the same:
  gin's configuration, all of it, is kept in the folder. Jobs that share an inference
  (`shard_id` of `num_shards`) may share the folder, each with a lock of its own.

  Args:
    path: of the folder, local or gs://.

  Returns:
    The absolute path.

  Raises:
    BadInput: the folder is in use, cannot be written, or has the predictions of other
      settings; the message names those.
  """
  folder = epath.Path(files.absolute(path))
  claim(folder, 'INFER_OUTPUT_DIR', run_lock.NAME + shard())
  if not jax.process_index():
    _check_inference(folder)
  return str(folder)


def shard() -> str:
  """Names the share of the data that this job of an inference has: -00000-of-00001.

  It is asked of T5X's flag --shard_id, if there is one, and of gin, as T5X does.

  Raises:
    BadInput: there is no such share.
  """
  shard_id, num_shards = (
    value.scoped_configurable_fn()
    if hasattr(value, 'scoped_configurable_fn')
    else value
    for value in map(gin.query_parameter, ('infer.shard_id', 'infer.num_shards'))
  )
  given = getattr(flags.FLAGS, 'shard_id', None)
  shard_id = shard_id if given is None else given
  if not 0 <= shard_id < num_shards:
    raise BadInput(
      f'shard_id={shard_id} must be from 0 to {num_shards - 1}, as num_shards is'
      f' {num_shards}.'
    )
  return f'-{shard_id:05}-of-{num_shards:05}'


def _check_inference(folder: epath.Path) -> None:
  """Keeps gin's configuration in a folder, and holds runs to it, but for `shard_id`.

  Raises:
    BadInput: there are results of another one.
  """
  lines = gin.config_str(max_line_length=10**6).splitlines()
  settings = dict(line.split(' = ', 1) for line in lines if ' = ' in line)
  for name in ('INFER_OUTPUT_DIR', 'infer_script.infer.shard_id'):
    settings.pop(name, None)
  names = [path.name for path in folder.iterdir()]
  results = [name for name in names if name.startswith('tmp-') or '.jsonl' in name]
  for other in sorted(set(_SHARD.findall(' '.join(results)))):
    _check_settings(_settings(folder, other), settings)
  files.write_json(_settings(folder, shard()), settings)


def _check_settings(file: epath.Path, now: Mapping[str, str]) -> None:
  """Raises BadInput if a folder's file has no settings, or others; name -> value."""
  folder = file.parent
  if not file.exists():
    raise BadInput(f'{folder} has results of unknown settings; choose another folder.')
  try:
    before = dict(json.loads(file.read_bytes()))
  except (ValueError, TypeError) as error:
    raise BadInput(f'{file} is truncated or damaged: {error}') from error
  changes = [
    f'{name} was {before.get(name, "not set")}, is {now.get(name, "not set")}'
    for name in sorted(before.keys() | now.keys())
    if before.get(name) != now.get(name)
  ]
  if changes:
    raise BadInput(
      f'{folder} has results of other settings: {"; ".join(changes[:5])}. Give the same'
      ' settings to go on, or another folder.'
    )


def latest_readable(folder: epath.Path) -> epath.Path | None:
  """Returns the latest checkpoint of a folder that can be read, or None without any.

  Those after it are renamed. Each host reads its share of the tensors.

  Raises:
    BadInput: there are checkpoints, and none can be read.
  """
  problems = []
  for path in reversed(folders.list_checkpoints(folder)):
    problem = _damage(path)
    if problem is None:
      if problems:
        _set_aside([bad for bad, _ in problems], path)
      return path
    problems.append((path, problem))
  if problems:
    raise BadInput(
      f'No checkpoint in {folder} can be read: '
      + '; '.join(f'{path.name}: {problem}' for path, problem in problems)
      + '. Copy them anew, or remove them to start from the beginning.'
    )
  return None


def _damage(path: epath.Path) -> str | None:
  """Returns what is wrong with a checkpoint, or None; reads all of it."""
  problem = ''
  try:
    tensors = folders.open_checkpoint(path)
    for i, name in enumerate(sorted(tensors)):
      if i % jax.process_count() == jax.process_index():
        array = tensors[name].read()
        if name.startswith(tree.TARGET) and not np.isfinite(array).all():
          raise BadInput(f'{name} has values that are not finite')
    _read_position(path)
  except (BadInput, OSError) as error:
    problem = ' '.join(str(error).split())
  bad = multihost_utils.process_allgather(np.array(bool(problem)))
  return (problem or 'another host cannot read it') if np.any(bad) else None


def _read_position(path: epath.Path) -> None:
  """Reads where this host's data was, if saved; raises BadInput if it is damaged."""
  folder, count = path / 'dataset', jax.process_count()
  if count > 1:
    folder /= f'process_{jax.process_index()}-of-{count}'
  for file in folder.glob('*.index'):
    prefix = os.fspath(file).removesuffix('.index')
    try:
      types = tf.train.load_checkpoint(prefix).get_variable_to_dtype_map()
      tf.raw_ops.RestoreV2(
        prefix=prefix,
        tensor_names=[*types],
        shape_and_slices=[''] * len(types),
        dtypes=[*types.values()],
      )
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
      raise BadInput(f'{prefix} is damaged: {error}') from error


def _set_aside(damaged: list[epath.Path], good: epath.Path) -> None:
  for path in damaged:
    to = path.with_name(f'damaged_{path.name}')
    while to.exists():
      to = to.with_name(f'{to.name}_')
    logging.warning(
      'Checkpoint %s cannot be read: it is now %s, and training goes on from %s.',
      path, to.name, good.name,
    )  # fmt: skip
    if not jax.process_index():
      path.rename(to)
  multihost_utils.sync_global_devices('damaged checkpoints are set aside')


class Batches(clu.data.TfDatasetIterator):
  """Training data whose position a checkpoint of its own run keeps.

  It differs from clu's iterator in two things. A position is read from checkpoints in
  the run's `folder` alone: a converted checkpoint has none, and that of another run is
  of other data. And a run that begins saves the beginning first: by then, T5X has drawn
  a batch ahead, but trained on none. With the first position that it saves, it keeps
  `settings` of the data in the folder.
  """

  def __init__(
    self,
    dataset: Any,
    folder: epath.Path,
    settings: Mapping[str, str] | None = None,
  ):
    super().__init__(dataset, checkpoint=True)
    self._folder, self._settings = folder, settings
    self._beginning = tempfile.TemporaryDirectory()
    super().save(epath.Path(self._beginning.name) / 'position')

  def save(self, filename: epath.Path) -> None:
    """Saves the position; see clu's method."""
    if self._settings and not jax.process_index():
      files.write_json(_settings(self._folder), self._settings)
    self._settings = None
    if self._beginning is None:
      super().save(filename)
      return
    for part in ('.index', '.data-00000-of-00001'):  # tf.train.Checkpoint's files
      start = epath.Path(self._beginning.name) / f'position{part}'
      start.copy(epath.Path(f'{os.fspath(filename)}{part}'), overwrite=True)
    self._beginning = None

  def restore(self, filename: epath.Path) -> None:
    """Goes to the position of a checkpoint, if it is of this run; see clu's method.

    Raises:
      BadInput: this run's checkpoint has no position.
    """
    if not epath.Path(filename).is_relative_to(self._folder):
      logging.info('%s is of another run: the data begins anew.', filename)
      return
    self._beginning = None
    if not epath.Path(f'{os.fspath(filename)}.index').exists():
      raise BadInput(
        f'{filename} is missing: the checkpoint does not know how far the data was.'
        ' Give --gin.SAVE_DATASET=False to go on with the data from its beginning.'
      )
    super().restore(filename)
