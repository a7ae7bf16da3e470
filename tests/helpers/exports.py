"""What the tests of exports share: checkpoints of the small model, and the command."""

import functools
import io
import json
import pathlib
import re
import textwrap

import numpy as np
import pytest
from etils import epath

from gqa_t5x import export
from gqa_t5x.checkpoints import config
from gqa_t5x.decoding import sampling
from gqa_t5x.decoding.generate import generate
from gqa_t5x.errors import BadInput
from gqa_t5x.exports import run
from gqa_t5x.model import network
from helpers import model_oracle, trees

DOCS = pathlib.Path(__file__).parents[2] / 'docs' / 'export.md'
STEP = 5
T5_1_0 = dict(mlp_activations=('relu',), logits_via_embedding=True)
# Name -> fields of a `network.T5Config` of what differs from T5 1.1.
FAMILY = {
  't5_1_1': {},
  't5_1_0': T5_1_0,
  'umt5': dict(relpos_per_layer=True, num_encoder_layers=2),
  'byt5': dict(vocab_size=384, num_encoder_layers=2, num_decoder_layers=1),
  'silu': dict(mlp_activations=('silu', 'linear')),
  'numbers': dict(
    relpos_num_buckets=12, relpos_max_distance=10, layer_norm_epsilon=0.05
  ),
}
# Other tokens than T5's.
TOKENS = dict(decoder_start_token_id=3, eos_token_id=7)


def checkpoint(folder: pathlib.Path, cfg, **model_config) -> pathlib.Path:
  """Writes the model of a configuration as a run of T5X would, and returns the run.

  Args:
    folder: to make.
    cfg: a `network.T5Config`.
    **model_config: of `config.ModelConfig`, what `cfg` does not say.
  """
  state = {'step': np.asarray(STEP, np.int32)}
  tree = {'target': model_oracle.params(cfg), 'state': state}
  made = trees.write_t5x(folder / f'checkpoint_{STEP}', tree)
  names = ('relpos_num_buckets', 'relpos_max_distance', 'layer_norm_epsilon')
  values = {name: getattr(cfg, name) for name in names} | model_config
  own = cfg.mlp_activations[0]
  values['mlp_activation'] = None if own in ('gelu', 'relu') else own
  config.write(epath.Path(made), config.ModelConfig(**values))
  return folder


def write_tokenizer(folder: pathlib.Path, tokens) -> pathlib.Path:
  """Writes a tokenizer.json of these tokens."""
  content = {
    'model': {'type': 'Unigram', 'vocab': [[token, 0.0] for token in tokens[3:]]},
    'added_tokens': [{'id': i, 'content': token} for i, token in enumerate(tokens[:3])],
  }
  # The first three are in both, as in T5's.
  content['model']['vocab'][:0] = [[token, 0.0] for token in tokens[:3]]
  file = folder / 'tokenizer.json'
  file.write_text(json.dumps(content))
  return file


@functools.cache
def spiece() -> bytes:
  """A SentencePiece model of a dozen pieces, with T5's special tokens."""
  import sentencepiece

  written = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['a b c ab bc ca'] * 4),
    model_writer=written,
    vocab_size=12,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return written.getvalue()


def write_spiece(folder: pathlib.Path, extra_ids: int | None = None) -> None:
  """Writes it as Hugging Face does."""
  (folder / 'spiece.model').write_bytes(spiece())
  if extra_ids is not None:
    text = json.dumps({'extra_ids': extra_ids})
    (folder / 'tokenizer_config.json').write_text(text)


def code_in_docs(name: str) -> str:
  """Returns the one code block of docs/export.md that has a name in it."""
  blocks = re.findall(r'(?:^    .*\n|^\n(?=    ))+', DOCS.read_text(), re.MULTILINE)
  (code,) = [block for block in blocks if name in block]
  return textwrap.dedent(code)


def command(source, output, format, *flags) -> None:
  """Runs `python -m gqa_t5x.export` in this process."""
  given = (f'--input={source}', f'--output={output}', f'--format={format}', *flags)
  assert export.main(['export', *given]) == 0


def refused(source, output, format, **options) -> str:
  """Returns what an export says that must fail, and leaves nothing behind."""
  parent = pathlib.Path(output).parent
  before = sorted(parent.iterdir())
  with pytest.raises(BadInput) as error:
    run.export(source, output, format, **options)
  assert sorted(parent.iterdir()) == before
  assert '\n' not in str(error.value)
  return str(error.value)


def inputs(*lengths: int) -> np.ndarray:
  """Random tokens that are neither padding nor an end, padded to int32 `[B, S]`."""
  rng = np.random.default_rng(0)
  tokens = np.zeros((len(lengths), max(lengths)), np.int32)
  for row, length in zip(tokens, lengths, strict=True):
    row[:length] = rng.integers(8, model_oracle.V, length)
  return tokens


@functools.cache
def _greedy(cfg):
  module = network.Transformer(cfg)
  return model_oracle.jit(
    functools.partial(generate, module, decode_fn=sampling.greedy)
  )


def greedy(cfg, tokens_BS, length, *, start=0, eos=1):
  """Our decoder: tokens `[B, T]`, 0 after the end, and log-probabilities `[B]`."""
  prompts = np.zeros((len(tokens_BS), length), np.int32)
  prompts[:, 0] = start
  tokens, scores = _greedy(cfg)(
    params=model_oracle.params(cfg),
    encoder_input_tokens=tokens_BS,
    prompts=prompts,
    eos_id=eos,
  )
  return np.asarray(tokens)[:, 0], np.asarray(scores)[:, 0]
