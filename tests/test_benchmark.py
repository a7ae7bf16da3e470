"""The benchmark command: its settings, rows, files and refusals."""

import json
import subprocess
import sys

import jax
import pytest

from gqa_t5x import benchmark, network
from gqa_t5x.analysis import benchmark_report, costs, decode_benchmark, timing
from gqa_t5x.analysis.decode_benchmark import BadSetting, Setting


def parse(*words):
  args = benchmark.define_flags()
  args(['benchmark', 'decode', *words])
  return args


def test_default_settings():
  """Every divisor of the heads."""
  found = benchmark.settings(parse())
  assert [s.num_kv_heads for s in found] == [12, 6, 4, 3, 2, 1]
  assert {
    (s.size, s.batch_size, s.input_length, s.dtype, s.num_beams, s.system)
    for s in found
  } == {('base', 8, 512, 'float32', 1, 'gqa_t5x')}


def test_all_combinations_with_t5x():
  """Settings that differ in heads and system only are neighbours."""
  found = benchmark.settings(
    parse('--num_kv_heads=4,1', '--batch_size=1,8', '--compare=t5x')
  )
  assert [(s.batch_size, s.num_kv_heads, s.system) for s in found] == [
    (1, 4, 'gqa_t5x'),
    (1, 1, 'gqa_t5x'),
    (1, 12, 't5x'),
    (8, 4, 'gqa_t5x'),
    (8, 1, 'gqa_t5x'),
    (8, 12, 't5x'),
  ]


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    (['decode', '--size=huge'], 'size=huge; choose from tiny, mini, small'),
    (['decode', '--dtype=int8'], 'dtype=int8; choose from float32, bfloat16.'),
    (['decode', '--num_kv_heads=5'], 'num_heads=12 is not divisible by num_kv_heads=5'),
    (['decode', '--batch_size=two'], 'batch_size=two must be whole numbers.'),
    (['decode', '--batch_size=0'], 'batch_size=0 must be at least 1.'),
    (['decode', '--input_length=0'], 'input_length=0 must be at least 1.'),
    (['decode', '--num_beams=0'], 'num_beams=0 must be at least 1.'),
    (['decode', '--output_length=3'], 'output_length=3 must be at least 4'),
    (['decode', '--batch_size=1000000'], 'needs 42597.3 GB, and '),
    (['decode', '--json=/no/such/rows.json'], '/no/such/rows.json: there is no such'),
    (['decode', '--repeats=3'], 'flag --repeats=3'),
    (['decode', '--compare=torch'], 'flag --compare=torch'),
    (['dance'], "say what to measure: decode, not 'dance'."),
    ([], "say what to measure: decode, not ''."),
  ],
)
def test_what_cannot_be_measured(words, said, capsys):
  assert benchmark.main(['benchmark', *words]) == 1
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('error: ')
  assert said in err
  assert err.count('\n') == 1


