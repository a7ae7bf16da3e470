"""CTranslate2 decodes an exported model as we do, and without us."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from helpers import exports, model_oracle
from helpers.model_oracle import N, V

ctranslate2 = pytest.importorskip('ctranslate2')

# Beyond 128, the distance from which on positions share a bucket.
INPUTS = exports.inputs(3, 150, 40, 17)
CASES = {
  'MQA': dict(num_kv_heads=1),
  'GQA': dict(num_kv_heads=2),
  'MHA': dict(num_kv_heads=N),
  'kinds': dict(
    encoder_num_kv_heads=2,
    self_attention_num_kv_heads=1,
    cross_attention_num_kv_heads=N,
  ),
  **{name: dict(num_kv_heads=2, **sizes) for name, sizes in exports.FAMILY.items()},
}


def translate(folder, inputs, length, tokens=str, **options):
  """Greedy tokens and scores of CTranslate2, an end included."""
  translator = ctranslate2.Translator(str(folder), intra_threads=1, **options)
  rows = [[tokens(token) for token in row if token] for row in inputs]
  return translator.translate_batch(
    rows,
    beam_size=1,
    max_decoding_length=length,
    min_decoding_length=0,  # 1 by default: no output is empty.
    length_penalty=0,
    return_scores=True,
    return_end_token=True,
  )


def until_end(row, eos=1):
  """The tokens of a row, without the zeros behind its end."""
  ends = np.flatnonzero(row == eos)
  return row[: ends[0] + 1] if len(ends) else row


@pytest.mark.parametrize('case', CASES)
def test_it_decodes_as_we_do(case, tmp_path):
  cfg = model_oracle.config(**CASES[case])
  tokens = exports.TOKENS if case == 'numbers' else {}
  source = exports.checkpoint(tmp_path / 'run', cfg, **tokens)
  exports.command(source, tmp_path / 'out', 'ctranslate2')
  got = translate(tmp_path / 'out', INPUTS, 24)
  start, eos = tokens.values() if tokens else (0, 1)
  expected, scores = exports.greedy(cfg, INPUTS, 24, start=start, eos=eos)
  for one, row, score in zip(got, expected, scores, strict=True):
    assert one.hypotheses[0] == [str(token) for token in until_end(row, eos)]
    assert one.scores[0] == pytest.approx(score, abs=1e-4)


def test_it_keeps_the_few_heads(tmp_path):
  size = {}
  for num_kv_heads in (1, N):
    cfg = model_oracle.config(num_kv_heads)
    source = exports.checkpoint(tmp_path / f'{num_kv_heads}', cfg)
    exports.command(source, tmp_path / f'out_{num_kv_heads}', 'ctranslate2')
    size[num_kv_heads] = (tmp_path / f'out_{num_kv_heads}' / 'model.bin').stat().st_size
  layers, D, H = model_oracle.DECODER_LAYERS, model_oracle.D, model_oracle.H
  assert size[N] - size[1] == layers * 2 * 2 * (N - 1) * D * H * 4


def test_int8_is_small_and_near(tmp_path):
  cfg = model_oracle.config(2)
  source = exports.checkpoint(tmp_path / 'run', cfg)
  exports.command(source, tmp_path / 'whole', 'ctranslate2')
  exports.command(source, tmp_path / 'int8', 'ctranslate2', '--quantization=int8')
  size = {n: (tmp_path / n / 'model.bin').stat().st_size for n in ('whole', 'int8')}
  assert size['int8'] < 0.5 * size['whole']
  scores = {}
  for name in ('whole', 'int8'):
    # The arithmetic of int8 differs from processor to processor.
    translator = ctranslate2.Translator(
      str(tmp_path / name), intra_threads=1, compute_type='float32'
    )
    pairs = [[[str(t) for t in x] for x in pair] for pair in model_oracle.examples()]
    found = translator.score_batch(*zip(*pairs, strict=True))
    scores[name] = np.concatenate([one.log_probs for one in found])
  assert 0 < np.abs(scores['int8'] - scores['whole']).max() < 0.2


@pytest.mark.parametrize('place', ['in the folder', 'given'])
def test_tokens_are_those_of_the_tokenizer(place, tmp_path):
  cfg = model_oracle.config(2)
  source = exports.checkpoint(tmp_path / 'run', cfg)
  words = ['<pad>', '</s>', '<unk>', *(f'word{i}' for i in range(3, V - 2))]
  if place == 'given':
    flags = [f'--vocabulary={exports.write_tokenizer(tmp_path, words)}']
  else:
    exports.write_tokenizer(source, words)  # The run's, for all its checkpoints.
    flags = []
  exports.command(source, tmp_path / 'out', 'ctranslate2', *flags)
  names = [*words, f'<unused_{V - 2}>', f'<unused_{V - 1}>']
  got = translate(tmp_path / 'out', INPUTS, 8, tokens=names.__getitem__)
  expected, _ = exports.greedy(cfg, INPUTS, 8)
  for one, row in zip(got, expected, strict=True):
    assert one.hypotheses[0] == [names[token] for token in until_end(row)]


def test_the_lines_in_the_docs(tmp_path, monkeypatch, capsys):
  cfg = model_oracle.config(2)
  source = exports.checkpoint(tmp_path / 'run', cfg)
  exports.write_spiece(source, extra_ids=4)
  exports.command(source, tmp_path / 'gqa4_ct2', 'ctranslate2')
  exports.write_spiece(tmp_path)
  monkeypatch.chdir(tmp_path)
  found = {}
  exec(exports.code_in_docs('translate_batch('), found)
  (tokens,) = found['inputs']
  ids = [*map(found['pieces'].piece_to_id, tokens[:-1]), 1]
  expected, _ = exports.greedy(cfg, np.array([ids], np.int32), 12)
  names = json.loads((tmp_path / 'gqa4_ct2' / 'shared_vocabulary.json').read_text())
  said = found['outputs'][0].hypotheses[0]
  assert said[:12] == [names[token] for token in expected[0]]
  assert capsys.readouterr().out.endswith(f' {found["outputs"][0].scores[0]}\n')


def test_tokens_without_a_tokenizer_are_ids(tmp_path, capsys):
  source = exports.checkpoint(tmp_path / 'run', model_oracle.config(2))
  exports.command(source, tmp_path / 'out', 'ctranslate2')
  assert 'tokens are ids, as text' in capsys.readouterr().out


def test_unknown_quantization(tmp_path):
  source = exports.checkpoint(tmp_path / 'run', model_oracle.config(2))
  said = exports.refused(source, tmp_path / 'out', 'ctranslate2', quantization='int4')
  assert said.startswith('--quantization=int4 is unknown; choose one of float32, ')


def test_bfloat16_needs_torch(tmp_path, monkeypatch):
  find = importlib.util.find_spec
  hidden = lambda name: None if name == 'torch' else find(name)  # noqa: E731
  monkeypatch.setattr(importlib.util, 'find_spec', hidden)
  source = exports.checkpoint(tmp_path / 'run', model_oracle.config(2))
  options = {'quantization': 'int8_bfloat16'}
  said = exports.refused(source, tmp_path / 'out', 'ctranslate2', **options)
  assert said.endswith("needs the package torch: pip install 'gqa_t5x[torch]'")


HIDDEN = """
import sys
sys.modules['ctranslate2'] = None
sys.path.insert(0, {root!r})
import gqa_t5x.export
sys.exit(gqa_t5x.export.main(['export', *{flags}]))
"""


def test_without_the_package(tmp_path):
  """The command can be imported without it, and names the extra."""
  source = exports.checkpoint(tmp_path / 'run', model_oracle.config(2))
  flags = [f'--input={source}', f'--output={tmp_path / "out"}', '--format=ctranslate2']
  root = str(pathlib.Path(__file__).parents[2])
  done = subprocess.run(
    [sys.executable, '-c', HIDDEN.format(root=root, flags=flags)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert (
    "needs the package ctranslate2: pip install 'gqa_t5x[ctranslate2]'"
    in (done.stderr.splitlines()[-1])
  )
  assert not (tmp_path / 'out').exists()
