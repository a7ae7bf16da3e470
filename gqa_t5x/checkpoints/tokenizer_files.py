"""The files of a tokenizer, which lie beside a model's weights and travel with them.

  spiece.model            SentencePiece
  tokenizer.json          Hugging Face's library tokenizers
  tokenizer_config.json   how many extra ids there are, or that it is of bytes

Those of a run are in its MODEL_DIR, for all its checkpoints.
"""

from etils import epath

from gqa_t5x.checkpoints import folders

SENTENCEPIECE = 'spiece.model'
TOKENIZERS = 'tokenizer.json'
CONFIG = 'tokenizer_config.json'
_OTHERS = ('special_tokens_map.json', 'added_tokens.json')
NAMES = (SENTENCEPIECE, TOKENIZERS, CONFIG, *_OTHERS)


def find(folder: epath.Path) -> epath.Path | None:
  """Finds the folder that holds a checkpoint's tokenizer: its own, or its run's."""
  is_of_run = folders.checkpoint_step(folder) is not None
  for place in (folder, folder.parent) if is_of_run else (folder,):
    if any((place / name).exists() for name in (SENTENCEPIECE, TOKENIZERS, CONFIG)):
      return place
  return None


def copy(source: epath.Path, target: epath.Path) -> None:
  """Copies the files of a checkpoint's tokenizer, if any; or a file of any name."""
  if source.exists() and not source.is_dir():
    name = TOKENIZERS if source.suffix == '.json' else SENTENCEPIECE
    (target / name).write_bytes(source.read_bytes())
    return
  folder = find(source)
  for name in NAMES:
    if folder is not None and (folder / name).exists():
      (target / name).write_bytes((folder / name).read_bytes())
