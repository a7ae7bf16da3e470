"""The tokens of a model by id, and the files that they are read from.

tokenizer.json   of the library tokenizers: JSON, all tokens are in it
spiece.model     of SentencePiece, without T5's 100 extra ids: <extra_id_0> is the
                 last of them
"""

import json

from etils import epath

from gqa_t5x.errors import BadInput, first_line
from gqa_t5x.exports.source import Source

# Files of a Hugging Face folder that its tokenizer is made of; the first ones hold
# the tokens.
TOKENS = ('tokenizer.json', 'spiece.model')
FILES = (
  *TOKENS,
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
)
_EXTRA_IDS = 100


def read_tokens(source: Source, given: str | None = None) -> list[str]:
  """Reads as many tokens as the embedding has rows, no two of them alike.

  Args:
    source: the model; its folder may hold one of TOKENS.
    given: such a file, under any name, which is read instead.

  Returns:
    Rows without a token are named by their id, as "<unused_32100>"; all of them are
    their ids as text where there is no file.

  Raises:
    BadInput: the file is missing, damaged, or has more tokens than the embedding rows.
  """
  size = source.architecture.vocab_size
  file = find(source.folder, given)
  if file is None:
    print(f'No {" or ".join(TOKENS)} in {source.folder}: tokens are ids, as text')
    return [str(i) for i in range(size)]
  tokens = _of_tokenizers(file) if file.suffix == '.json' else _of_sentencepiece(file)
  last = max(tokens, default=-1)
  if last >= size:
    raise BadInput(
      f'{file} has tokens up to id {last}, but the model has {size} rows of its'
      ' embedding; give its own by --vocabulary'
    )
  names = [tokens.get(i, f'<unused_{i}>') for i in range(size)]
  extra = '<extra_id_{}>'
  if extra.format(0) not in ''.join(names) and last + _EXTRA_IDS < size:
    names[last + 1 : last + 1 + _EXTRA_IDS] = [
      extra.format(i) for i in reversed(range(_EXTRA_IDS))
    ]
  return names


def find(folder: epath.Path, given: str | None = None) -> epath.Path | None:
  """The file of a model's tokens, or None; BadInput if the one given is missing."""
  if given is not None:
    if not epath.Path(given).is_file():
      raise BadInput(f'--vocabulary={given}: there is no such file')
    return epath.Path(given)
  return next((folder / n for n in TOKENS if (folder / n).exists()), None)


def _of_tokenizers(file: epath.Path) -> dict[int, str]:
  try:
    content = json.loads(file.read_text())
    kind = content['model']['type']
    if kind != 'Unigram':
      raise BadInput(f"{file} is of type {kind}; T5's is Unigram")
    tokens = dict(enumerate(piece for piece, _ in content['model']['vocab']))
    return tokens | {t['id']: t['content'] for t in content['added_tokens']}
  except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise BadInput(f'{file} is truncated or damaged: {error!r}') from error


def _of_sentencepiece(file: epath.Path) -> dict[int, str]:
  try:
    import sentencepiece
  except ImportError as error:
    raise BadInput(
      f"{file} needs the package sentencepiece: pip install 'gqa_t5x[train]'"
    ) from error
  try:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
  except RuntimeError as error:
    raise BadInput(
      f'{file} is no model of SentencePiece: {first_line(error)}'
    ) from error
  return {i: pieces.id_to_piece(i) for i in range(len(pieces))}
