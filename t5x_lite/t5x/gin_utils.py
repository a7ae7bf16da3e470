"""The command line of train, eval and infer: flags, gin files, gin bindings."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import seqio
import tensorflow as tf
from absl import app, flags, logging

import gin
from gqa_t5x import quiet
from gqa_t5x.training import gin_command


def parse_gin_flags(
  gin_search_paths: Sequence[str], gin_files: Sequence[str], gin_bindings: Sequence[str]
) -> None:
  """Parses gin files, then bindings (`NAME = VALUE`), and locks the configuration."""
  for path in gin_search_paths:
    gin.add_config_file_search_path(path)
  gin_command.check_bindings(gin_bindings)
  gin.parse_config_files_and_bindings(gin_files, gin_bindings)
  logging.info('Gin configuration:\n%s', gin.config_str())


def rewrite_gin_args(args: Sequence[str]) -> Sequence[str]:
  """Turns each `--gin.NAME=VALUE`, where `=` must not be missing, into a binding."""

  def rewrite(arg: str) -> str:
    if not arg.startswith('--gin.'):
      return arg
    name, equals, value = arg.removeprefix('--gin.').partition('=')
    if not equals:
      raise ValueError(f'{arg} has no value; write --gin.{name}=VALUE')
    return f'--gin_bindings={name} = {value}'

  return [rewrite(arg) for arg in args]


@gin.register
def summarize_gin_config(model_dir: str, summary_writer: Any, step: int) -> None:
  """Writes the configuration to `config.gin`, and to TensorBoard by the writer."""
  if jax.process_index() > 0:
    return
  text = gin.config_str()
  tf.io.gfile.makedirs(model_dir)
  with tf.io.gfile.GFile(os.path.join(model_dir, 'config.gin'), 'w') as f:
    f.write(text)
  if summary_writer is not None:
    summary_writer.write_texts(step, {'config': gin.markdown(text)})
    summary_writer.flush()


def _define_flags(several_processes: bool) -> None:
  own = {'module_name': sys.argv[0]}  # so that --help lists them
  text = 'A gin file. May be repeated; later files override earlier ones.'
  flags.DEFINE_multi_string('gin_file', [], text, **own)
  text = (
    'NAME = VALUE, applied after the files. --gin.NAME=VALUE is short for it. Text '
    "needs quotes of its own: --gin.MODEL_DIR=\\'runs/mha\\'."
  )
  flags.DEFINE_multi_string('gin_bindings', [], text, **own)
  text = 'Comma-separated folders that hold the gin files.'
  flags.DEFINE_list('gin_search_paths', ['.'], text, **own)
  text = "Folder of TensorFlow Datasets; overrides every task's own."
  flags.DEFINE_string('tfds_data_dir', None, text, **own)
  text = 'Further folders of tasks that seqio cached offline.'
  flags.DEFINE_list('seqio_additional_cache_dirs', [], text, **own)
  if not several_processes:
    return
  text = (
    'Whether this is one of several processes, which the next flags describe: a host '
    'of GPUs, say. They may be left out where JAX finds out by itself.'
  )
  flags.DEFINE_boolean('multiprocess_gpu', False, text, **own)
  text = 'HOST:PORT of the first process.'
  flags.DEFINE_string('coordinator_address', None, text, **own)
  flags.DEFINE_integer('process_count', None, 'Number of processes.', **own)
  flags.DEFINE_integer('process_index', None, 'Which of them this is.', **own)
  text = 'Seconds to wait for the others.'
  flags.DEFINE_integer('initialization_timeout', 300, text, **own)


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    return app.parse_flags_with_usage(list(rewrite_gin_args(argv)))
  except SystemExit:  # absl exits with 1, also where it was asked for help.
    asked = {word.lstrip('-') for word in argv[1:] if word.startswith('-')}
    if asked & {'help', 'helpshort', 'helpfull', 'helpxml', 'h', '?'}:
      sys.exit(0)
    raise


def run_command(fn: Callable[..., Any], several_processes: bool = False) -> None:
  """Runs `train`, `evaluate` or `infer` from the command line, set up by gin.

  With `several_processes`, it can be one of several that work together.
  """
  _define_flags(several_processes)

  def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments: {argv[1:]}; did you mean --gin.X=Y?')
    values = flags.FLAGS
    if not values.gin_file and not values.gin_bindings:
      raise app.UsageError('give a --gin_file')
    if several_processes and values.multiprocess_gpu:
      jax.distributed.initialize(
        values.coordinator_address,
        values.process_count,
        values.process_index,
        initialization_timeout=values.initialization_timeout,
      )
    quiet.find_devices()
    if values.tfds_data_dir:
      seqio.set_tfds_data_dir_override(values.tfds_data_dir)
    seqio.add_global_cache_dirs(values.seqio_additional_cache_dirs)
    configured = gin.configurable(fn)
    parse_gin_flags(values.gin_search_paths, values.gin_file, values.gin_bindings)
    configured()

  app.run(main, flags_parser=_parse)
