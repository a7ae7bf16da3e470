"""Vocabularies: that of a checkpoint's tokenizer, and that of the offline corpus.

The latter, of SentencePiece, is trained when it is first needed. A seqio task and a T5X
model must name the same vocabulary file; both get it from here. In gin:

    from gqa_t5x.data import vocabulary
    VOCABULARY = @vocabulary.pydocs_vocabulary()
"""

import io
import sys
import tempfile
import time
from collections.abc import Iterable

import numpy as np
import sentencepiece
import seqio
import tensorflow as tf
from etils import epath
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from gqa_t5x import files
from gqa_t5x.checkpoints import folders, tokenizer_files
from gqa_t5x.data import corpus as corpus_lib
from gqa_t5x.errors import BadInput
from gqa_t5x.inference import tokenizer as tokenizer_lib

_EXTRA_IDS = 100  # T5's sentinels
_NUM_PIECES = 4096 - _EXTRA_IDS  # with pad, end of sequence, unknown and 256 bytes
# The first texts of the train split up to this length. Its order is by hash, so they
# are a fair sample; twice as much takes twice as long for 1% fewer tokens.
_TRAINING_CHARS = 2_000_000
FILE = 'vocabulary.model'


def of_checkpoint(path: str, tokenizer: str | None = None) -> seqio.Vocabulary:
  """Returns the vocabulary of the tokenizer that lies beside a checkpoint.

  Args:
    path: the checkpoint, of any format.
    tokenizer: a folder or a file of the tokenizer, if it is elsewhere.

  Raises:
    BadInput: there is none, or it is damaged.
  """
  if tokenizer is None:
    folder = folders.find_checkpoint(epath.Path(path))
    place = tokenizer_files.find(folder)
    if place is None:
      raise BadInput(
        f'{folder} has no tokenizer ({tokenizer_files.SENTENCEPIECE},'
        f' {tokenizer_files.TOKENIZERS}); give --gin.TOKENIZER, or --gin.VOCABULARY'
      )
    tokenizer = str(place)
  found = tokenizer_lib.load(tokenizer)
  if isinstance(found, tokenizer_lib.ByteTokenizer):
    return seqio.ByteVocabulary()
  if isinstance(found, tokenizer_lib.SentencePieceTokenizer):
    return seqio.SentencePieceVocabulary(found.file, extra_ids=found.extra_ids)
  return _JsonVocabulary(found)


def write_tokenizer(vocabulary: seqio.Vocabulary, folder: epath.Path) -> None:
  """Writes the files of a vocabulary's tokenizer beside a run's checkpoints.

  `gqa_t5x.load` then takes and gives text. A vocabulary that is no file, and not of
  bytes, has none.
  """
  name, config = None, {}
  if isinstance(vocabulary, seqio.ByteVocabulary):
    config = {'tokenizer_class': 'ByT5Tokenizer'}
  elif isinstance(vocabulary, seqio.SentencePieceVocabulary):
    config = {'tokenizer_class': 'T5Tokenizer', 'extra_ids': vocabulary.extra_ids}
    name, source = tokenizer_files.SENTENCEPIECE, vocabulary.sentencepiece_model_file
  elif isinstance(vocabulary, _JsonVocabulary):
    name, source = tokenizer_files.TOKENIZERS, vocabulary.file
  if name is not None:
    with files.whole(folder / name) as temporary:
      temporary.write_bytes(epath.Path(source).read_bytes())
  if config:
    files.write_json(folder / tokenizer_files.CONFIG, config)


class _JsonVocabulary(seqio.Vocabulary):
  """The vocabulary of a tokenizer.json; equal to another one of the same file."""

  def __init__(self, tokenizer: tokenizer_lib.JsonTokenizer):
    self._tokenizer, self.file = tokenizer, tokenizer.file
    super().__init__(extra_ids=tokenizer.extra_ids)

  bos_id = None
  eos_id, unk_id = tokenizer_lib.EOS, 2

  @property
  def _base_vocab_size(self) -> int:
    return self._tokenizer.size - self._tokenizer.extra_ids

  def _encode(self, s: str) -> list[int]:
    return self._tokenizer.encode(s)

  def _decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode(list(ids))

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    def encode(text: np.ndarray | bytes) -> np.ndarray:
      text = np.asarray(text).item().decode(errors='replace')
      return np.asarray(self._encode(text), np.int32)

    ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
    ids.set_shape([None])
    return ids

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    def decode(ids: np.ndarray) -> bytes:
      return self._decode(ids.tolist()).encode()

    return tf.numpy_function(decode, [ids], tf.string, stateful=False)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _JsonVocabulary) and self.file == other.file


