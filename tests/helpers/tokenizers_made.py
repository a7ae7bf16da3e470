"""Tokenizers as public checkpoints have them, made small."""

import io
import json

import sentencepiece

TEXTS = ['the cat sat on the mat', 'a dog ate the cat', 'on a mat sat a dog'] * 4
PIECES = 20


def write_sentencepiece(folder, extra_ids=None):
  """Writes spiece.model with T5's ids 0 to 2, and says how many extra ids there are."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS),
    model_writer=model,
    vocab_size=PIECES,
    hard_vocab_limit=False,
    minloglevel=2,
    **{'pad_id': 0, 'eos_id': 1, 'unk_id': 2, 'bos_id': -1},
  )
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'spiece.model').write_bytes(model.getvalue())
  if extra_ids is not None:
    config = {'tokenizer_class': 'T5Tokenizer', 'extra_ids': extra_ids}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


def write_bytes(folder):
  """Says that the tokenizer is ByT5's: there is no other file."""
  folder.mkdir(parents=True, exist_ok=True)
  config = {'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': 125}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


def write_json(folder):
  """Writes tokenizer.json: words, after T5's ids 0 to 2, then three sentinels."""
  import tokenizers

  words = sorted({word for text in TEXTS for word in text.split()})
  ids = {w: i for i, w in enumerate(['<pad>', '</s>', '<unk>', *words])}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token='<unk>'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens([f'<extra_id_{i}>' for i in (2, 1, 0)])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='$A </s>', special_tokens=[('</s>', 1)]
  )
  made.enable_truncation(2)
  folder.mkdir(parents=True, exist_ok=True)
  made.save(str(folder / 'tokenizer.json'))
  return folder
