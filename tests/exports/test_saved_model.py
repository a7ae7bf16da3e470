"""T5X's own export, and its InteractiveModel: texts to texts and scores."""

import importlib.util
import json
import re

import jax
import numpy as np
import pytest

from gqa_t5x.model import network
from helpers import commands, exports, model_oracle, tiny_task

TEXTS = ['red green blue', 'pink', 'gold ' * 9]  # The last one is cut.
LENGTHS = {'inputs': 24, 'targets': 8}
FILES = ('tiny.gin', 'gin/runs/export.gin')
MACROS = {
  'NUM_KV_HEADS': 2,
  'CHECKPOINT_PATH': f'run/checkpoint_{exports.STEP}',
  'SAVED_MODEL_DIR': 'out/1',
  'TASK_FEATURE_LENGTHS': LENGTHS,
  'BATCH_SIZE': 4,
}
CALL = """
import json, sys
import tensorflow as tf
call = tf.saved_model.load('out/1').signatures['serving_default']
out = call(text_batch=tf.constant(json.loads(sys.argv[1])))
texts = [text.decode() for text in out['output_0'].numpy()]
print(json.dumps([texts, out['output_1'].numpy().tolist()]))
"""

google = pytest.mark.skipif(
  not all(map(importlib.util.find_spec, ('t5x.export_lib', 'tensorflow_serving'))),
  reason="needs Google's T5X",
)


def cfg():
  """The model of `commands.TINY_GIN`."""
  return network.config(
    'tiny', vocab_size=384, num_kv_heads=2, num_encoder_layers=1, num_decoder_layers=2
  )


def expected():
  """Our greedy texts of TEXTS, and their scores."""
  inputs = np.zeros((len(TEXTS), LENGTHS['inputs']), np.int32)
  for row, text in zip(inputs, TEXTS, strict=True):
    ids = [*tiny_task.vocabulary().encode(text)[: len(row) - 1], 1]
    row[: len(ids)] = ids
  tokens, scores = exports.greedy(cfg(), inputs, LENGTHS['targets'])
  return [tiny_task.vocabulary().decode(row.tolist()) for row in tokens], scores


def export(folder, **changes):
  commands.write_gin(folder)
  exports.checkpoint(folder / 'run', cfg())
  words = commands.engine_args('t5x.export', FILES, **MACROS | changes)
  return commands.run(folder, *words)


@google
@pytest.mark.slow
def test_a_saved_model_takes_and_gives_texts(tmp_path):
  done = export(tmp_path)
  assert done.returncode == 0, done.stdout[-3000:]
  texts = json.dumps([*TEXTS, ''])  # Batches are filled up.
  done = commands.run(tmp_path, '-c', CALL, texts)
  got, scores = json.loads(done.stdout.splitlines()[-1])
  texts, log_probs = expected()
  # Of bytes that are no UTF-8, TensorFlow leaves none, and we leave a mark.
  plain = [text.encode('ascii', 'ignore').decode() for text in texts]
  assert [text.encode('ascii', 'ignore').decode() for text in got[:3]] == plain
  np.testing.assert_allclose(scores[:3], log_probs, atol=1e-3)
  # Again, where there is one.
  done = export_again(tmp_path)
  assert 'out/1 exists already; choose another, or delete it' in done.stdout


def export_again(folder):
  return commands.run(folder, *commands.engine_args('t5x.export', FILES, **MACROS))


@google
@pytest.mark.slow
def test_the_size_of_a_batch_is_fixed(tmp_path):
  done = export(tmp_path, BATCH_SIZE=None)
  assert done.returncode != 0
  assert 'cannot be decoded; set BATCH_SIZE to a number' in done.stdout
  assert not (tmp_path / 'out').exists()


MADE = """
from gqa_t5x.model import network
from helpers import tiny_task

config = network.config('tiny', vocab_size=384, num_kv_heads=2, **LAYERS)
vocabulary = tiny_task.vocabulary()
checkpoint = 'run/checkpoint_5'
"""


FOUND = """
import json

(_, log_prob), _ = t5.score([{'input': 'red', 'target': 'blue'}] * 2)
found = [text.decode() for _, text in predictions], aux['scores'], log_prob
print('found', json.dumps(found, default=lambda x: x.tolist()))
"""


@google
@pytest.mark.slow
def test_interactive_model_as_in_the_docs(tmp_path):
  exports.checkpoint(tmp_path / 'run', cfg())
  code = exports.code_in_docs('InteractiveModel(')
  made = f'LAYERS = dict(num_encoder_layers=1, num_decoder_layers=2)\n{MADE}'
  code, count = re.subn(r'(?s)\nconfig = .*?\n\n', f'\n{made}\n', code)
  assert count == 1
  code = code.replace("'summarize: ...', 'summarize: ...'", "'red green blue', 'pink'")
  code += FOUND
  done = commands.run(tmp_path, '-c', code)
  assert done.returncode == 0, done.stdout[-3000:]
  inputs = np.zeros((2, 128), np.int32)
  for row, text in zip(inputs, TEXTS, strict=False):
    ids = [*tiny_task.vocabulary().encode(text), 1]
    row[: len(ids)] = ids
  tokens, scores = exports.greedy(cfg(), inputs, 32)
  texts = [tiny_task.vocabulary().decode(row.tolist()) for row in tokens]
  (line,) = re.findall(r'^found (.*)$', done.stdout, re.MULTILINE)
  got, got_scores, got_log_prob = json.loads(line)
  assert got == texts
  np.testing.assert_allclose(got_scores, scores, atol=1e-3)
  assert got_log_prob == pytest.approx(log_prob_of_blue(), abs=1e-3)


def log_prob_of_blue():
  """Of the target "blue", given "red", by our forward pass."""
  vocabulary = tiny_task.vocabulary()
  inputs, targets = ([*vocabulary.encode(text), 1] for text in ('red', 'blue'))
  logits_TV = network.Transformer(cfg()).apply(
    {'params': model_oracle.params(cfg())},
    np.array([inputs]),
    np.array([[0, *targets[:-1]]]),
    np.array([targets]),
    enable_dropout=False,
  )[0]
  log_probs_TV = jax.nn.log_softmax(logits_TV)
  return float(log_probs_TV[np.arange(len(targets)), np.array(targets)].sum())


@pytest.mark.skipif(
  importlib.util.find_spec('t5x.export_lib') is not None, reason='of the stand-in'
)
def test_the_stand_in_says_what_is_needed(tmp_path):
  done = commands.run(tmp_path, '-m', 't5x.export', '--gin_file=x.gin')
  assert done.returncode == 1
  assert done.stdout.splitlines()[-1] == (
    "error: t5x.export is of Google's T5X alone: make setup ENGINE=t5x"
  )
