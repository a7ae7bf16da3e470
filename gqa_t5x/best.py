"""Finds the checkpoint with the best dev score of a fine-tuning run.

  python -m gqa_t5x.best --model_dir=runs/finetuned --metric=rouge1

prints step, score and path. The scores are those that decoding the validation split
gave while training (gin/runs/finetune.gin), in MODEL_DIR/inference_eval; the highest
wins, the earliest of equal ones. To evaluate that checkpoint, or to decode with it, add
gin/runs/best_checkpoint.gin to the other gin files. If the checkpoint was removed, that
is an error: train with KEEP_CHECKPOINTS = None.
"""

import sys
from collections.abc import Sequence
from typing import Any

from gqa_t5x import command_line, files
from gqa_t5x.errors import BadInput
from gqa_t5x.training import best_checkpoint


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns its exit code."""
  command = command_line.Command('gqa_t5x.best', __doc__)
  command.text('model_dir', None, 'MODEL_DIR of the run.')
  help_text = 'Such as rouge1, bleu, f1; not needed if there is only one.'
  command.text('metric', None, help_text)
  command.text('task', None, 'The seqio task; not needed if there is only one.')
  return command.run(argv, _print_best)


def _print_best(args: Any) -> None:
  if not args.model_dir:
    raise BadInput('--model_dir is missing; see --help.')
  model_dir = files.absolute(args.model_dir)
  scores = best_checkpoint.scores(model_dir, args.metric, args.task)
  path = best_checkpoint.checkpoint(model_dir, args.metric, args.task)
  step = best_checkpoint.select(scores)
  print(f'step {step}  score {scores[step]:.4f}  {path}')


if __name__ == '__main__':
  sys.exit(main(sys.argv))
