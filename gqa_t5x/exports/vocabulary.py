"""The tokens of a model by id, and the files that they are read from.

tokenizer.json         of the library tokenizers: JSON, all tokens are in it
spiece.model           of SentencePiece, without T5's extra ids, of which
                       <extra_id_0> is the last
tokenizer_config.json  how many extra ids there are; of ByT5 no other file is needed
"""

import json
from typing import Any

from etils import epath

from gqa_t5x.checkpoints import tokenizer_files
from gqa_t5x.errors import BadInput, first_line
from gqa_t5x.exports.source import Source

_SPECIAL = ('<pad>', '</s>', '<unk>')
_BYTES = ('ByT5Tokenizer', 'ByT5TokenizerFast')
_T5_EXTRA_IDS = 100


def read_tokens(source: Source, given: str | None = None) -> list[str]:
  """Reads as many tokens as the embedding has rows, no two of them alike.

  Args:
    source: the model; its folder, or the one above, may hold a tokenizer.
    given: tokenizer.json or a model of SentencePiece, under any name, read instead.

  Returns:
    Rows without a token are named by their id, as "<unused_32100>"; all of them are
    their ids as text where there is no tokenizer.

  Raises:
    BadInput: the file is missing, damaged, or has more tokens than the embedding rows.
  """
  size = source.architecture.vocab_size
  file = find(source, given)
  if file is None:
    print(f'{source.name} has no tokenizer: tokens are ids, as text')
    return [str(i) for i in range(size)]
  if file.name == tokenizer_files.CONFIG:
    tokens = dict(enumerate([*_SPECIAL, *map(chr, range(256))]))
  elif file.suffix == '.json':
    tokens = _of_tokenizers(file)
  else:
    tokens = _of_sentencepiece(file)
  if (last := max(tokens)) >= size:
    raise BadInput(
      f'{file} has tokens up to id {last}, but the model has {size} rows of its'
      ' embedding; give its own by --vocabulary'
    )
  return [tokens.get(i, f'<unused_{i}>') for i in range(size)]


def find(source: Source, given: str | None = None) -> epath.Path | None:
  """The file of a model's tokens, or None; BadInput if the one given is missing."""
  if given is not None:
    if not epath.Path(given).is_file():
      raise BadInput(f'--vocabulary={given}: there is no such file')
    return epath.Path(given)
  if source.folder is None or source.folder.is_file():
    return source.folder
  place = tokenizer_files.find(source.folder)
  names = (tokenizer_files.TOKENIZERS, tokenizer_files.SENTENCEPIECE)
  found = [place / name for name in names if place and (place / name).exists()]
  if place and not found and _config(place).get('tokenizer_class') in _BYTES:
    found = [place / tokenizer_files.CONFIG]
  return found[0] if found else None


def _config(folder: epath.Path) -> dict[str, Any]:
  file = folder / tokenizer_files.CONFIG
  try:
    return json.loads(file.read_bytes()) if file.exists() else {}
  except ValueError as error:
    raise BadInput(f'{file} is truncated or damaged: {error}') from error


def _of_tokenizers(file: epath.Path) -> dict[int, str]:
  try:
    content = json.loads(file.read_bytes())
    kind = content['model']['type']
    tokens = dict(enumerate(piece for piece, _ in content['model']['vocab']))
    tokens |= {t['id']: t['content'] for t in content['added_tokens']}
  except (KeyError, TypeError, ValueError) as error:
    raise BadInput(f'{file} is truncated or damaged: {error!r}') from error
  if kind != 'Unigram':
    raise BadInput(f"{file} is of type {kind}; T5's is Unigram")
  return tokens


def _of_sentencepiece(file: epath.Path) -> dict[int, str]:
  try:
    import sentencepiece
  except ImportError as error:
    raise BadInput(
      f"{file} needs the package sentencepiece: pip install 'gqa_t5x[inference]'"
    ) from error
  try:
    model = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
  except RuntimeError as error:
    raise BadInput(
      f'{file} is no model of SentencePiece: {first_line(error)}'
    ) from error
  pieces = [model.id_to_piece(i) for i in range(len(model))]
  there = any('extra_id_' in piece for piece in pieces)  # As in mT5's.
  extra_ids = 0 if there else _config(file.parent).get('extra_ids', _T5_EXTRA_IDS)
  pieces += [f'<extra_id_{i}>' for i in reversed(range(extra_ids))]
  return dict(enumerate(pieces))
