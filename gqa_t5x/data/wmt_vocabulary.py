"""Trains the vocabulary of `wmt14_en_de_shazeer` on the task's training text.

  python -m gqa_t5x.data.wmt_vocabulary --output=FILE --data_dir=FOLDER

FOLDER is TFDS's, with the data of `python -m gqa_t5x.data.prepare wmt14_en_de`; FILE
may be gs://..., too, and is what gin calls VOCABULARY_FILE.

Shazeer's models share one vocabulary of subwords between English and German, that of
tensor2tensor, of about 33,700 (computed from their 211 million parameters). seqio reads
SentencePiece models alone, which its file is not. This one has 32,768 pieces. As in the
original, no character is unknown: rare ones become bytes.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence

from etils import epath

from gqa_t5x import command_line, files, quiet
from gqa_t5x.errors import BadInput

TASK = 'wmt14_en_de_shazeer'
NUM_PIECES = 32_768
# TFDS has shuffled them, so the first are a fair sample of the 4.5 million.
NUM_PAIRS = 1_000_000


def train(sentences: Iterable[str], num_pieces: int = NUM_PIECES) -> bytes:
  """Returns the file of a vocabulary; the same sentences give the same one.

  Raises:
    BadInput: there is too little text for so many pieces.
  """
  from gqa_t5x.data import vocabulary

  try:
    # The order of sums, and so the pieces, depends on the number of threads.
    return vocabulary.train(sentences, num_pieces, num_threads=16, minloglevel=1)
  except RuntimeError as error:
    raise BadInput(f'no vocabulary of {num_pieces} pieces: {error}') from error


def sentences(num_pairs: int = NUM_PAIRS) -> Iterator[str]:
  """Yields the English and German sentences of the first training pairs."""
  import seqio

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

  Raises:
    BadInput: the file exists, or the data is not prepared or too little.
    OSError: the file cannot be written.
  """
  if output is None:
    raise BadInput('--output is missing: the file to write')
  path = epath.Path(files.absolute(output, any_name=True))
  if path.exists():
    raise BadInput(f'{path} exists already; choose another --output')
  files.check_outputs(str(path), make_folders=True)
  quiet.import_tensorflow()
  from gqa_t5x.data import benchmarks

  benchmarks.task(TASK, data_dir=data_dir)
  model = train(sentences(), num_pieces)
  with files.whole(path) as temporary:
    temporary.write_bytes(model)
  print(f'{num_pieces:,} pieces in {path}')


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns its exit code."""
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
