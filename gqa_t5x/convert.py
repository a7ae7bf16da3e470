"""Turns a multi-head-attention T5.1.1 checkpoint into a grouped-query one, for T5X.

  python -m gqa_t5x.convert --input=/models/mha --output=/models/gqa2 --num_kv_heads=2

takes the latest checkpoint of /models/mha; writes, say, /models/gqa2/checkpoint_2000.
Before that, --dry_run shows which tensors change, and the bytes that this saves:

  python -m gqa_t5x.convert --input=/models/mha --num_kv_heads=2 --dry_run

T5.1.1-XXL, from the public checkpoint in Google's bucket to 8 key/value heads:

  python -m gqa_t5x.convert --num_kv_heads=8 --method=mean \\
    --input=gs://t5-data/pretrained_models/t5x/t5_1_1_xxl/checkpoint_1000000 \\
    --output=gs://my-bucket/xxl_gqa8

T5X restores the result by itself, optimizer state included:

  python -m t5x.train --gin_file=gin/uptrain_gqa8.gin \\
    --gin.MODEL_DIR=\\"gs://my-bucket/run\\" \\
    --gin.INITIAL_CHECKPOINT_PATH=\\"gs://my-bucket/xxl_gqa8/checkpoint_1000000\\"

A Hugging Face folder of T5 v1.1 keeps no step: --output names it.

  python -m gqa_t5x.convert --input=/models/t5-v1_1-base --num_kv_heads=4 \\
    --output=/models/base_gqa4/checkpoint_1000000

svd fits the shared heads to the old ones, best to statistics of the model at work
(python -m gqa_t5x.calibrate writes them):

  python -m gqa_t5x.convert --input=/models/mha --output=/models/svd2 \\
    --num_kv_heads=2 --method=svd --statistics=/models/mha.statistics.npz

--compression=none is fastest where the disk is fast and large; gzip is what T5X itself
writes. Years later, --verify compares the result with the checksums in its manifest:

  python -m gqa_t5x.convert --verify=/models/gqa2

Sizes and head counts are read from the checkpoint. Decoder self- and cross-attention
change, the encoder does not (GQA paper, section 2.2). The optimizer state and the step
are converted along; the data pipeline's state is not. A checkpoint of a GQA model can
be converted again, to fewer heads. Nothing is left behind when a run fails; after a
power cut, run the same command again.
"""

import collections
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from etils import epath
from tqdm import tqdm

from gqa_t5x.checkpoints import folders, t5x_layouts, writer
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.conversion import manifest, preview
from gqa_t5x.conversion.methods import METHODS, get_method
from gqa_t5x.conversion.plan import Plan, plan_conversion
from gqa_t5x.errors import BadInput


def define_flags() -> flags.FlagValues:
  """The command's flags, apart from absl's global ones: names like --output recur."""
  values = flags.FlagValues()
  define = {'flag_values': values, 'module_name': 'gqa_t5x.convert'}
  _define_method(**define)
  text = functools.partial(flags.DEFINE_string, **define)
  switch = functools.partial(flags.DEFINE_bool, **define)
  text(
    'input',
    None,
    'The checkpoint: a folder checkpoint_<step> of T5X, legacy or Orbax layout, or a'
    ' model_dir, whose latest checkpoint is taken; or a Hugging Face folder of'
    ' T5 v1.1. Local or gs://.',
  )
  text(
    'output',
    None,
    "Where to write: a folder, in which checkpoint_<step> is made, or that checkpoint's"
    ' own path. It must not hold a checkpoint yet.',
  )
  flags.DEFINE_enum(
    'compression',
    'zstd',
    list(writer.COMPRESSORS),
    'Of the result; T5X reads each.',
    **define,
  )
  switch('dry_run', False, 'Only say what would be done; nothing is written.')
  text('verify', None, 'Only check this converted checkpoint against its manifest.')
  switch('verbose', False, 'Say for each tensor what became of its moments.')
  switch('help', False, 'Show this text.', short_name='h')
  return values


