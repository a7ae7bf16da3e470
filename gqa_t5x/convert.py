"""Turns a multi-head-attention T5 checkpoint into a grouped-query one, for T5X.

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

A Hugging Face folder keeps no step: --output names it.

  python -m gqa_t5x.convert --input=/models/t5-v1_1-base --num_kv_heads=4 \\
    --output=/models/base_gqa4/checkpoint_1000000

svd fits the shared heads to the old ones, best to statistics of the model at work
(python -m gqa_t5x.calibrate writes them):

  python -m gqa_t5x.convert --input=/models/mha --output=/models/svd2 \\
    --num_kv_heads=2 --method=svd --statistics=/models/mha.statistics.npz

Its heads may have another size, which holds more in the same cache: the latent form,

  python -m gqa_t5x.convert --input=/models/mha --output=/models/latent \
    --num_kv_heads=1 --kv_head_dim=512 --method=svd --statistics=...

and what a conversion left can come closer to the original's outputs on some texts, by
sums that python -m gqa_t5x.calibrate collects:

  python -m gqa_t5x.convert --input=/models/svd2 --output=/models/refitted \
    --refit_outputs=/models/svd2.sums.npz

--compression=none is fastest where the disk is fast and large; gzip is what T5X itself
writes. Years later, --verify compares the result with the checksums in its manifest:

  python -m gqa_t5x.convert --verify=/models/gqa2

Sizes and head counts are read from the checkpoint. Decoder self- and cross-attention
change, the encoder does not (GQA paper, section 2.2). The optimizer state and the step
are converted along; the data pipeline's state is not. A checkpoint of a GQA model can
be converted again, to fewer heads. Nothing is left behind when a run fails; after a
power cut, run the same command again.
"""

import dataclasses
import sys
from collections.abc import Sequence

from absl import flags

from gqa_t5x.checkpoints.writer import COMPRESSORS
from gqa_t5x.command_line import Command
from gqa_t5x.conversion import run
from gqa_t5x.conversion.methods import METHODS
from gqa_t5x.errors import BadInput

# Kind of attention -> what it gets if its own flag is not given.
_KINDS = {
  'self_attention': '--num_kv_heads',
  'cross_attention': '--num_kv_heads',
  'encoder': 'unchanged',
}


def define_command() -> Command:
  """The command's flags."""
  command = Command('gqa_t5x.convert', __doc__)
  _define_method(command)
  command.text(
    'input',
    None,
    'The checkpoint: a folder checkpoint_<step> of T5X, legacy or Orbax layout, or a'
    ' model_dir, whose latest checkpoint is taken; or a Hugging Face folder of a T5.'
    ' Local or gs://.',
  )
  command.text(
    'output',
    None,
    "Where to write: a folder, in which checkpoint_<step> is made, or that checkpoint's"
    ' own path. It must not hold a checkpoint yet.',
  )
  command.choice('compression', 'zstd', COMPRESSORS, 'Of the result; T5X reads each.')
  command.switch('dry_run', False, 'Only say what would be done; nothing is written.')
  command.text(
    'verify', None, 'Only check this converted checkpoint against its manifest.'
  )
  command.switch('verbose', False, 'Say for each tensor what became of its moments.')
  return command


def _define_method(command: Command) -> None:
  """The flags that say what becomes of the heads."""
  command.whole(
    'num_kv_heads',
    None,
    'Key/value heads of decoder self- and cross-attention: 1 is MQA. It must divide the'
    ' key/value heads that the checkpoint has.',
    least=None,
  )
  command.whole(
    'kv_head_dim',
    None,
    'Size of the key/value heads of decoder self- and cross-attention (default: the'
    ' head size), for the method svd: the latent form.',
    least=None,
  )
  methods = '; '.join(f'{name}: {m.summary}' for name, m in METHODS.items())
  command.text('method', 'mean', f'How heads become fewer. {methods}.')
  command.text(
    'grouping',
    'contiguous',
    'Which heads share. contiguous: neighbours; similarity: those that are alike, in'
    ' cross-attention, and in umT5 in self-attention, too.',
  )
  command.text(
    'statistics',
    None,
    "Second moments of the modules' inputs, from python -m gqa_t5x.calibrate, for the"
    ' methods that can use them. Without it they use the weights alone.',
  )
  command.whole('seed', 0, 'Seed of the method random.', least=None)
  for kind, default in _KINDS.items():
    command.whole(
      f'{kind}_num_kv_heads',
      None,
      f'Key/value heads of {kind.replace("_", "-")} alone (default: {default}).',
      least=None,
    )

  command.text(
    'refit_outputs',
    None,
    'Change nothing but the output kernels of a converted checkpoint, by these sums'
    ' from python -m gqa_t5x.calibrate with ORIGINAL_PATH.',
  )


def _request(args: flags.FlagValues) -> run.Request:
  """What the flags ask for, each by its name; BadInput if one is missing."""
  request = run.Request(
    **{field.name: args[field.name].value for field in dataclasses.fields(run.Request)}
  )
  for name in ('input',) if request.dry_run else ('input', 'output'):
    if not getattr(request, name):
      raise BadInput(f'--{name} is missing; see --help for an example')
  counts = ['num_kv_heads', *(f'{kind}_num_kv_heads' for kind in _KINDS)]
  if request.refit_outputs:
    others = (*counts, 'kv_head_dim', 'method', 'grouping', 'statistics', 'seed')
    if given := [f'--{name}' for name in others if args[name].present]:
      raise BadInput(
        '--refit_outputs changes the output kernels alone; leave out'
        f' {", ".join(given)}'
      )
  elif all(getattr(request, name) is None for name in counts):
    raise BadInput('--num_kv_heads is missing; see --help for an example')
  return request


def _act(args: flags.FlagValues) -> None:
  if args.verify:
    run.verify(args.verify)
  else:
    run.convert(_request(args))


def main(argv: Sequence[str]) -> int:
  """The command; returns 0, 1 for bad input, 130 or 143 when stopped by a signal."""
  return define_command().run(argv, _act, stopped='stopped; nothing was written')


if __name__ == '__main__':
  sys.exit(main(sys.argv))
