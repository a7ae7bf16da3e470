"""Exports a checkpoint to other programs.

  python -m gqa_t5x.export --input=/models/gqa4 --output=/models/gqa4_ct2 \\
    --format=ctranslate2 --quantization=int8

Formats (docs/export.md has an example of each):

  ctranslate2   a model of CTranslate2, which keeps the few key/value heads
  huggingface   a folder for transformers; key/value heads are repeated, exactly
  stablehlo     the whole decoder as one program, served with JAX alone
  t5x           a checkpoint with all key/value heads, for T5X's own network

The input is a checkpoint of T5X or a Hugging Face folder, or a folder of checkpoints,
whose latest is taken. Nothing is left behind when a run fails.
"""

import sys
from collections.abc import Sequence

from absl import flags

from gqa_t5x.command_line import Command
from gqa_t5x.errors import BadInput
from gqa_t5x.exports import ctranslate2, huggingface, run, stablehlo

_REQUIRED = ('input', 'output', 'format')
_NUMBERS = {
  'batch_size': 'Of stablehlo: inputs that are decoded together; 1 by default.',
  'input_length': 'Of stablehlo: tokens of an input; 512 by default.',
  'output_length': 'Of stablehlo: most tokens of an output; 64 by default.',
  'num_beams': 'Of stablehlo: more than 1 is beam search; 1 by default.',
}
_OPTIONS = ('vocabulary', 'quantization', 'dtype', 'num_kv_heads', *_NUMBERS)


def define_command() -> Command:
  """The command's flags."""
  command = Command('gqa_t5x.export', __doc__)
  command.text(
    'input',
    None,
    'The checkpoint: of T5X, legacy or Orbax layout, a Hugging Face folder, or a'
    ' model_dir, whose latest checkpoint is taken. Local or gs://.',
  )
  command.text('output', None, 'The local folder to make; it must not exist yet.')
  command.text('format', None, f'One of {", ".join(run.FORMATS)}.')
  command.text(
    'vocabulary',
    None,
    "Of ctranslate2 and huggingface, the model's tokens: tokenizer.json, or a model of"
    ' SentencePiece. By default those in the folder of --input.',
  )
  command.text(
    'quantization',
    None,
    'Of ctranslate2: how weights are stored, one of'
    f' {", ".join(ctranslate2.QUANTIZATIONS)}. float32 by default.',
  )
  command.text(
    'dtype',
    None,
    f'Of stablehlo, one of {", ".join(stablehlo.DTYPES)}; float32 by default. Of'
    f" huggingface, one of {', '.join(huggingface.DTYPES)}; the input's by default.",
  )
  command.text('num_kv_heads', None, 'Of t5x: all.')
  for name, text in _NUMBERS.items():
    command.whole(name, None, text)
  return command


def _act(args: flags.FlagValues) -> None:
  for name in _REQUIRED:
    if args[name].value is None:
      raise BadInput(f'--{name} is missing; see --help for an example')
  given = {name: args[name].value for name in (*_REQUIRED, *_OPTIONS)}
  run.export(**given)


def main(argv: Sequence[str]) -> int:
  """The command; returns 0, 1 for bad input, 130 or 143 when stopped by a signal."""
  return define_command().run(argv, _act, stopped='stopped; nothing was written')


if __name__ == '__main__':
  sys.exit(main(sys.argv))