def _define_method(**define) -> None:
  """The flags that say what becomes of the heads."""
  text = functools.partial(flags.DEFINE_string, **define)
  number = functools.partial(flags.DEFINE_integer, **define)
  number(
    'num_kv_heads',
    None,
    'Key/value heads of decoder self- and cross-attention: 1 is MQA. It must divide the'
    ' key/value heads that the checkpoint has.',
  )
  methods = '; '.join(f'{name}: {m.summary}' for name, m in METHODS.items())
  text('method', 'mean', f'How heads become fewer. {methods}.')
  text(
    'grouping',
    'contiguous',
    'Which heads share. contiguous: neighbours; similarity: in cross-attention, those'
    ' that are alike.',
  )
  text(
    'statistics',
    None,
    "Second moments of the modules' inputs, from python -m gqa_t5x.calibrate, for the"
    ' methods that can use them. Without it they use the weights alone.',
  )
  number('seed', 0, 'Seed of the method random.')
  for kind, default in (
    ('self_attention', '--num_kv_heads'),
    ('cross_attention', '--num_kv_heads'),
    ('encoder', 'unchanged'),
  ):
    number(
      f'{kind}_num_kv_heads',
      None,
      f'Key/value heads of {kind.replace("_", "-")} alone (default: {default}).',
    )


def convert(args: flags.FlagValues) -> None:
  """Runs the command.

  Args:
    args: the parsed flags.

  Raises:
    BadInput: bad input; nothing is left behind.
  """
  _check_given(args)
  get_method(args.method)
  source, step, tensors = _open_source(args)
  target = args.output and choose_output(source, _absolute(args.output), step)
  method = {'name': args.method, 'grouping': args.grouping, 'seed': args.seed}
  method['statistics'] = args.statistics and str(_absolute(args.statistics))
  plan = plan_conversion(
    tensors,
    num_kv_heads=args.num_kv_heads,
    method=args.method,
    seed=args.seed,
    grouping=args.grouping,
    statistics=method['statistics'],
    self_attention_num_kv_heads=args.self_attention_num_kv_heads,
    cross_attention_num_kv_heads=args.cross_attention_num_kv_heads,
    encoder_num_kv_heads=args.encoder_num_kv_heads,
  )
  if args.dry_run:
    return _preview(args, plan, source, target, tensors)
  writer.check_space(target, plan.nbytes)
  progress = tqdm(
    total=plan.nbytes, unit='B', unit_scale=True, desc='Converting', disable=None
  )
  make_manifest = functools.partial(
    manifest.make_manifest,
    plan,
    source=str(source),
    tensors=tensors,
    step=step,
    method=method,
    compression=args.compression,
  )
  with progress:
    writer.write_checkpoint(
      target,
      plan.units,
      progress.update,
      source=tensors,
      compression=args.compression,
      make_manifest=lambda changed: make_manifest(changed=changed),
    )
  _report(args, plan, source, target)


def _check_given(args: flags.FlagValues) -> None:
  for name in ('input',) if args.dry_run else ('input', 'output'):
    if not args[name].value:
      raise BadInput(f'--{name} is missing; see --help for an example')
  kinds = ('self_attention_', 'cross_attention_', 'encoder_', '')
  if all(args[f'{kind}num_kv_heads'].value is None for kind in kinds):
    raise BadInput('--num_kv_heads is missing; see --help for an example')


def _absolute(text: str) -> epath.Path:
  """A path as T5X wants it: absolute and, if local, without symbolic links."""
  path = epath.Path(text)
  return path if '://' in text else epath.Path(os.path.realpath(path.expanduser()))


def _open_source(
  args: flags.FlagValues,
) -> tuple[epath.Path, int, dict[str, LazyTensor]]:
  """Finds and opens the checkpoint of --input.

  Returns:
    Its folder, its step (where it keeps none, the one that --output names), and path ->
    tensor.
  """
  given = _absolute(args.input)
  source = folders.find_checkpoint(given)
  if source != given:
    print(f'Reading {source}')
  tensors = folders.open_checkpoint(source)
  if 'state/step' not in tensors:
    raise BadInput(f'{source} has no tensor state/step: it is not of T5X')
  named = folders.checkpoint_step(_absolute(args.output)) if args.output else None
  if named is not None and not folders.step_is_known(source):
    tensors['state/step'] = LazyTensor.of(np.asarray(named, np.int32))
  return source, int(tensors['state/step'].read()), tensors


