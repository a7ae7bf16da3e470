"""The command that compiles for TPUs, as far as it goes without their compiler."""

import os
import sys

import pytest

from gqa_t5x import tpu_compile
from gqa_t5x.analysis.tpu import json_rows, layout_search, row_text, topology
from gqa_t5x.analysis.tpu.chips import GIB
from gqa_t5x.errors import BadInput


def test_slices():
  assert topology.parse('v3:8x16') == ('v3', (8, 16))
  assert topology.parse('v5e:16x16') == ('v5e', (16, 16))
  assert topology.parse('v5p:16x16x24') == ('v5p', (16, 16, 24))


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ([], '--topology is missing; such as --topology=v4:2x2x2.'),
    (['--topology=v2:2x2'], "'v2' is unknown; choose one of v3, v4, v5e, v5p, v6e"),
    (['--topology=v4'], "'' is no shape in chips; write it as in v4:2x2x2."),
    (['--topology=v4:2x0x2'], "'2x0x2' is no shape in chips"),
    (['--topology=v5e:16x32'], '512 chips are more than a pod has, 256.'),
    (['--topology=v4:2x2x1'], 'decoding needs --size, and training a --gin_file'),
    (['--topology=v4:2x2x1', '--mode=train'], '--gin_file is missing'),
    (['--topology=v4:2x2x1', '--size=huge'], 'value should be one of <tiny|mini|'),
    (['--topology=v4:2x2x1', '--batch_size=0'], '0 is not a positive integer'),
    (['--kv_head_dim=0'], '0 is not a positive integer'),
    (['--num_beams=' + 30 * '9'], '9: must be at most 2147483647.'),
    (['--hlo=/'], "'/' is a folder; name a file."),
    (['--json=no/such/folder.json'], 'no/such/folder.json: there is no such folder.'),
  ],
)
def test_bad_input(capsys, args, message):
  assert tpu_compile.main(['tpu_compile', *args]) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert message in ' '.join(error.split())


def test_without_the_compiler(monkeypatch):
  def fail(*args, **kwargs):
    raise RuntimeError('JAX TPU support not installed; cannot generate TPU topology.')

  monkeypatch.setattr(topology.topologies, 'get_topology_desc', fail)
  with pytest.raises(BadInput, match=r"The TPU compiler is not installed;.*'jax\[tpu"):
    topology.devices('v4:2x2x1')


@pytest.mark.parametrize(
  ('message', 'expected'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.05G of 30.75G'
      ' hbm. Exceeded hbm capacity by 9.30G.',
      40.05 * GIB,
    ),
    (
      'the total memory required for HLO temporaries (768.00M) exceeds available HBM'
      ' (15.48G).',
      768 * 2**20,
    ),
    ('INTERNAL: something else', None),
  ],
)
def test_programs_that_do_not_compile(message, expected, capfd):
  """What is too large says enough; all else comes with what the compiler wrote."""

  class Lowered:
    def compile(self):
      os.write(2, b'written by C++\n')
      raise RuntimeError(message)

  with pytest.raises(json_rows.TooLarge if expected else RuntimeError) as error:
    json_rows.compile_program(Lowered())
  if expected:
    assert error.value.args[0] == expected
  assert capfd.readouterr().err == ('' if expected else 'written by C++\n')


def test_what_is_written_without_an_error_is_thrown_away(capfd):
  with topology.quiet():
    os.write(2, b'written by C++\n')
  print('after', file=sys.stderr)
  assert capfd.readouterr().err == 'after\n'


@pytest.mark.parametrize('most', [0, 1, 5, 31, 32])
def test_the_largest_size_that_fits(most):
  """Of 1 to 32, with a program that needs 3 and 2 a unit, and no unit at all."""
  tried = []

  def compile_size(n):
    tried.append(n)
    row = {
      'fits': n <= most,
      'hbm_peak_bytes': 3 + 2 * n,
      'hbm_capacity_bytes': 3 + 2 * most,
      'parameters_bytes': 3,
    }
    return row, f'program {n}'

  found = layout_search.largest(list(range(1, 33)), compile_size)
  if most == 0:
    assert found is None
  else:
    assert found[0]['hbm_peak_bytes'] == 3 + 2 * most
    assert found[1] == f'program {most}'
  assert len(tried) == len(set(tried)) <= 3