def test_a_missing_extra(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  assert benchmark.main(['benchmark', 'decode', '--png=x.png']) == 1
  assert capsys.readouterr().err == (
    'error: --png needs matplotlib, which is not installed; pip install matplotlib.\n'
  )


def test_memory_is_that_of_the_arrays():
  setting = Setting('tiny', 2, 3, 10, 8, 'float32', 2)
  runner = decode_benchmark.Runner(setting)
  leaves = jax.tree.leaves((runner._params, runner._kept))
  cross_and_params = sum(leaf.nbytes for leaf in leaves)
  self_cache = 2 * sum(x.nbytes for x in jax.tree.leaves(runner._cache) if x.ndim == 4)
  logits = 4 * 3 * 2 * network.VOCAB_SIZE
  assert setting.nbytes() == cross_and_params + self_cache + logits


def test_slopes(monkeypatch):
  """Set-up costs drop out, functions take turns, and the median counts."""
  calls = []

  def run(name, set_up, step):
    def call(count):
      calls.append((name, count))
      # The third measurement is disturbed.
      return set_up + step * count + (50 if len(calls) > 8 else 0)

    return call

  monkeypatch.setattr(timing, 'seconds', lambda call: call())
  found = timing.slopes([run('a', 5, 2), run('b', 7, 3)], (2, 10), 3)
  assert found == [2, 3]
  assert calls[:2] == [('a', 2), ('b', 2)]  # to warm up
  assert calls[2:6] == [('a', 2), ('a', 10), ('b', 2), ('b', 10)]


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
  """Rows of a run of the command, with small measures of the machine."""
  folder = tmp_path_factory.mktemp('benchmark')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(timing, 'STREAM_BYTES', {'cpu': 2**20})
    patch.setattr(decode_benchmark, '_matmul_rate', lambda *_: 0.5)
    words = ['--size=tiny', '--num_kv_heads=8,1', '--num_beams=1,2', '--batch_size=2']
    words += ['--input_length=8', '--output_length=4', '--repeats=5']
    words += [f'--json={folder}/rows.json', f'--png={folder}/heads.png']
    assert benchmark.main(['benchmark', 'decode', *words]) == 0
  assert (folder / 'heads.png').read_bytes()[:4] == b'\x89PNG'
  assert {path.name for path in folder.iterdir()} == {'rows.json', 'heads.png'}
  return json.loads((folder / 'rows.json').read_text())


def test_rows(rows):
  assert [(row['num_beams'], row['num_kv_heads']) for row in rows] == [
    (1, 8),
    (1, 1),
    (2, 8),
    (2, 1),
  ]
  for row in rows:
    step = costs.decode_step(
      network.t5_1_1_config('tiny', num_kv_heads=row['num_kv_heads']),
      2,
      8,
      4,
      num_beams=row['num_beams'],
    )
    seconds = row['ms_per_step'] / 1e3
    nbytes = row['param_bytes_per_step'] + row['cache_bytes_per_step']
    assert (row['kind'], row['source']) == ('decode_benchmark', 'measured')
    assert row['command'].startswith('python -m gqa_t5x.benchmark decode --size=tiny')
    assert (nbytes, row['flops_per_step']) == (step.bytes, step.flops)
    expected = {
      'gb_per_s': nbytes / seconds / 1e9,
      'roofline_fraction': nbytes / seconds / 1e9 / row['stream_gb_per_s'],
      'roofline_ms': max(
        nbytes / row['stream_gb_per_s'] / 1e6,
        step.flops / row['matmul_gflop_per_s'] / 1e6,
      ),
      'roofline_time_fraction': row['roofline_ms'] / row['ms_per_step'],
      'seconds_per_sample': (row['encode_ms'] / 1e3 + 4 * seconds) / 2,
      'tokens_per_s': 2 / seconds,
      'matmul_gflop_per_s': 0.5,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row['encode_ms'] > 0
    assert row['stream_gb_per_s'] > 0
    assert row['versions']['jax'] == jax.__version__


def test_table(rows, capsys):
  slow = {**rows[0], 'ms_per_step': 40.0, 'system': 't5x'}
  benchmark_report.print_table([{**rows[0], 'ms_per_step': 10.0}, slow])
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].split()[:7] == ['tiny', '8', '2', '8', '1', '10', '█' * 6]
  assert lines[2].split()[:8] == ['tiny', '(T5X)', '8', '2', '8', '1', '40', '█' * 24]


BARE = """
import sys
for name in ('tensorflow', 'seqio', 'gin', 't5x', 't5', 'matplotlib', 'tqdm'):
  sys.modules[name] = None
import time, jax
start = time.perf_counter()
from gqa_t5x import benchmark
seconds = time.perf_counter() - start
assert benchmark.main(['benchmark', '--help']) == 0
print(seconds)
"""


def test_a_bare_machine_imports_it_quickly():
  done = subprocess.run(
    [sys.executable, '-c', BARE], capture_output=True, text=True, check=True
  )
  assert '--num_kv_heads' in done.stdout
  assert float(done.stdout.splitlines()[-1]) < 5


def test_t5x_is_refused_by_name_where_it_is_missing(monkeypatch):
  from gqa_t5x.analysis import t5x_runner

  monkeypatch.setitem(sys.modules, 't5x.examples.t5', None)
  with pytest.raises(BadSetting, match="needs T5X's own example network"):
    t5x_runner.Runner(Setting('tiny', 8, 1, 4, 4, 'float32', 1, 't5x'))
