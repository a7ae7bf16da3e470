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

_SEARCH_PATHS = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]


@gin.configurable
def get_gin_config_str(show_provenance: bool = False) -> str:
  """Returns the configuration in force as gin text."""
  return gin.config_str(show_provenance=True) if show_provenance else gin.config_str()


def parse_gin_flags(
  gin_search_paths: Sequence[str],
  gin_files: Sequence[str],
  gin_bindings: Sequence[str],
  skip_unknown: bool | Sequence[str] = False,
  finalize_config: bool = True,
) -> None:
  """Parses gin files, then bindings; later ones win.

  Args:
    gin_search_paths: folders that relative paths of files start at.
    gin_files: paths.
    gin_bindings: `NAME = VALUE` each.
    skip_unknown: whether (or which) unknown names are passed over.
    finalize_config: whether the configuration is checked and locked.
  """
  for path in gin_search_paths:
    gin.add_config_file_search_path(path)
  gin.parse_config_files_and_bindings(
    gin_files, gin_bindings, skip_unknown=skip_unknown, finalize_config=finalize_config
  )
  logging.info('Gin configuration:\n%s', get_gin_config_str())


def rewrite_gin_args(args: Sequence[str]) -> Sequence[str]:
  """Turns each `--gin.NAME=VALUE` into `--gin_bindings=NAME = VALUE`.

  Raises:
    ValueError: if one has no `=`.
  """

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
  text = get_gin_config_str()
  tf.io.gfile.makedirs(model_dir)
  with tf.io.gfile.GFile(os.path.join(model_dir, 'config.gin'), 'w') as f:
    f.write(text)
  if summary_writer is not None:
    summary_writer.write_texts(step, {'config': gin.markdown(text)})
    summary_writer.flush()


def run(main: Callable[[Sequence[str]], Any]) -> None:
  """Runs a main function on the command line, after `rewrite_gin_args`."""
  app.run(
    main, flags_parser=lambda a: app.parse_flags_with_usage(list(rewrite_gin_args(a)))
  )


_FLAGS = {
  'gin_file': 'A gin file. May be repeated; later files override earlier ones.',
  'gin_bindings': 'NAME = VALUE, applied after the files. --gin.NAME=VALUE is short '
  "for it. Text needs quotes of its own: --gin.MODEL_DIR=\\'/tmp/run\\'.",
  'gin_search_paths': 'Comma-separated folders that hold the gin files.',
  'tfds_data_dir': "Folder of TensorFlow Datasets; overrides every task's own.",
  'seqio_additional_cache_dirs': 'Further folders of tasks that seqio cached offline.',
}


def _define_flags() -> None:
  defaults = {'gin_search_paths': ['.'], 'tfds_data_dir': None}
  for name, text in _FLAGS.items():
    define = flags.DEFINE_list
    if name.startswith('gin_') and name != 'gin_search_paths':
      define = flags.DEFINE_multi_string
    elif name == 'tfds_data_dir':
      define = flags.DEFINE_string
    # Counted as the command's own flags, so that --help lists them.
    define(name, defaults.get(name, []), text, module_name=sys.argv[0])


def run_command(fn: Callable[..., Any]) -> None:
  """Runs `train`, `evaluate` or `infer` from the command line, set up by gin."""
  _define_flags()

  def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments: {argv[1:]}; did you mean --gin.X=Y?')
    values = flags.FLAGS
    if not values.gin_file and not values.gin_bindings:
      raise app.UsageError('give a --gin_file')
    tf.config.set_visible_devices([], 'GPU')  # they are JAX's
    if values.tfds_data_dir:
      seqio.set_tfds_data_dir_override(values.tfds_data_dir)
    seqio.add_global_cache_dirs(values.seqio_additional_cache_dirs)
    configured = gin.configurable(fn)
    search = [*values.gin_search_paths, *_SEARCH_PATHS]
    parse_gin_flags(search, values.gin_file or [], values.gin_bindings)
    configured()
    jax.effects_barrier()

  run(main)
