"""Reads the losses that T5X left in TensorBoard's event files."""

import pathlib

from gqa_t5x import quiet
from gqa_t5x.errors import BadInput
from gqa_t5x.training import loss_watch

SPIKES, DIVERGENCES = loss_watch.SCALARS.values()


def _scalars(folder: pathlib.Path) -> dict[str, dict[int, float]]:
  """Tag -> step -> value; a later file counts before an earlier one.

  Unlike TensorBoard's own reader, which stops at the damage and says nothing, this
  raises BadInput if a file is damaged or ends within a record, or there is none.
  """
  quiet.import_tensorflow()
  import tensorflow as tf
  from google.protobuf.message import DecodeError
  from tensorboard.compat.proto import event_pb2

  files = sorted(folder.glob('events.out.tfevents.*'))
  if not files:
    raise BadInput(f'{folder} has no event file; delete its run and run again.')
  result: dict[str, dict[int, float]] = {}
  for file in files:
    try:
      for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
        event = event_pb2.Event.FromString(record)
        for value in event.summary.value:
          is_float = value.tensor.dtype == tf.float32.as_datatype_enum
          if value.HasField('tensor') and is_float:
            number = float(tf.make_ndarray(value.tensor))
            result.setdefault(value.tag, {})[event.step] = number
    except (tf.errors.OpError, DecodeError, ValueError) as error:
      raise BadInput(
        f'{file} is damaged or incomplete ({type(error).__name__}); delete its run and'
        ' run again.'
      ) from error
  return result


def validation_losses(
  model_dir: pathlib.Path, task: str, steps: list[int]
) -> dict[int, float]:
  """Reads a run's validation losses.

  Args:
    model_dir: of the run.
    task: name of the seqio task.
    steps: those that were evaluated.

  Returns:
    Step -> cross-entropy, nats per target token; without T5X's z-loss.

  Raises:
    BadInput: a file is damaged, or a step is missing.
  """
  folder = model_dir / 'training_eval' / task
  found = _scalars(folder)
  losses = found.get('cross_ent_loss_per_all_target_tokens', {})
  real = found.get('non_padding_fraction/loss_weights', {})
  missing = [str(s) for s in steps if s not in losses or not real.get(s)]
  if missing:
    raise BadInput(
      f'{folder} has no validation loss of step {", ".join(missing)}; delete'
      f' {model_dir} and run again.'
    )
  return {step: losses[step] / real[step] for step in steps}


def stability(model_dir: pathlib.Path) -> dict[str, float]:
  """Returns how many spikes and divergences a run's trainer has found in its loss.

  Raises:
    BadInput: its event files are missing or damaged.
  """
  found = _scalars(model_dir / 'train')
  return {kind: max(found.get(kind, {0: 0}).values()) for kind in (SPIKES, DIVERGENCES)}
