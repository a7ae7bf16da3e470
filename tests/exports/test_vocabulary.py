"""Tokens by id, of each kind of tokenizer."""

import json
import sys
import types

import pytest
import sentencepiece
from etils import epath

from gqa_t5x.errors import BadInput
from gqa_t5x.exports import vocabulary
from helpers import exports

PIECES = ['<pad>', '</s>', '<unk>', '▁a', 'b', '▁c']


def read(folder, size, given=None):
  architecture = types.SimpleNamespace(vocab_size=size)
  source = types.SimpleNamespace(folder=epath.Path(folder), architecture=architecture)
  return vocabulary.read_tokens(source, given)


@pytest.mark.parametrize(('given', 'extra_ids'), [(None, 100), (4, 4)])
def test_sentencepiece(given, extra_ids, tmp_path):
  exports.write_spiece(tmp_path, given)
  tokens = read(tmp_path, 128)
  pieces = sentencepiece.SentencePieceProcessor(model_proto=exports.spiece())
  n = len(pieces)
  assert tokens[:3] == ['<pad>', '</s>', '<unk>']
  assert tokens[:n] == [pieces.id_to_piece(i) for i in range(n)]
  assert tokens[n] == f'<extra_id_{extra_ids - 1}>'
  assert tokens[n + extra_ids - 1] == '<extra_id_0>'
  assert tokens[n + extra_ids :] == [f'<unused_{i}>' for i in range(n + extra_ids, 128)]


def test_tokenizers_with_added_tokens(tmp_path):
  """Which may be beyond those of the model, with a gap."""
  content = {
    'model': {'type': 'Unigram', 'vocab': [[piece, -1.0] for piece in PIECES]},
    'added_tokens': [{'id': 0, 'content': '<pad>'}, {'id': 7, 'content': '<new>'}],
  }
  (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
  assert read(tmp_path, 9) == [*PIECES, '<unused_6>', '<new>', '<unused_8>']


def test_bytes(tmp_path):
  config = {'tokenizer_class': 'ByT5Tokenizer'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  tokens = read(tmp_path, 384)
  assert tokens[:3] == ['<pad>', '</s>', '<unk>']
  assert tokens[ord('a') + 3] == 'a'
  assert len(set(tokens)) == 384


def test_a_file_that_is_given_goes_first(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{')
  (tmp_path / 'my.model').write_bytes(exports.spiece())
  assert '▁' in read(tmp_path, 200, tmp_path / 'my.model')


@pytest.mark.parametrize(
  ('name', 'text', 'said'),
  [
    ('tokenizer.json', '{', 'tokenizer.json is truncated or damaged'),
    ('tokenizer.json', '{"model": {}}', 'tokenizer.json is truncated or damaged'),
    (
      'tokenizer.json',
      '{"model": {"type": "BPE", "vocab": {}}, "added_tokens": []}',
      "is of type BPE; T5's is Unigram",
    ),
    ('spiece.model', 'no model', 'spiece.model is no model of SentencePiece'),
  ],
)
def test_damage(name, text, said, tmp_path):
  (tmp_path / name).write_text(text)
  with pytest.raises(BadInput, match=said):
    read(tmp_path, 50)


def test_more_tokens_than_rows(tmp_path):
  exports.write_spiece(tmp_path)
  with pytest.raises(BadInput, match='but the model has 50 rows of its embedding'):
    read(tmp_path, 50)


def test_without_sentencepiece(tmp_path, monkeypatch):
  exports.write_spiece(tmp_path)
  monkeypatch.setitem(sys.modules, 'sentencepiece', None)
  with pytest.raises(BadInput, match=r'needs the package sentencepiece: pip install'):
    read(tmp_path, 200)