def compiled_as(tried, key, time, fits):
  """A compiler of pretence: from (partitions, number) to a row, remembering both."""

  def compile_one(M, number):
    tried.append((M, number))
    row = {'fits': fits(M, number), 'hbm_peak_bytes': 9, 'hbm_capacity_bytes': 9}
    return row | {'parameters_bytes': 1, key: time(M, number)}, f'{M} x {number}'

  return compile_one


def test_search_for_decoding():
  """Of 4 devices on 2 chips: every copy of the model gets as many inputs."""
  tried = []
  compile_one = compiled_as(
    tried, 'seconds_per_sample', lambda M, batch: abs(M - 2), lambda M, batch: M > 1
  )
  _, text = layout_search.search_decode(4, 2, None, 3, compile_one)
  assert text == '2 x 6'
  assert tried == [(4, 6), (2, 6), (1, 4)]
  tried.clear()
  assert layout_search.search_decode(4, 2, 4, 3, compile_one)[1] == '4 x 6'
  assert tried == [(4, 6)]
  assert layout_search.search_decode(4, 2, 1, 3, compile_one) is None


def test_search_for_training():
  """Of 8 devices and 12 rows: 4, 2 or 1 copies have 3, 6 or 12 rows each."""
  tried = []
  compile_one = compiled_as(
    tried, 'roofline_ms', lambda M, parts: M + parts, lambda M, parts: parts > 1
  )
  _, text = layout_search.search_train(8, 12, compile_one)
  assert text == '4 x 2'
  assert set(tried) == {(8, 1), (8, 2), (4, 1), (4, 2), (2, 1)}


def test_a_report():
  row = {
    'mode': 'decode', 'topology': 'v4:2x2x2', 'chips': 8, 'model_partitions': 8,
    'data_partitions': 1, 'batch_size': 16, 'input_length': 512, 'output_length': 64,
    'num_kv_heads': 8, 'dtype': 'bfloat16', 'fits': True, 'parameters_bytes': GIB,
    'cache_bytes': GIB / 2, 'hbm_peak_bytes': 2 * GIB,
    'hbm_capacity_bytes': 30.75 * GIB,
    'flops_per_step': 275e9, 'compute_ms': 1.0, 'hbm_bytes_per_step': 2456e6,
    'memory_ms': 2.0, 'collective_bytes_per_step': 3e8, 'links_ms': 0.25,
    'collectives_per_step': {'all-reduce': 3e8}, 'roofline_ms': 2.0,
    'cycles_per_step': 2.5e6,
    'least_bytes_per_step': 1228e6, 'prepare_flops': 1e12, 'prepare_roofline_ms': 4.0,
    'seconds_per_sample': 0.066,
  }  # fmt: skip
  text = ' '.join(row_text.text(row).split())
  for part in (
    'v4:2x2x2: 8 chips, each with 275 TFLOP/s, 1228 GB/s, 32 GiB, links of 300 GB/s',
    'peak 2.000 GiB of 30.75: fits',
    'compute 0.275 TFLOP 1.000 ms',
    'memory 2.456 GB 2.000 ms',
    'all-reduce 0.300 GB',
    "compiler's estimate 2.500 Mcycles",
    'memory / least possible 2.000',
    'one sample 0.066 s of one chip',
  ):
    assert part in text
  assert row_text.headline(row) == (
    'model 8 x data 1, batch 16: 2.00 of 30.75 GiB, 0.066 s a sample and chip'
  )
  latent = row | {'kv_head_dim': 512}
  assert ' 8 key/value heads of size 512, bfloat16' in row_text.text(latent)
  too_large = row | {'fits': False, 'hbm_peak_bytes': 31 * GIB}
  assert '31.000 GiB of 30.75: 0.25 GiB too much' in row_text.text(too_large)
