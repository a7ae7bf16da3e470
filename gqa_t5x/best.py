"""Finds the checkpoint with the best dev score of a fine-tuning run.

  python -m gqa_t5x.best --model_dir=runs/finetuned --metric=rouge1

prints step, score and path. The scores are those that decoding the validation split
gave while training (gin/runs/finetune.gin), in MODEL_DIR/inference_eval; the highest
wins, the earliest of equal ones. To evaluate that checkpoint, or to decode with it, add
gin/runs/best_checkpoint.gin to the other gin files. If its checkpoint was removed, that
is an error: train with KEEP_CHECKPOINTS = None.
"""

import sys
from collections.abc import Sequence

from absl import flags
from etils import epath

from gqa_t5x.checkpoints import folders
from gqa_t5x.training import best_checkpoint, paths


def define_flags() -> flags.FlagValues:
  """The command's flags, apart from absl's global ones."""
  values = flags.FlagValues()
  define = {'flag_values': values, 'module_name': 'gqa_t5x.best'}
  flags.DEFINE_string('model_dir', None, 'MODEL_DIR of the run.', **define)
  flags.DEFINE_string(
    'metric',
    None,
    'Such as rouge1, bleu, f1; not needed if there is only one.',
    **define,
  )
  flags.DEFINE_string(
    'task', None, 'The seqio task; not needed if there is only one.', **define
  )
  flags.DEFINE_bool('help', False, 'Show this text.', short_name='h', **define)
  return values


def main(argv: Sequence[str]) -> int:
  """The command.

  Args:
    argv: program name and flags.

  Returns:
    Exit code: 0, or 1 for bad input.
  """
  args = define_flags()
  try:
    rest = args(list(argv))[1:]
    if args.help:
      print(f'{__doc__}\nFlags:{args.module_help("gqa_t5x.best")}')
      return 0
    if rest:
      raise ValueError(f'unexpected argument {rest[0]!r}; see --help.')
    if not args.model_dir:
      raise ValueError('--model_dir is missing; see --help.')
    model_dir = paths.absolute(args.model_dir)
    found = best_checkpoint.scores(model_dir, args.metric, args.task)
    path = best_checkpoint.checkpoint(model_dir, args.metric, args.task)
    step = folders.checkpoint_step(epath.Path(path))
    print(f'step {step}  score {found[step]:.4f}  {path}')
    return 0
  except (ValueError, OSError, flags.Error) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 1


if __name__ == '__main__':
  sys.exit(main(sys.argv))