class CorpusVocabulary(seqio.SentencePieceVocabulary):
  """A SentencePiece vocabulary that trains itself when its file is first read.

  It is trained on the train split of `corpus`. Equal to another one of the same corpus
  and cache folder, whether trained or not.
  """

  def __init__(self, corpus: corpus_lib.Corpus):
    self.corpus = corpus
    super().__init__(str(corpus.folder / FILE), extra_ids=_EXTRA_IDS)

  def _model_context(self):
    if self._model is None:
      path = ensure(self.corpus)
      try:
        size = super()._model_context().tokenizer.GetPieceSize()
        if size != _NUM_PIECES + _EXTRA_IDS:
          raise ValueError(f'{size} pieces, {_NUM_PIECES + _EXTRA_IDS} expected')
      except (DecodeError, OSError, RuntimeError, ValueError) as error:
        self._model = None
        raise BadInput(
          f'{path} is damaged ({error}). Delete it: the next run builds it anew'
        ) from error
    return self._model


def pydocs_vocabulary(corpus: str = 'pydocs') -> CorpusVocabulary:
  """Returns the vocabulary of an offline corpus, for tasks and models alike.

  Args:
    corpus: a name in `corpus.CORPORA`; BadInput for another.

  Returns:
    4,096 ids: 0 pad, 1 end of sequence, 2 unknown (never used: rare characters become
    bytes), and T5's 100 sentinels at the end. Line breaks and runs of spaces stay.
  """
  if corpus not in corpus_lib.CORPORA:
    raise BadInput(
      f'no corpus is named {corpus!r}; choose one of {", ".join(corpus_lib.CORPORA)}'
    )
  return CorpusVocabulary(corpus_lib.CORPORA[corpus])


def ensure(corpus: corpus_lib.Corpus) -> str:
  """Trains the corpus's vocabulary unless the cache has it; returns its path.

  Raises:
    OSError: the cache cannot be written.
    BadInput: the corpus is damaged, or too small for `_NUM_PIECES` pieces.
  """
  path = corpus_lib.ensure(corpus) / FILE
  if not path.exists():
    start = time.monotonic()
    model = _train(corpus)
    with corpus_lib.writing(path) as temporary:
      temporary.write_bytes(model)
    seconds = time.monotonic() - start
    print(f'corpus {corpus.name!r}: vocabulary in {seconds:.0f} s', file=sys.stderr)
  return str(path)


def train(texts: Iterable[str], num_pieces: int, **options) -> bytes:
  """Returns the file of a SentencePiece model of `num_pieces`, trained on texts.

  It has T5's ids (0 pad, 1 end of sequence, 2 unknown), and 256 bytes for characters
  without a piece. Options are the trainer's, which raises a RuntimeError or ValueError
  for too little text.
  """
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_writer=model,
    vocab_size=num_pieces,
    **{'pad_id': 0, 'eos_id': 1, 'unk_id': 2, 'bos_id': -1, 'pad_piece': '<pad>'},
    byte_fallback=True,
    **options,
  )
  return model.getvalue()


def _train(corpus: corpus_lib.Corpus) -> bytes:
  texts, chars = [], 0
  for text in corpus_lib.read(corpus, 'train'):
    texts.append(text)
    chars += len(text)
    if chars > _TRAINING_CHARS:
      break
  with tempfile.NamedTemporaryFile(suffix='.tsv') as rules:
    # One rule that no text meets: with none, each tokenizer logs that it has none.
    rules.write(f'{ord(corpus_lib.LINE_BREAK):X}\t{ord(" "):X}\n'.encode())
    rules.flush()
    try:
      model = train(
        texts,
        _NUM_PIECES,
        # Unlike T5's vocabulary, this one gives every text back as it was: nothing is
        # normalised, line breaks and indentation stay.
        normalization_rule_tsv=rules.name,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=['\n'],
        max_sentence_length=1_000_000,
        num_threads=2,  # The order of sums, and so the pieces, depends on it.
        minloglevel=2,
      )
    except (RuntimeError, ValueError) as error:
      raise BadInput(
        f'corpus {corpus.name!r}: {chars:,} characters are too few for a vocabulary of '
        f'{_NUM_PIECES} pieces ({error}); name more sources'
      ) from error
  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  proto.normalizer_spec.ClearField('normalization_rule_tsv')  # a random file name
  return proto.SerializeToString(deterministic=True)
