"""Writes tests/golden/huggingface.npz: what transformers computes of small T5s.

  pip install transformers==5.24.0 torch
  python tests/helpers/make_golden_huggingface.py

The tests need neither. Of each case: config.json and the tensors of model.safetensors
as `save_pretrained` writes them, and the logits of the model that is loaded from there.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

PATH = pathlib.Path(__file__).parents[1] / 'golden' / 'huggingface.npz'
SIZE = {
  'vocab_size': 32,
  'd_model': 8,
  'd_kv': 4,
  'd_ff': 16,
  'num_layers': 1,
  'num_decoder_layers': 2,
  'num_heads': 2,
  'decoder_start_token_id': 0,
}
OTHER_NUMBERS = {
  'relative_attention_max_distance': 20,
  'relative_attention_num_buckets': 8,
  'layer_norm_epsilon': 0.3,
}
V1_1 = {'feed_forward_proj': 'gated-gelu'}
BYT5 = {'vocab_size': 384, 'num_layers': 2, 'num_decoder_layers': 1}
UNSCALED = V1_1 | {'tie_word_embeddings': False}
# Name -> kind of model, its configuration, whether it has an output projection.
CASES = {
  'other_numbers': ('T5', UNSCALED | OTHER_NUMBERS, False),
  'tied': ('T5', UNSCALED, False),
  'tied_and_scaled': ('T5', V1_1, False),
  'mt5_tied': ('MT5', {}, False),
  'mt5': ('MT5', {}, True),
  't5_1_0': ('T5', {}, False),
  't5_1_0_untied': ('T5', {'tie_word_embeddings': False}, True),
  'gated_silu': ('T5', {'feed_forward_proj': 'gated-silu'}, True),
  'silu': ('T5', {'feed_forward_proj': 'silu'}, False),
  'umt5': ('UMT5', {'num_layers': 2, 'tie_word_embeddings': False}, True),
  'umt5_tied': ('UMT5', {'num_layers': 2}, False),
  'byt5': ('T5', UNSCALED | BYT5, True),
}


def tokens(rng, length, rows=2):
  return rng.integers(1, SIZE['vocab_size'], (rows, length)).astype(np.int32)


def random_model(kind, config, has_projection, scale=0.6):
  make = getattr(transformers, f'{kind}ForConditionalGeneration')
  model = make(getattr(transformers, f'{kind}Config')(**SIZE | config))
  torch.manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape)
      parameter.copy_(1 + 0.2 * noise if 'layer_norm' in name else scale * noise)
    if has_projection:
      shape = model.shared.weight.shape
      model.lm_head.weight = torch.nn.Parameter(scale * torch.randn(shape))
  return model


def greedy(model, batch):
  """At most twelve tokens of each input, int [2, 12]; 0 after the end marker."""
  batch = {name: batch[name] for name in ('input_ids', 'attention_mask')}
  options = {'max_new_tokens': 12, 'do_sample': False, 'use_cache': False}
  tokens = model.eval().generate(**batch, **options).numpy()[:, 1:]
  return np.pad(tokens, ((0, 0), (0, 12 - tokens.shape[1])))


def main():
  rng = np.random.default_rng(0)
  inputs, targets = tokens(rng, 40), tokens(rng, 30)
  inputs[1, 25:], targets[:, 0] = 0, 0
  found = {'inputs': inputs, 'decoder_inputs': targets}
  batch = {
    'input_ids': torch.tensor(inputs),
    'attention_mask': torch.tensor(inputs > 0),
    'decoder_input_ids': torch.tensor(targets),
  }
  for name, case in CASES.items():
    model = random_model(*case)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
      model.save_pretrained(folder)
      weights = load_file(f'{folder}/model.safetensors')
      logits = type(model).from_pretrained(folder).eval()(**batch).logits.numpy()
      config = pathlib.Path(folder, 'config.json').read_text()
    shapes = {tensor: list(w.shape) for tensor, w in weights.items()}
    facts = {'config': json.loads(config), 'shapes': shapes}
    found[f'{name}/facts'] = np.array(json.dumps(facts))
    found[f'{name}/weights'] = np.concatenate([w.ravel() for w in weights.values()])
    found[f'{name}/logits'] = logits
    found[f'{name}/greedy'] = greedy(model, batch)
  np.savez_compressed(PATH, **found)


if __name__ == '__main__':
  main()
