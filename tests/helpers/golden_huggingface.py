"""What make_golden_huggingface.py recorded of transformers: folders, logits, tokens."""

import json
import pathlib

import numpy as np
from safetensors import numpy as safetensors

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'huggingface.npz')
CASES = sorted(name.removesuffix('/logits') for name in GOLDEN if 'logits' in name)


def write(folder, case, dtype=np.float32, **changes):
  """Writes the folder that transformers wrote, with other values in config.json."""
  facts, values = json.loads(str(GOLDEN[f'{case}/facts'])), GOLDEN[f'{case}/weights']
  tensors, start = {}, 0
  for name, shape in facts['shapes'].items():
    end = start + int(np.prod(shape))
    tensors[name] = values[start:end].reshape(shape).astype(dtype)
    start = end
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(facts['config'] | changes))
  safetensors.save_file(tensors, folder / 'model.safetensors')
  return folder
