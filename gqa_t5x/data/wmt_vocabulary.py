"""Trains the vocabulary of `wmt14_en_de_shazeer` on the task's training text.

  python -m gqa_t5x.data.wmt_vocabulary --output=FILE --data_dir=FOLDER

FOLDER is TFDS's, with the data of `python -m gqa_t5x.data.prepare wmt14_en_de`; FILE
may be gs://..., too, and is what gin calls VOCABULARY_FILE.

Shazeer's models share one vocabulary of subwords between English and German, that of
tensor2tensor, about 33,700 (their 211 million parameters tell). Its file is no
SentencePiece model, which is what seqio reads. This one has 32,768 pieces, and as there
no character is unknown: rare ones become bytes.
"""

import io
import sys
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
import seqio
from etils import epath

from gqa_t5x import command_line, files
from gqa_t5x.data import benchmarks
from gqa_t5x.errors import BadInput

TASK = 'wmt14_en_de_shazeer'
NUM_PIECES = 32_768
# TFDS has shuffled them, so the first are a fair sample of the 4.5 million.
NUM_PAIRS = 1_000_000
NUM_THREADS = 16  # the order of sums, and so the pieces, depends on it


def train(sentences: Iterable[str], num_pieces: int = NUM_PIECES) -> bytes:
  """Trains a SentencePiece model with T5's ids: 0 pad, 1 end of sequence, 2 unknown.

  Args:
    sentences: the text; the same text gives the same model.
    num_pieces: size, the three ids and 256 bytes included.

  Returns:
    The model's file.

  Raises:
    BadInput: there is too little text for so many pieces.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sentences),
      model_writer=model,
      vocab_size=num_pieces,
      byte_fallback=True,
      **{'pad_id': 0, 'eos_id': 1, 'unk_id': 2, 'bos_id': -1, 'pad_piece': '<pad>'},
      num_threads=NUM_THREADS,
      minloglevel=1,
    )
  except RuntimeError as error:
    raise BadInput(f'no vocabulary of {num_pieces} pieces: {error}') from error
  return model.getvalue()


def sentences(num_pairs: int = NUM_PAIRS) -> Iterator[str]:
  """Yields the English and German sentences of the first training pairs."""
  source = seqio.TaskRegistry.get(TASK).source
  source.list_shards('train')  # says what to do if the data is not there
  pairs = source.get_dataset('train', shuffle=False).take(num_pairs)
  for pair in pairs.as_numpy_iterator():
    yield pair['en'].decode()
    yield pair['de'].decode()


def write(
  output: str | None, data_dir: str | None, num_pieces: int = NUM_PIECES
) -> None:
  """Trains the vocabulary and writes its file.

  Args:
    output: the file, local or gs://, which must not exist yet.
    data_dir: TFDS's folder; None for its default.
    num_pieces: size of the vocabulary.

  Raises:
    BadInput: the file exists, or the data is not prepared or too little.
    OSError: the file cannot be written.
  """
  if output is None:
    raise BadInput('--output is missing: the file to write')
  path = epath.Path(files.absolute(output))
  if path.exists():
    raise BadInput(f'{path} exists already; choose another --output')
  benchmarks.task(TASK, data_dir=data_dir)
  model = train(sentences(), num_pieces)
  with files.whole(path) as temporary:
    temporary.write_bytes(model)
  print(f'{num_pieces:,} pieces in {path}')


def main(argv: Sequence[str]) -> int:
  """The command.

  Args:
    argv: program name and flags.

  Returns:
    Exit code: 0, or 1 for bad input.
  """
  command = command_line.Command('gqa_t5x.data.wmt_vocabulary', __doc__)
  command.text('output', None, 'The file to write, local or gs://.')
  command.text('data_dir', None, 'Folder of TensorFlow Datasets, local or gs://.')
  return command.run(
    argv,
    lambda args: write(args.output, args.data_dir),
    expected=(ValueError,),  # TensorFlow Datasets'
  )


if __name__ == '__main__':
  sys.exit(main(sys.argv))
