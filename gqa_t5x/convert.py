"""Turns a multi-head-attention T5.1.1 checkpoint of T5X into a grouped-query one.

  python -m gqa_t5x.convert --input=/models/mha --output=/models/gqa2 --num_kv_heads=2

takes the latest checkpoint of /models/mha; writes, say, /models/gqa2/checkpoint_2000.
T5.1.1-XXL, from the public checkpoint in Google's bucket to 8 key/value heads:

  python -m gqa_t5x.convert --num_kv_heads=8 --method=mean \\
    --input=gs://t5-data/pretrained_models/t5x/t5_1_1_xxl/checkpoint_1000000 \\
    --output=gs://my-bucket/xxl_gqa8

T5X restores the result by itself, optimizer state included:

  python -m t5x.train --gin_file=gin/uptrain_gqa8.gin \\
    --gin.MODEL_DIR=\\"gs://my-bucket/run\\" \\
    --gin.INITIAL_CHECKPOINT_PATH=\\"gs://my-bucket/xxl_gqa8/checkpoint_1000000\\"

Sizes and head counts are read from the checkpoint. Decoder self- and cross-attention
change, the encoder does not (GQA paper, section 2.2). The optimizer state and the step
are converted along; the data pipeline's state is not. A checkpoint of a GQA model can
be converted again, to fewer heads. Nothing is left behind when a run fails.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from etils import epath
from tqdm import tqdm

from gqa_t5x.conversion import checkpoint, writer
from gqa_t5x.conversion.errors import ConversionError
from gqa_t5x.conversion.methods import METHODS, get_method
from gqa_t5x.conversion.params import Plan, plan_conversion


def define_flags() -> flags.FlagValues:
  """The command's flags, apart from absl's global ones: names like --output recur."""
  values = flags.FlagValues()
  define = {'flag_values': values, 'module_name': 'gqa_t5x.convert'}
  flags.DEFINE_string(
    'input',
    None,
    'The checkpoint: a folder checkpoint_<step> of T5X, legacy or Orbax layout, or a'
    ' model_dir, whose latest checkpoint is taken. Local or gs://.',
    **define,
  )
  flags.DEFINE_string(
    'output',
    None,
    "Where to write: a folder, in which checkpoint_<step> is made, or that checkpoint's"
    ' own path. It must not hold a checkpoint yet.',
    **define,
  )
  methods = ', '.join(METHODS)
  flags.DEFINE_integer(
    'num_kv_heads',
    None,
    'Key/value heads of decoder self- and cross-attention: 1 is MQA. It must divide the'
    ' key/value heads that the checkpoint has.',
    **define,
  )
  flags.DEFINE_string(
    'method', 'mean', f'How heads become fewer: one of {methods}.', **define
  )
  flags.DEFINE_integer('seed', 0, 'Seed of the method random.', **define)
  for kind, default in (
    ('self_attention', '--num_kv_heads'),
    ('cross_attention', '--num_kv_heads'),
    ('encoder', 'unchanged'),
  ):
    flags.DEFINE_integer(
      f'{kind}_num_kv_heads',
      None,
      f'Key/value heads of {kind.replace("_", "-")} alone (default: {default}).',
      **define,
    )
  flags.DEFINE_bool(
    'verbose', False, 'Say for each tensor what became of its moments.', **define
  )
  flags.DEFINE_bool('help', False, 'Show this text.', short_name='h', **define)
  return values


def convert(args: flags.FlagValues) -> None:
  """Runs the command.

  Args:
    args: the parsed flags.

  Raises:
    ConversionError: bad input; nothing is left behind.
  """
  _check_given(args)
  get_method(args.method)
  given = _absolute(args.input)
  source = checkpoint.find_checkpoint(given)
  if source != given:
    print(f'Reading {source}')
  tensors = checkpoint.open_checkpoint(source)
  if 'state/step' not in tensors:
    raise ConversionError(f'{source} has no tensor state/step: it is not of T5X')
  step = int(tensors['state/step'].read())
  target = choose_output(source, _absolute(args.output), step)
  plan = plan_conversion(
    tensors,
    num_kv_heads=args.num_kv_heads,
    method=args.method,
    seed=args.seed,
    self_attention_num_kv_heads=args.self_attention_num_kv_heads,
    cross_attention_num_kv_heads=args.cross_attention_num_kv_heads,
    encoder_num_kv_heads=args.encoder_num_kv_heads,
  )
  writer.check_space(target, plan.nbytes)
  progress = tqdm(
    total=plan.nbytes, unit='B', unit_scale=True, desc='Converting', disable=None
  )
  with progress:
    writer.write_checkpoint(target, plan.units, progress.update)
  _report(args, plan, source, target)


def _check_given(args: flags.FlagValues) -> None:
  for name in ('input', 'output'):
    if not args[name].value:
      raise ConversionError(f'--{name} is missing; see --help for an example')
  kinds = ('self_attention_', 'cross_attention_', 'encoder_', '')
  if all(args[f'{kind}num_kv_heads'].value is None for kind in kinds):
    raise ConversionError('--num_kv_heads is missing; see --help for an example')


def _absolute(text: str) -> epath.Path:
  """A path as T5X wants it: absolute and, if local, without symbolic links."""
  path = epath.Path(text)
  return path if '://' in text else epath.Path(os.path.realpath(path.expanduser()))


def choose_output(source: epath.Path, output: epath.Path, step: int) -> epath.Path:
  """Decides which folder to write, and refuses those that would do harm.

  Args:
    source: the checkpoint folder that is read.
    output: as given: a folder, or a path that ends in checkpoint_<step>.
    step: of the source.

  Returns:
    The checkpoint folder to make.

  Raises:
    ConversionError: it holds a checkpoint, is the input or inside of it, or its name
      gives another step.
  """
  named = checkpoint.checkpoint_step(output)
  if source in (output, output / f'checkpoint_{step}'):
    raise ConversionError(
      f'--input and --output are the same checkpoint, {source}; choose another --output'
    )
  if source in output.parents:
    raise ConversionError(
      f'--output={output} is inside the input {source}; choose another --output'
    )
  if named is None:
    present = checkpoint.list_checkpoints(output)
    target = output / f'checkpoint_{step}'
  elif named != step:
    raise ConversionError(
      f'--output names step {named}, but {source} is of step {step};'
      f' use --output={output.parent / f"checkpoint_{step}"}'
    )
  else:
    target, present = output, []
  present += [p for p in (output, target) if (p / checkpoint.MSGPACK).exists()]
  present += [target] if target.exists() and not _is_empty_folder(target) else []
  if present:
    raise ConversionError(
      f'{present[0]} exists already; choose another --output, or delete it'
    )
  return target


def _is_empty_folder(path: epath.Path) -> bool:
  return path.is_dir() and not any(path.iterdir())


def _report(args: Any, plan: Plan, source: epath.Path, target: epath.Path) -> None:
  """Says what was done, and what to give to T5X."""
  if args.verbose:
    for path, note in plan.log.items():
      print(f'moments of {path}: {note}')
  if plan.log:
    treatment = {'sum': 'summed over each group', 'first': 'taken from the first heads'}
    done = treatment.get(METHODS[args.method].moments, 'reset to zero')
    print(f'Adafactor moments of {len(plan.log)} K and V kernels: {done}')
  elif plan.source != plan.target:
    print('The checkpoint has no optimizer state: none was written')
  else:
    print('It has as many key/value heads already: only the layout changed')
  if names := checkpoint.dataset_state(source):
    print(f'Not copied: the state of the data pipeline ({", ".join(names)})')
  before, after = plan.source, plan.target
  cache = [
    f'{before.cache_bytes_per_token(kind):,} -> {after.cache_bytes_per_token(kind):,}'
    for kind in ('self_attention', 'cross_attention')
  ]
  print(
    f'Converted by {args.method}: {before.num_parameters():,} ->'
    f' {after.num_parameters():,} parameters; decode cache in bfloat16 {cache[0]} bytes'
    f' per output token, {cache[1]} bytes per input token'
  )
  print(f"INITIAL_CHECKPOINT_PATH = '{target}'")


class _Terminated(BaseException):
  """SIGTERM, as an exception, so that the temporary folder is removed."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
  def stop(signum, frame):
    raise _Terminated

  previous = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)


def main(argv: Sequence[str]) -> int:
  """The command.

  Args:
    argv: program name and flags.

  Returns:
    Exit code: 0, 1 for bad input, 130 or 143 when stopped by a signal.
  """
  args = define_flags()
  try:
    rest = args(list(argv))[1:]
    if args.help:
      print(__doc__ + '\nFlags:' + args.module_help('gqa_t5x.convert'))
      return 0
    if rest:
      raise ConversionError(f'unexpected argument {rest[0]!r}; see --help')
    with _sigterm_raises():
      convert(args)
    return 0
  except (ConversionError, flags.Error, OSError) as error:
    return _fail(error)
  except (KeyboardInterrupt, _Terminated) as error:
    print('stopped; nothing was written', file=sys.stderr)
    return 143 if isinstance(error, _Terminated) else 130
  except Exception as error:
    # What etils raises for buckets, without an import of TensorFlow to name it.
    if type(error).__module__.startswith(('tensorflow.', 'gcsfs.', 'google.')):
      return _fail(error)
    raise


def _fail(error: Exception) -> int:
  print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
  return 1


if __name__ == '__main__':
  sys.exit(main(sys.argv))
