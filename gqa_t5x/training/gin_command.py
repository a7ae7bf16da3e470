"""Gin on the command line, and what a configuration must be before anything runs.

The checks are a hook of gin's `finalize`, which T5X's commands and those of this
project call once all files and flags are parsed.
"""

import difflib
import re
import sys
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import gqa_t5x
from gin import config_parser
from gqa_t5x.command_line import Command
from gqa_t5x.errors import BadInput

# Macros that count something; None, where a file allows it, is not checked.
_COUNTS = ('BATCH_SIZE', 'NUM_MICROBATCHES', 'TRAIN_STEPS', 'FINETUNE_STEPS')
_COUNTS += ('WARMUP_STEPS', 'EVAL_STEPS', 'NUM_SEQUENCES', 'EVAL_PERIOD')
_COUNTS += ('STATS_PERIOD', 'CHECKPOINT_PERIOD', 'KEEP_PERIOD', 'KEEP_CHECKPOINTS')
_COUNTS += ('MODEL_PARTITIONS', 'PARAMETER_PARTITIONING_DIMS', 'NUM_KV_HEADS')
_COUNTS += ('KV_HEAD_DIM', 'NUM_DECODES', 'VOCAB_SIZE')
# The same, bound without a macro.
_COUNT_PARAMETERS = ('batch_size', 'num_microbatches', 'total_steps', 'keep')
_COUNT_PARAMETERS += ('force_keep_period', 'checkpoint_period', 'num_kv_heads')
_COUNT_PARAMETERS += ('kv_head_dim', 'num_decodes', 'num_shards')
# The macros, whose names have no dot, among a command's words; \0 is between two words.
_GIVEN = re.compile(r'(?:^|\0)--?gin(?:\.|_bindings[=\0])\s*([\w/]+)\s*=')


@gin.config.register_finalize_hook
def check_macros(bindings: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
  """Checks the macros of gin's configuration: (scope, selector) -> parameters.

  Raises:
    BadInput: a macro of the command line has a name that nothing uses, or a count is
      no whole number above 0.
  """
  macros = {
    scope: parameters['value']
    for (scope, selector), parameters in bindings.items()
    if selector == 'gin.macro' and 'value' in parameters
  }
  used = {ref.config_key[0] for ref in gin.config.iterate_references(bindings)}
  for name in _GIVEN.findall('\0'.join(sys.argv)):
    if name in macros and name not in used:
      near = difflib.get_close_matches(name, used, 1)
      hint = f'; do you mean {near[0]}?' if near else ''
      raise BadInput(f'--gin.{name}: no gin file of this run uses {name}{hint}')
  counts = {name: macros[name] for name in _COUNTS if name in macros}
  lengths = macros.get('TASK_FEATURE_LENGTHS')
  if isinstance(lengths, Mapping):
    counts |= {f'TASK_FEATURE_LENGTHS[{k!r}]': n for k, n in lengths.items()}
  counts |= {
    f'{scope}/{selector}.{name}'.strip('/'): value
    for (scope, selector), parameters in bindings.items()
    for name, value in parameters.items()
    if name in _COUNT_PARAMETERS
  }
  for name, value in counts.items():
    is_number = isinstance(value, int | float | str)
    if is_number and (type(value) is not int or value < 1):
      raise BadInput(f'{name}={value!r} must be at least 1, and a whole number.')
  divisor = macros.get('LOSS_NORMALIZING_FACTOR')
  if isinstance(divisor, int | float) and not divisor > 0:
    raise BadInput(f'LOSS_NORMALIZING_FACTOR={divisor!r} must be above 0.')
  _check_microbatches({k: v for k, v in counts.items() if type(v) is int})


# A binding that is no reference to the macro goes before it.
_ROWS = ('train/t5x.utils.DatasetConfig.batch_size', 'BATCH_SIZE')
_PARTS = ('gqa_t5x.training.trainer.Trainer.num_microbatches', 'NUM_MICROBATCHES')


def _check_microbatches(counts: Mapping[str, int]) -> None:
  rows = next((name for name in _ROWS if name in counts), None)
  parts = next((name for name in _PARTS if name in counts), None)
  if rows and parts and counts[rows] % counts[parts]:
    raise BadInput(
      f'{rows}={counts[rows]} is not divisible by {parts}={counts[parts]}; choose a'
      ' divisor.'
    )


def check_bindings(bindings: Sequence[str]) -> None:
  """Raises BadInput for a binding of the command line that gin cannot read."""
  for binding in bindings:
    try:
      [*config_parser.ConfigParser(binding, gin.config.ParserDelegate(True))]
    except (SyntaxError, tokenize.TokenError) as error:
      name, _, value = map(str.strip, binding.partition('='))
      raise BadInput(
        f'--gin.{name}={value}: gin cannot read this value. Text needs quotes of its'
        f' own, such as --gin.{name}=\\"text\\".'
      ) from error


def gin_flags(command: Command) -> None:
  """Defines T5X's three flags of gin, and `--gin.NAME=VALUE`, short for a binding."""
  command.texts(
    'gin_file', [], 'A gin file. May be repeated; later files override earlier ones.'
  )
  command.texts(
    'gin_bindings',
    [],
    'NAME = VALUE, applied after the files; --gin.NAME=VALUE is short for it.',
  )
  command.words(
    'gin_search_paths', ['.'], 'Comma-separated folders that hold the gin files.'
  )
  command.rewrite = _rewrite


def parse(
  files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]
) -> None:
  """Parses what the flags give, and locks the configuration.

  Raises:
    BadInput: gin cannot read a binding.
    ValueError: from gin.
    OSError: a file is not there.
  """
  from t5x import gin_utils

  check_bindings(bindings)
  folders = [*search_paths, gqa_t5x.gin_search_path()]
  gin_utils.parse_gin_flags(folders, files, bindings)


def _rewrite(argv: Sequence[str]) -> list[str]:
  if not any(word.startswith('--gin.') for word in argv):
    return list(argv)  # Such as --help, which need not wait for T5X.
  from t5x import gin_utils

  try:
    return list(gin_utils.rewrite_gin_args(argv))
  except ValueError as error:
    raise BadInput(str(error)) from error
