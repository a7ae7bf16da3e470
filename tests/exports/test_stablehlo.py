"""One program for three platforms, served in a process that has JAX alone."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from gqa_t5x.decoding import beam_search, generate
from gqa_t5x.exports import run, stablehlo
from gqa_t5x.model import network
from helpers import exports, model_oracle
from helpers.model_oracle import N

LENGTHS = dict(batch_size=3, input_length=9, output_length=8)
FLAGS = [f'--{name}={value}' for name, value in LENGTHS.items()]
INPUTS = exports.inputs(7, 9)  # One fewer than the batch.
SERVE = """
import sys
for name in ('gqa_t5x', 'flax', 't5x', 'seqio'):
  sys.modules[name] = None

{code}

inputs = {inputs}
tokens, scores = generate(inputs)
print(json.dumps([tokens.tolist(), scores.tolist()]))
"""


def served(folder):
  """What the program of docs/export.md returns for INPUTS."""
  code = exports.code_in_docs('deserialize')
  code = re.sub(
    r'^folder = .*$', f'folder = {str(folder) + "/"!r}', code, flags=re.MULTILINE
  )
  inputs = [[int(token) for token in row if token] for row in INPUTS]
  done = subprocess.run(
    [sys.executable, '-c', SERVE.format(code=code, inputs=inputs)],
    capture_output=True,
    text=True,
    check=False,
    cwd=folder,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return [np.array(x) for x in json.loads(done.stdout.splitlines()[-1])]


def call(folder, tokens_BS):
  """Runs an exported program here."""
  program = jax.export.deserialize((folder / 'model.stablehlo').read_bytes())
  params = dict(np.load(folder / 'params.npz'))
  return [np.asarray(x) for x in model_oracle.jit(program.call)(params, tokens_BS)]


FAMILY = exports.FAMILY | {'latent': dict(kv_head_dim=5)}


@pytest.mark.parametrize(
  ('num_kv_heads', 'family'),
  [(1, 't5_1_1'), (2, 't5_1_0'), (2, 'umt5'), (N, 'byt5'), (2, 'latent')],
)
def test_it_decodes_as_we_do(num_kv_heads, family, tmp_path):
  cfg = model_oracle.config(num_kv_heads, **FAMILY[family])
  source = exports.checkpoint(tmp_path / 'run', cfg)
  exports.command(source, tmp_path / 'out', 'stablehlo', *FLAGS)
  expected, scores = exports.greedy(cfg, INPUTS, 8)
  tokens, got = call(tmp_path / 'out', np.pad(INPUTS, ((0, 1), (0, 0))))
  np.testing.assert_array_equal(tokens[:2, -1], expected)
  np.testing.assert_allclose(got[:2, -1], scores, atol=1e-4)


def test_it_is_served_by_the_lines_in_the_docs(tmp_path):
  cfg = model_oracle.config(1)
  special = dict(decoder_start_token_id=3, eos_token_id=7)
  source = exports.checkpoint(tmp_path / 'run', cfg, **special)
  exports.command(source, tmp_path / 'out', 'stablehlo', *FLAGS)
  tokens, scores = served(tmp_path / 'out')
  expected, expected_scores = exports.greedy(cfg, INPUTS, 8, start=3, eos=7)
  np.testing.assert_array_equal(tokens, expected)
  np.testing.assert_allclose(scores, expected_scores, atol=1e-4)


def test_beam_search(tmp_path):
  cfg = model_oracle.config(2)
  source = exports.checkpoint(tmp_path / 'run', cfg)
  exports.command(source, tmp_path / 'out', 'stablehlo', *FLAGS, '--num_beams=2')
  tokens, scores = call(tmp_path / 'out', np.pad(INPUTS, ((0, 1), (0, 0))))
  expected = model_oracle.jit(
    lambda params: generate.generate(
      network.Transformer(cfg),
      params,
      INPUTS,
      np.zeros((2, 8), np.int32),
      beam_search.beam_search,
      eos_id=1,
      num_decodes=2,
    )
  )(model_oracle.params(cfg))
  np.testing.assert_array_equal(tokens[:2], expected[0])
  np.testing.assert_allclose(scores[:2], expected[1], atol=1e-4)
  assert not np.array_equal(tokens[0, 0], tokens[0, 1])


def test_bfloat16_is_half_of_the_bytes_and_served(tmp_path):
  cfg = model_oracle.config(2)
  source = exports.checkpoint(tmp_path / 'run', cfg)
  exports.command(source, tmp_path / 'whole', 'stablehlo', *FLAGS)
  exports.command(source, tmp_path / 'half', 'stablehlo', *FLAGS, '--dtype=bfloat16')
  size = {n: (tmp_path / n / 'params.npz').stat().st_size for n in ('whole', 'half')}
  assert size['half'] < 0.7 * size['whole']
  tokens, scores = served(tmp_path / 'half')
  assert tokens.shape == (2, 8)
  _, expected = exports.greedy(cfg, INPUTS, 8)
  np.testing.assert_allclose(scores, expected, atol=1.5)
  assert np.abs(scores - expected).max() > 1e-4


@pytest.mark.parametrize('name', [*LENGTHS, 'num_beams'])
def test_numbers_below_one(name, tmp_path):
  source = exports.checkpoint(tmp_path / 'run', model_oracle.config(2))
  said = exports.refused(source, tmp_path / 'out', 'stablehlo', **{name: 0})
  assert said == f'--{name}=0 must be at least 1'


def test_unknown_dtype(tmp_path):
  source = exports.checkpoint(tmp_path / 'run', model_oracle.config(2))
  with pytest.raises(
    run.BadInput, match='--dtype=int8 is unknown; choose one of float'
  ):
    run.export(source, tmp_path / 'out', 'stablehlo', dtype='int8')


@pytest.mark.parametrize(
  ('platform', 'loops', 'transposed'),
  [('cpu', 2, True), ('gpu', 2, False), ('tpu', 3, False)],
)
def test_each_platform_has_its_own_program(
  platform, loops, transposed, tmp_path, monkeypatch
):
  """A CPU reads transposed kernels; a TPU has one more loop, for pending keys.

  One loop is that of random numbers.
  """
  monkeypatch.setattr(stablehlo, 'PLATFORMS', {'cpu': platform})
  cfg = model_oracle.config(2)
  source = exports.checkpoint(tmp_path / 'run', cfg)
  exports.command(source, tmp_path / 'out', 'stablehlo', *FLAGS)
  folder = tmp_path / 'out'
  program = jax.export.deserialize((folder / 'model.stablehlo').read_bytes())
  text = program.mlir_module()
  assert text.count('stablehlo.while') == loops
  assert ('optimization_barrier' in text) == transposed
  tokens, scores = call(folder, np.pad(INPUTS, ((0, 1), (0, 0))))
  expected, expected_scores = exports.greedy(cfg, INPUTS, 8)
  np.testing.assert_array_equal(tokens[:2, -1], expected)
  np.testing.assert_allclose(scores[:2, -1], expected_scores, atol=1e-4)


def test_it_is_for_three_platforms(tmp_path):
  source = exports.checkpoint(tmp_path / 'run', model_oracle.config(2))
  exports.command(source, tmp_path / 'out', 'stablehlo', *FLAGS)
  data = (tmp_path / 'out' / 'model.stablehlo').read_bytes()
  assert jax.export.deserialize(data).platforms == ('cpu', 'cuda', 'tpu')


@pytest.mark.tpu
def test_it_compiles_for_a_tpu(tmp_path):
  """The program of a TPU is left alone: a loop in a loop, and nothing to choose."""
  from gqa_t5x.analysis.tpu import topology

  source = exports.checkpoint(tmp_path / 'run', model_oracle.config(2))
  exports.command(source, tmp_path / 'out', 'stablehlo', *FLAGS)
  program = jax.export.deserialize((tmp_path / 'out' / 'model.stablehlo').read_bytes())
  chip = jax.sharding.SingleDeviceSharding(topology.devices('v5e:1x1')[0])
  arguments = jax.tree.unflatten(
    program.in_tree,
    [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip) for x in program.in_avals],
  )
  text = jax.jit(program.call).lower(*arguments[0]).compile().as_text()
  assert len(re.findall(r' while\(', text)) == 2
  assert ' conditional(' not in text
