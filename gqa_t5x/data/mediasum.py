"""MediaSum as a TFDS dataset, from the two JSON files as they are published.

Their authors ask for research use only and publish them for download by hand, at
https://github.com/zcgzcgzcg1/MediaSum: `train_val_test_split.json` lies there in the
folder data, and data/README.md links to an archive that holds `news_dialogue.json`. Put
both into the folder of the datasets and convert them, once:

  python -m gqa_t5x.data.prepare mediasum --data_dir=FOLDER

TFDS's own builder of MediaSum needs Apache Beam and all of the 463,596 dialogues in
memory; this one reads them one after another.

Source: Zhu et al. (2021), "MediaSum", arXiv 2103.06410.
"""

import codecs
import functools
import json
import re
from collections.abc import Iterable, Iterator

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from gqa_t5x.errors import BadInput

DIALOGUES = 'news_dialogue.json'
SPLITS = 'train_val_test_split.json'
HOMEPAGE = 'https://github.com/zcgzcgzcg1/MediaSum'
# Our name of each split, and that of the published file.
_SPLIT_KEYS = {'train': 'train', 'validation': 'val', 'test': 'test'}
CHUNK_BYTES = 1 << 20
MAX_CHARS = 1 << 26  # of one dialogue; the longest have some hundred thousand
_BETWEEN = re.compile(r'[\s,]*')


class MediasumJson(tfds.core.GeneratorBasedBuilder):
  """Dialogues of radio and television with their summaries, split as published."""

  VERSION = tfds.core.Version('1.0.0')
  code_path = None  # TFDS looks next to it for checksums of downloads; there are none.

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    turns = tfds.features.Sequence({'speaker': text, 'utt': text})
    return tfds.core.DatasetInfo(
      builder=self,
      description='Interviews of NPR and CNN with summaries, for research only.',
      features=tfds.features.FeaturesDict(
        {'id': text, 'summary': text, 'turns': turns}
      ),
      homepage=HOMEPAGE,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    folder = epath.Path(self.data_dir).parent.parent  # of FOLDER/mediasum_json/1.0.0
    missing = [name for name in (DIALOGUES, SPLITS) if not (folder / name).exists()]
    if missing:
      raise BadInput(
        f'{folder} lacks {" and ".join(missing)}. MediaSum is downloaded by hand: put '
        f'{DIALOGUES} and {SPLITS} of {HOMEPAGE} (see data/README.md there) into that '
        'folder'
      )
    try:
      splits = json.loads((folder / SPLITS).read_bytes())
      ids = {split: set(splits[key]) for split, key in _SPLIT_KEYS.items()}
    except (ValueError, KeyError, TypeError) as error:
      raise BadInput(
        f'{folder / SPLITS} is not the published one, with a list of ids for each of '
        f'train, val and test ({error}); download it again from {HOMEPAGE}'
      ) from error
    return {
      split: self._generate_examples(folder / DIALOGUES, ids[split]) for split in ids
    }

  def _generate_examples(self, path: epath.Path, ids: set[str]):
    size = len(ids)
    for dialogue in read_array(path):
      key, example = _to_example(dialogue, path)
      if key in ids:
        ids.remove(key)
        yield key, example
    if ids:
      lack = (
        f'{path} lacks {len(ids)} of {size} dialogues of a split, {min(ids)} for one'
      )
      if len(ids) == size:
        raise BadInput(f'{lack}; {SPLITS} is of other data')
      logging.warning('%s', lack)


def _to_example(dialogue: dict, path: epath.Path) -> tuple[str, dict]:
  """Checks a dialogue as published and pairs each utterance with its speaker."""
  try:
    key, turns = dialogue['id'], {name: dialogue[name] for name in ('speaker', 'utt')}
    example = {'id': key, 'summary': dialogue['summary'], 'turns': turns}
  except (KeyError, TypeError) as error:
    raise BadInput(f'{path}: a dialogue lacks {error}') from error
  speakers, utterances = map(len, turns.values())
  if speakers != utterances:
    raise BadInput(f'{path}: {key} has {utterances} turns and {speakers} speakers')
  return key, example


def read_array(path: epath.Path) -> Iterator:
  """Yields the elements of a file's JSON array one after another, in little memory.

  Raises:
    BadInput: the file is damaged or cut short.
  """
  try:
    with path.open('rb') as file:
      chunks = iter(functools.partial(file.read, CHUNK_BYTES), b'')
      yield from _parse(codecs.iterdecode(chunks, 'utf-8'))
  except ValueError as error:
    raise BadInput(
      f'{path} is no whole JSON array ({error}); download or unpack it again'
    ) from error


def _parse(chunks: Iterable[str]) -> Iterator:
  """Yields the elements of the array whose text comes in chunks."""
  decoder = json.JSONDecoder()
  text, read, started = '', 0, False
  for chunk in chunks:
    text, read = (text + chunk).lstrip(), read + len(chunk)
    if text and not started:
      if text[0] != '[':
        break
      text, started = text[1:], True
    position = _BETWEEN.match(text).end()
    while position < len(text) and text[position] != ']':
      try:
        value, position = decoder.raw_decode(text, position)
      except json.JSONDecodeError:
        break  # the rest of it is in the next chunk
      yield value
      position = _BETWEEN.match(text, position).end()
    text = text[position:]
    if len(text) > MAX_CHARS:
      break
  if not started or text.strip() != ']':
    raise BadInput(f'damaged near character {read - len(text):,}')
