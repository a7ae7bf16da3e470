"""Hugging Face's T5 v1.1 folders, written by hand."""

import json

import numpy as np
import pytest
from etils import epath
from safetensors import numpy as safetensors

from gqa_t5x.checkpoints import folders
from gqa_t5x.errors import BadInput
from helpers.trees import D, F, H, N, V

NH = N * H
CONFIG = {
  'architectures': ['T5ForConditionalGeneration'],
  'model_type': 't5',
  'vocab_size': V,
  'd_model': D,
  'd_ff': F,
  'd_kv': H,
  'num_heads': N,
  'num_layers': 1,
  'num_decoder_layers': 2,
  'relative_attention_num_buckets': 32,
  'feed_forward_proj': 'gated-gelu',
  'is_gated_act': True,
  'tie_word_embeddings': False,
}
# Written by hand from transformers' T5ForConditionalGeneration: T5X's path, Hugging
# Face's name and shape. Matrices are transposed but for the embedding.
TOP = (
  ('token_embedder/embedding', 'shared.weight', (V, D)),
  ('decoder/logits_dense/kernel', 'lm_head.weight', (V, D)),
  (
    'encoder/relpos_bias/rel_embedding',
    'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
    (32, N),
  ),
  (
    'decoder/relpos_bias/rel_embedding',
    'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
    (32, N),
  ),
  ('encoder/encoder_norm/scale', 'encoder.final_layer_norm.weight', (D,)),
  ('decoder/decoder_norm/scale', 'decoder.final_layer_norm.weight', (D,)),
)
ENCODER = (
  ('pre_attention_layer_norm/scale', '0.layer_norm', (D,)),
  ('attention/query/kernel', '0.SelfAttention.q', (NH, D)),
  ('attention/key/kernel', '0.SelfAttention.k', (NH, D)),
  ('attention/value/kernel', '0.SelfAttention.v', (NH, D)),
  ('attention/out/kernel', '0.SelfAttention.o', (D, NH)),
  ('pre_mlp_layer_norm/scale', '1.layer_norm', (D,)),
  ('mlp/wi_0/kernel', '1.DenseReluDense.wi_0', (F, D)),
  ('mlp/wi_1/kernel', '1.DenseReluDense.wi_1', (F, D)),
  ('mlp/wo/kernel', '1.DenseReluDense.wo', (D, F)),
)
DECODER = (
  ('pre_self_attention_layer_norm/scale', '0.layer_norm', (D,)),
  ('self_attention/query/kernel', '0.SelfAttention.q', (NH, D)),
  ('self_attention/key/kernel', '0.SelfAttention.k', (NH, D)),
  ('self_attention/value/kernel', '0.SelfAttention.v', (NH, D)),
  ('self_attention/out/kernel', '0.SelfAttention.o', (D, NH)),
  ('pre_cross_attention_layer_norm/scale', '1.layer_norm', (D,)),
  ('encoder_decoder_attention/query/kernel', '1.EncDecAttention.q', (NH, D)),
  ('encoder_decoder_attention/key/kernel', '1.EncDecAttention.k', (NH, D)),
  ('encoder_decoder_attention/value/kernel', '1.EncDecAttention.v', (NH, D)),
  ('encoder_decoder_attention/out/kernel', '1.EncDecAttention.o', (D, NH)),
  ('pre_mlp_layer_norm/scale', '2.layer_norm', (D,)),
  ('mlp/wi_0/kernel', '2.DenseReluDense.wi_0', (F, D)),
  ('mlp/wi_1/kernel', '2.DenseReluDense.wi_1', (F, D)),
  ('mlp/wo/kernel', '2.DenseReluDense.wo', (D, F)),
)
TABLE = {path: (name, shape) for path, name, shape in TOP}
for stack, layers, rows in (('encoder', 1, ENCODER), ('decoder', 2, DECODER)):
  for i in range(layers):
    for path, name, shape in rows:
      there = f'{stack}.block.{i}.layer.{name}.weight'
      TABLE[f'{stack}/layers_{i}/{path}'] = (there, shape)


def weights(dtype=np.float32):
  """Random tensors under Hugging Face's names."""
  rng = np.random.default_rng(0)
  return {n: rng.normal(size=s).astype(dtype) for n, s in TABLE.values()}


def write(folder, tensors=None, **config):
  """One safetensors file; keys of the configuration set to None are left out."""
  folder.mkdir(parents=True)
  config = {k: v for k, v in {**CONFIG, **config}.items() if v is not None}
  (folder / 'config.json').write_text(json.dumps(config))
  tensors = weights() if tensors is None else tensors
  safetensors.save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
  return folder


def shard(folder, tensors, ending='safetensors', name='model'):
  """Turns the single file into three files and an index."""
  (folder / 'model.safetensors').unlink(missing_ok=True)
  names = [f'{name}-0000{i + 1}-of-00003.{ending}' for i in range(3)]
  index = {tensor: names[i % 3] for i, tensor in enumerate(tensors)}
  for file in names:
    part = {t: tensors[t] for t, place in index.items() if place == file}
    safetensors.save_file(part, folder / file)
  text = json.dumps({'metadata': {'total_size': 1}, 'weight_map': index})
  (folder / f'{name}.{ending}.index.json').write_text(text)
  return names


def opened(folder):
  return folders.open_checkpoint(folders.find_checkpoint(epath.Path(folder)))


def refused(folder):
  with pytest.raises(BadInput) as error:
    opened(folder)
  assert '\n' not in str(error.value)
  return str(error.value)
