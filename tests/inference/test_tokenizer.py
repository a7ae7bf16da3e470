"""Tokenizers: the ids of seqio's vocabularies, and of the library tokenizers."""

import re

import pytest
import seqio
import tensorflow as tf

from gqa_t5x.data import preprocessors, vocabulary
from gqa_t5x.errors import BadInput
from gqa_t5x.inference import tokenizer
from helpers import tokenizers_made as made

TEXTS = [
  'the cat sat',
  '  a   dog ',
  '',
  'zebra €',
  'the <extra_id_0> sat <extra_id_1>',
]


@pytest.mark.parametrize('extra_ids', [None, 0, 7])
def test_sentencepiece_is_seqios(extra_ids, tmp_path):
  folder = made.write_sentencepiece(tmp_path, extra_ids)
  got = tokenizer.load(folder)
  number = 100 if extra_ids is None else extra_ids
  expected = seqio.SentencePieceVocabulary(str(folder / 'spiece.model'), number)
  assert got.size == expected.vocab_size
  for text in TEXTS:
    ids = expected.encode(text)
    assert got.encode(text) == ids
    assert got.decode([*ids, 1, 5, 6, 0]) == expected.decode(ids)
  if number:
    assert got.encode('<extra_id_0>')[-1] == got.size - 1


def test_bytes_are_seqios(tmp_path):
  got, expected = tokenizer.load(made.write_bytes(tmp_path)), seqio.ByteVocabulary()
  assert got.size == expected.vocab_size
  for text in TEXTS:
    assert got.encode(text) == list(expected.encode(text))
    assert got.decode([*got.encode(text), 1, 70]) == text
  assert got.decode([300, 2, 75, 0]) == 'H'


def test_json(tmp_path):
  """Neither its end marker nor its truncation counts."""
  pytest.importorskip('tokenizers')
  got = tokenizer.load(made.write_json(tmp_path))
  words = [
    '<pad>',
    '</s>',
    '<unk>',
    'a',
    'ate',
    'cat',
    'dog',
    'mat',
    'on',
    'sat',
    'the',
  ]
  assert got.size == len(words) + 3
  ids = [words.index(w) for w in ('the', 'cat', 'sat', 'on')]
  assert got.encode('the cat sat on') == ids
  assert got.decode([*ids, 1, 4, 0]) == 'the cat sat on'
  assert got.encode('<extra_id_0>') == [got.size - 1]


@pytest.mark.parametrize('write', ['sentencepiece', 'bytes', 'json'])
def test_seqio_has_the_same_ids(write, tmp_path):
  """In Python, and in a data pipeline."""
  pytest.importorskip('tokenizers' if write == 'json' else 'seqio')
  folder = getattr(made, f'write_{write}')(tmp_path / 'model')
  (folder / 'checkpoint').write_bytes(b'')
  got, ours = vocabulary.of_checkpoint(str(folder)), tokenizer.load(folder)
  for text in ('the cat sat', 'a dog'):
    ids = ours.encode(text)
    assert list(got.encode(text)) == ids
    assert got.encode_tf(tf.constant(text)).numpy().tolist() == ids
    assert got.decode([*ids, 1]) == text
    assert got.decode_tf(tf.constant(ids)).numpy().decode().strip() == text
  assert got == vocabulary.of_checkpoint(str(folder))
  assert got.eos_id == 1
  assert preprocessors._num_sentinels(got) == {'json': 3, 'bytes': 256}.get(write, 100)


def test_a_file_of_another_name(tmp_path):
  folder = made.write_sentencepiece(tmp_path)
  file = (folder / 'spiece.model').rename(folder / 'cc_all.model')
  assert tokenizer.load(file).size == made.PIECES + 100


def test_the_extra_ids_of_mt5_are_pieces(tmp_path):
  """Where the last pieces are extra ids already, none are added."""
  from sentencepiece import sentencepiece_model_pb2

  folder = made.write_sentencepiece(tmp_path)
  file = folder / 'spiece.model'
  proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
  for i in (1, 0):
    proto.pieces.add(piece=f'▁<extra_id_{i}>', score=0.0, type=4)
  file.write_bytes(proto.SerializeToString())
  assert tokenizer.load(folder).size == made.PIECES + 2
  (folder / 'checkpoint').write_bytes(b'')
  assert preprocessors._num_sentinels(vocabulary.of_checkpoint(str(folder))) == 2


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    (None, b'', 'has no tokenizer: expected spiece.model, tokenizer.json, or'),
    ('spiece.model', b'abc', 'spiece.model is damaged: '),
    ('tokenizer.json', b'{', 'tokenizer.json is damaged: '),
    ('tokenizer_config.json', b'{', 'tokenizer_config.json is truncated or damaged'),
    ('tokenizer_config.json', b'{"extra_ids": 3}', 'has no tokenizer'),
  ],
)
def test_bad_files(name, content, message, tmp_path):
  pytest.importorskip('tokenizers')
  if name:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(BadInput, match=re.escape(message)) as error:
    tokenizer.load(tmp_path)
  assert str(tmp_path) in str(error.value)


def test_extra_ids_that_are_no_number(tmp_path):
  folder = made.write_sentencepiece(tmp_path, 'many')
  with pytest.raises(BadInput, match="has extra_ids 'many'"):
    tokenizer.load(folder)
