"""Tokenizers, and a whole folder, as public checkpoints have them, made small."""

import io
import json
import pathlib

import numpy as np
import sentencepiece
from safetensors import numpy as safetensors

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


def write_flan(folder, num_heads):
  """A Hugging Face folder of T5 v1.1 with random weights, and its tokenizer."""
  folder = pathlib.Path(folder)
  tree_of = {'decoder': 2, 'encoder': 1}
  D, H, F, V, NH = 16, 4, 24, 128, 4 * num_heads
  shapes = {'shared.weight': (V, D), 'lm_head.weight': (V, D)}
  for stack, layers in tree_of.items():
    shapes[f'{stack}.final_layer_norm.weight'] = (D,)
    bias = f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    shapes[bias] = (32, num_heads)
    kinds = ['SelfAttention', 'EncDecAttention'][: 2 if stack == 'decoder' else 1]
    for i in range(layers):
      block = f'{stack}.block.{i}.layer'
      for j, kind in enumerate(kinds):
        shapes[f'{block}.{j}.layer_norm.weight'] = (D,)
        shapes |= {f'{block}.{j}.{kind}.{n}.weight': (NH, D) for n in 'qkv'}
        shapes[f'{block}.{j}.{kind}.o.weight'] = (D, NH)
      mlp = f'{block}.{len(kinds)}'
      shapes[f'{mlp}.layer_norm.weight'] = (D,)
      shapes |= {f'{mlp}.DenseReluDense.wi_{n}.weight': (F, D) for n in (0, 1)}
      shapes[f'{mlp}.DenseReluDense.wo.weight'] = (D, F)
  rng = np.random.default_rng(0)
  tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
  write_sentencepiece(folder)
  safetensors.save_file(tensors, folder / 'model.safetensors')
  config = {
    'model_type': 't5',
    'vocab_size': V,
    'd_model': D,
    'd_kv': H,
    'd_ff': F,
    'num_heads': num_heads,
    'num_layers': tree_of['encoder'],
    'num_decoder_layers': tree_of['decoder'],
    'feed_forward_proj': 'gated-gelu',
    'tie_word_embeddings': False,
  }
  (folder / 'config.json').write_text(json.dumps(config))
  return folder
