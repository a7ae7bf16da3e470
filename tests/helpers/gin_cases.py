"""What the tests of gin files share: what must be given, and runs without a machine."""

import contextlib
import functools
from unittest import mock

import jax.numpy as jnp
import t5.data.mixtures  # noqa: F401
from t5x import utils

from gqa_t5x import calibrate
from gqa_t5x.checkpoints import config, folders
from gqa_t5x.data import benchmarks
from gqa_t5x.training import models, resume
from helpers import commands

TRAIN = {'MODEL_DIR': 'gs://bucket/out'}
START = {'INITIAL_CHECKPOINT_PATH': 'gs://bucket/checkpoint_1000000'}
STEPS = {'TRAIN_STEPS': 1_100_000}
CHECKPOINT = {'CHECKPOINT_PATH': 'gs://bucket/checkpoint_1000000'}
OUTPUT = {'OUTPUT': 'gs://bucket/out'}
EVAL = CHECKPOINT | {'EVAL_OUTPUT_DIR': 'gs://bucket/out'}
INFER = CHECKPOINT | {'INFER_OUTPUT_DIR': 'gs://bucket/out'}
VOCABULARY = {'VOCABULARY_FILE': 'gs://bucket/wmt.model'}

C4, CNN = 'gin/tasks/c4_span_corruption.gin', 'gin/tasks/cnn_dailymail.gin'
WMT = 'gin/tasks/wmt14_en_de_shazeer.gin'
# Run -> the engine's function, a task, and what must be given.
RUNS = {
  'pretrain': ('train', C4, TRAIN),
  'uptrain': ('train', C4, TRAIN | START | STEPS),
  'finetune': ('train', CNN, TRAIN | START),
  'translate': ('train', WMT, TRAIN | VOCABULARY),
  'eval': ('evaluate', CNN, EVAL),
  'infer': ('infer', CNN, INFER),
  'calibrate': ('calibrate', C4, CHECKPOINT | OUTPUT),
}


def files(model: str, task: str, run: str, *more: str) -> list[str]:
  """Model, task and run, in this order, and what comes after."""
  return [f'gin/models/{model}.gin', task, f'gin/runs/{run}.gin', *more]


def bindings(values) -> list[str]:
  return [f'{name} = {value!r}' for name, value in values.items()]


@contextlib.contextmanager
def parsed(gin_files, given):
  """As `commands.gin_config`, where no checkpoint is there to be checked.

  Args:
    gin_files: as given to `--gin_file`.
    given: macro -> value, as given on the command line.

  Yields:
    The function of `commands.gin_config`, with a list `checked` of (model, path): which
    checkpoints would have been checked against which model.
  """

  @functools.wraps(calibrate.calibrate)
  def record(**kwargs):
    return kwargs

  commands.recorders().setdefault('calibrate', record)
  checked = []
  with contextlib.ExitStack() as stack:
    stack.callback(_register_as_at_import)
    for module, name, stand_in in (
      (folders, 'find_checkpoint', lambda path: path),
      (folders, 'open_checkpoint', lambda path: {}),
      (folders, 'step_is_known', lambda path: True),
      (config, 'read', lambda path: None),
      (resume, 'claim', lambda *folder: None),
      (resume, '_check_inference', lambda folder: None),
      (models, 'check_params', lambda model, _, path: checked.append((model, path))),
    ):
      stack.enter_context(mock.patch.object(module, name, stand_in))
    arguments_of = stack.enter_context(commands.gin_config(gin_files, bindings(given)))
    arguments_of.checked = checked
    yield arguments_of


def _register_as_at_import() -> None:
  """Takes the vocabularies of a gin file from the tasks again."""
  for name in benchmarks.BENCHMARKS:
    benchmarks.task(name)


def state_shapes(name: str, arguments):
  """The state's shapes and layout, computed as T5X computes them."""
  model, data = arguments['model'], arguments.get('dataset_cfg')
  data = data or arguments['train_dataset_cfg']
  encoder, decoder = (
    (data.batch_size, data.task_feature_lengths[feature])
    for feature in ('inputs', 'targets')
  )
  inputs = {
    'encoder_input_tokens': encoder,
    'decoder_input_tokens': decoder,
    'decoder_target_tokens': decoder,
  }
  trains = name == 'train'
  initializer = utils.TrainStateInitializer(
    optimizer_def=model.optimizer_def if trains else None,
    init_fn=model.get_initial_variables,
    input_shapes=inputs,
    # T5X gives types in training only.
    input_types=dict.fromkeys(inputs, jnp.int32) if trains else None,
    partitioner=arguments['partitioner'],
  )
  return initializer.global_train_state_shape, initializer.train_state_axes
