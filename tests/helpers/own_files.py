"""Texts and pairs as a user's files, and the tasks on them."""

import json
import pathlib

import seqio

from gqa_t5x.data.own import own_tasks
from helpers import tiny_task

WORDS = tiny_task.WORDS
TEXTS = [f'{i} {WORDS[i % 8]} is not {WORDS[i % 7]}' for i in range(300)]
PAIRS = [(text, text.split()[1]) for text in TEXTS]


def write_texts(path='a.jsonl', texts=TEXTS, key='text'):
  lines = [json.dumps({key: text}) for text in texts]
  pathlib.Path(path).write_text('\n'.join(lines))


def write_pairs(path='a.tsv', pairs=PAIRS):
  lines = ['inputs\ttargets', *('\t'.join(pair) for pair in pairs)]
  pathlib.Path(path).write_text('\n'.join(lines))


def text_task(files='*.jsonl', extra_ids=100, **changes) -> str:
  given = {'key': 'text', 'document': 'line', 'objective': 'span_corruption'}
  given |= {'validation_files': None, 'validation_share': 0.2, 'cache_dir': None}
  given |= {'vocabulary': tiny_task.vocabulary(extra_ids), 'unreadable': 'refuse'}
  return own_tasks.text_files(files, **given | changes)


def pair_task(train_files='*.tsv', **changes) -> str:
  given = {'input_key': 'inputs', 'target_key': 'targets', 'input_prefix': ''}
  given |= {'validation_files': None, 'validation_share': 0.2, 'cache_dir': None}
  given |= {'vocabulary': tiny_task.vocabulary(), 'unreadable': 'refuse'}
  given |= {'test_files': None, 'metric': None}
  return own_tasks.pairs(train_files, **given | changes)


def raw(name, split, shard=None) -> list[tuple[str, ...]]:
  source = seqio.TaskRegistry.get(name).source
  found = source.get_dataset(split, shuffle=False, shard_info=shard)
  return [tuple(x.decode() for x in e.values()) for e in found.as_numpy_iterator()]