def choose_output(source: epath.Path, output: epath.Path, step: int) -> epath.Path:
  """Decides which folder to write, and refuses those that would do harm.

  Args:
    source: the checkpoint folder that is read.
    output: as given: a folder, or a path that ends in checkpoint_<step>.
    step: of the source.

  Returns:
    The checkpoint folder to make.

  Raises:
    BadInput: it holds a checkpoint, is the input or inside of it, or its name
      gives another step.
  """
  named = folders.checkpoint_step(output)
  if source in (output, output / f'checkpoint_{step}'):
    raise BadInput(
      f'--input and --output are the same checkpoint, {source}; choose another --output'
    )
  if source in output.parents:
    raise BadInput(
      f'--output={output} is inside the input {source}; choose another --output'
    )
  if named is None:
    present = folders.list_checkpoints(output)
    target = output / f'checkpoint_{step}'
  elif named != step:
    raise BadInput(
      f'--output names step {named}, but {source} is of step {step};'
      f' use --output={output.parent / f"checkpoint_{step}"}'
    )
  else:
    target, present = output, []
  present += [p for p in (output, target) if (p / t5x_layouts.MSGPACK).exists()]
  present += [target] if target.exists() and not _is_empty_folder(target) else []
  present = [p for p in present if p != target or not writer.is_unfinished(p)]
  if present:
    raise BadInput(
      f'{present[0]} exists already; choose another --output, or delete it'
    )
  return target


def _is_empty_folder(path: epath.Path) -> bool:
  return path.is_dir() and not any(path.iterdir())


def _preview(
  args: flags.FlagValues,
  plan: Plan,
  source: epath.Path,
  target: epath.Path | None,
  tensors: dict[str, LazyTensor],
) -> None:
  """Prints what --dry_run is for."""
  dropped = folders.dataset_state(source)
  for line in preview.describe_plan(plan, tensors, args.method, dropped):
    print(line)
  print(preview.describe_sizes(plan))
  if target is not None and not str(target).startswith('gs://'):
    free = writer.free_bytes(target)
    print(f'Disk at {target}: {plan.nbytes:,} bytes needed at most, {free:,} free')
  print('Nothing was written')


def _report(
  args: flags.FlagValues, plan: Plan, source: epath.Path, target: epath.Path
) -> None:
  """Says what was done, and what to give to T5X."""
  if args.verbose:
    for path, note in plan.log.items():
      print(f'moments of {path}: {note}')
  for done, n in collections.Counter(
    note.rpartition(', ')[2] for note in plan.log.values()
  ).items():
    print(f'Adafactor moments of {n} kernels: {done}')
  if plan.source == plan.target:
    print('It has as many key/value heads already: only the layout changed')
  elif not plan.log:
    print('The checkpoint has no optimizer state: none was written')
  if names := folders.dataset_state(source):
    print(f'Not copied: the state of the data pipeline ({", ".join(names)})')
  print(f'Converted by {args.method}: {preview.describe_sizes(plan)}')
  print(f"INITIAL_CHECKPOINT_PATH = '{target}'")


def verify(path: epath.Path) -> None:
  """Checks a converted checkpoint against its manifest, and says so in one line.

  Args:
    path: the checkpoint folder, or a model_dir, whose latest checkpoint is taken.

  Raises:
    BadInput: it has no manifest, or tensors differ from it.
  """
  folder = folders.find_checkpoint(path)
  record = manifest.verify(folder)
  print(
    f'{folder} is whole: {len(record["changed"])} tensors made by'
    f' {record["method"]["name"]} have their checksums, all'
    f' {record["result"]["num_tensors"]} their shapes'
  )


class _Terminated(BaseException):
  """SIGTERM, as an exception, so that the temporary folder is removed."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
  def stop(signum, frame):
    # A second one would stop the cleaning.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
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
      raise BadInput(f'unexpected argument {rest[0]!r}; see --help')
    with _sigterm_raises():
      verify(_absolute(args.verify)) if args.verify else convert(args)
    return 0
  except (BadInput, flags.Error, OSError) as error:
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
