"""Text to token ids and back, by the tokenizer that lies beside a model's weights.

SentencePiece gives the ids of seqio's `SentencePieceVocabulary`, and so those that the
model was trained on. No end marker is added, and none is needed to decode.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from etils import epath

from gqa_t5x.checkpoints import tokenizer_files as names
from gqa_t5x.errors import BadInput, first_line

PAD, EOS = 0, 1
_BYTES = ('ByT5Tokenizer', 'ByT5TokenizerFast')
_FIRST_BYTE = 3  # After padding, end and unknown.
_T5_EXTRA_IDS = 100


class Tokenizer(Protocol):
  """What a model needs of its tokenizer.

  Attributes:
    size: how many ids there are, with T5's extra ids, the last of which is the first
      sentinel.
  """

  size: int

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without an end marker."""

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids up to the first end marker; padding has none."""


class SentencePieceTokenizer:
  """A SentencePiece model, with T5's `<extra_id_N>` after its pieces.

  Args:
    file: the SentencePiece model, local or gs://.
    extra_ids: how many are added; `<extra_id_0>` is the last id.
  """

  def __init__(self, file: str, extra_ids: int):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    self.file, self.extra_ids = file, extra_ids
    model = epath.Path(file).read_bytes()
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for i in reversed(range(extra_ids)):
      proto.pieces.add(
        piece=f'▁<extra_id_{i}>',
        score=0.0,
        type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED,
      )
    self._processor = sentencepiece.SentencePieceProcessor(
      model_proto=proto.SerializeToString()
    )
    self.size = self._processor.GetPieceSize()

  def own_extra_ids(self) -> int:
    """Returns how many of the last ids are the file's own extra ids, as in mT5's."""
    return count_extra_ids(self._processor.IdToPiece, self.size)

  def encode(self, text: str) -> list[int]:
    return self._processor.EncodeAsIds(text)

  def decode(self, ids: Sequence[int]) -> str:
    unknown = self._processor.unk_id()
    known = [i if i < self.size else unknown for i in _content(ids)]
    return self._processor.DecodeIds(known)


class ByteTokenizer:
  """ByT5's: the bytes of UTF-8, three higher; other ids have no text."""

  size = _FIRST_BYTE + 256

  def encode(self, text: str) -> list[int]:
    return [b + _FIRST_BYTE for b in text.encode()]

  def decode(self, ids: Sequence[int]) -> str:
    bytes_ = [i - _FIRST_BYTE for i in _content(ids) if _FIRST_BYTE <= i < self.size]
    return bytes(bytes_).decode(errors='ignore')


class JsonTokenizer:
  """A tokenizer of the library tokenizers, by its tokenizer.json, local or gs://."""

  def __init__(self, file: str):
    import tokenizers

    self.file = file
    text = epath.Path(file).read_bytes().decode()
    self._tokenizer = tokenizers.Tokenizer.from_str(text)
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)
    self.extra_ids = count_extra_ids(self._tokenizer.id_to_token, self.size)

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(_content(ids), skip_special_tokens=False)


def count_extra_ids(name_of: Callable[[int], str | None], size: int) -> int:
  """Returns how many of `size` ids, from the last one down, are named as sentinels."""
  last = range(size - 1, -1, -1)
  own = itertools.takewhile(lambda i: 'extra_id_' in (name_of(i) or ''), last)
  return sum(1 for _ in own)


def _content(ids: Sequence[int]) -> list[int]:
  """The ids before the end marker, without padding."""
  ids = [int(i) for i in ids]
  end = ids.index(EOS) if EOS in ids else len(ids)
  return [i for i in ids[:end] if i != PAD]


def load(path: epath.PathLike) -> Tokenizer:
  """Opens the tokenizer of a folder, or a file of one.

  Args:
    path: a folder with spiece.model, tokenizer.json or a tokenizer_config.json that
      says that it is of bytes; or such a file, under any name (.json, or SentencePiece
      with T5's 100 extra ids).

  Raises:
    BadInput: there is none, it is damaged, or a package is missing.
  """
  path = epath.Path(path)
  folder = path if path.is_dir() else path.parent
  file = None if path.is_dir() else path
  if file is None:
    there = [folder / name for name in (names.SENTENCEPIECE, names.TOKENIZERS)]
    file = next((f for f in there if f.exists()), None)
  config = _read_config(folder / names.CONFIG)
  if file is None and config.get('tokenizer_class') in _BYTES:
    return ByteTokenizer()
  if file is None or not file.exists():
    raise BadInput(
      f'{path} has no tokenizer: expected {names.SENTENCEPIECE}, {names.TOKENIZERS}, or'
      f' {names.CONFIG} of ByT5'
    )
  try:
    if file.suffix == '.json':
      return JsonTokenizer(str(file))
    return SentencePieceTokenizer(str(file), _extra_ids(config, file))
  except ImportError as error:
    raise BadInput(
      f"{file} needs the package {error.name}: pip install 'gqa_t5x[inference]'"
    ) from error
  except Exception as error:  # of many types, for many kinds of damage
    raise BadInput(f'{file} is damaged: {first_line(error)}') from error


def _read_config(file: epath.Path) -> dict[str, Any]:
  try:
    config = json.loads(file.read_bytes()) if file.exists() else {}
  except ValueError as error:
    raise BadInput(f'{file} is truncated or damaged: {error}') from error
  return config if isinstance(config, dict) else {}


def _extra_ids(config: dict[str, Any], file: epath.Path) -> int:
  """How many extra ids come after the pieces of a SentencePiece file."""
  extra = config.get('extra_ids')
  if extra is None:
    pieces = SentencePieceTokenizer(str(file), extra_ids=0)
    return 0 if pieces.own_extra_ids() else _T5_EXTRA_IDS
  if type(extra) is not int or extra < 0:
    raise BadInput(f'{file.parent / names.CONFIG} has extra_ids {extra!r}')
  return extra
