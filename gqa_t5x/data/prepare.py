"""Downloads the data of benchmarks into a folder of TFDS, once for all runs.

  python -m gqa_t5x.data.prepare cnn_dailymail arxiv --data_dir=FOLDER

FOLDER may be gs://...; without --data_dir it is TFDS's default, ~/tensorflow_datasets.
The names are those of the tasks: cnn_dailymail, arxiv, pubmed, mediasum, multi_news,
wmt14_en_de, trivia_qa. For mediasum the two files that its authors publish must lie in
FOLDER before (see `gqa_t5x.data.mediasum`). Data that is there already is left alone;
what stopped half-way begins anew. Sizes are in docs/data.md.
"""

import sys
from collections.abc import Sequence

from gqa_t5x import command_line, files, quiet
from gqa_t5x.errors import BadInput


def prepare(names: Sequence[str], data_dir: str | None) -> None:
  """Downloads and converts the data sets of `benchmarks.BENCHMARKS` with these names.

  Raises:
    BadInput: a name is unknown, or files that are published by hand are missing.
    OSError: the folder cannot be written, or a download fails.
  """
  quiet.import_tensorflow()
  import tensorflow_datasets as tfds

  from gqa_t5x.data import benchmarks

  unknown = [name for name in names if name not in benchmarks.BENCHMARKS]
  if unknown or not names:
    raise BadInput(
      f'no benchmark is named {", ".join(unknown) or "on the command line"}; choose '
      f'from {", ".join(benchmarks.BENCHMARKS)}'
    )
  folder = None if data_dir is None else files.absolute(data_dir, any_name=True)
  for task in names:
    builder = tfds.builder(benchmarks.BENCHMARKS[task].tfds_name, data_dir=folder)
    builder.download_and_prepare()
    splits = builder.info.splits.items()
    sizes = [f'{name} {split.num_examples:,}' for name, split in splits]
    print(f'{task}: {", ".join(sizes)} examples in {builder.data_dir}')


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns its exit code."""
  command = command_line.Command('gqa_t5x.data.prepare', __doc__, max_words=sys.maxsize)
  command.text('data_dir', None, 'Folder of TensorFlow Datasets, local or gs://.')
  return command.run(
    argv,
    lambda args, *names: prepare(names, args.data_dir),
    expected=(ValueError,),  # TensorFlow Datasets'
  )


if __name__ == '__main__':
  sys.exit(main(sys.argv))
