"""The command for a borrowed accelerator: what comes first, and what it leaves out."""

import json
import time

import jax
import pytest

from gqa_t5x import benchmark
from gqa_t5x.analysis.benchmarks import (
  accelerator_benchmark,
  decode_benchmark,
  timing,
  train_benchmark,
  workload,
)
from gqa_t5x.errors import BadInput
from gqa_t5x.model import sizes

WORDS = ['accelerator', '--size=one_layer', '--batch_size=8', '--input_length=8']
WORDS += ['--output_length=4', '--repeats=1']
# What is wanted of a model of eight heads, in this order.
WANTED = [
  ('heads', 8),
  ('heads', 1),
  ('largest batch', 8),
  ('largest batch', 1),
  ('beams', 1),
  ('int8', 1),
  ('int8', 1),
  ('training', 8),
  ('beside T5X', 8),
  ('beams', 8),
  ('training', 1),
  ('with encoder', 1),
]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
  """A model of one layer, and small measures of the machine."""
  dims = dict(emb_dim=16, num_heads=8, head_dim=4, mlp_dim=32, vocab_size=64)
  layers = {'num_encoder_layers': 1, 'num_decoder_layers': 1}
  monkeypatch.setitem(sizes.SIZES, 'one_layer', dims | layers)
  monkeypatch.setattr(timing, 'STREAM_BYTES', {'cpu': 2**20})
  monkeypatch.setattr(workload, 'matmul_rate', lambda *_: 0.5)
  for share in benchmark.MEMORY_SHARES:
    monkeypatch.setenv(share, '.5')  # Or the command sets it.


def without_t5x(monkeypatch):
  def missing(name):
    raise BadInput(f"{name}: T5X's network is not installed.")

  monkeypatch.setattr(benchmark, '_t5x', missing)


@pytest.mark.usefixtures('quick_compilation')
def test_rows(tmp_path, monkeypatch, capsys):
  """One of each part, and what is not here is left out."""
  without_t5x(monkeypatch)
  monkeypatch.setattr(timing, 'free_bytes', lambda: 1e9)
  wanted = accelerator_benchmark.parts('one_layer', 8, 8, 4)
  few = [p for p in wanted if p.setting.num_kv_heads == 1 or p.setting.system == 't5x']
  monkeypatch.setattr(accelerator_benchmark, 'parts', lambda *_: few)
  path = tmp_path / 'rows.json'
  assert benchmark.main(['benchmark', *WORDS, f'--json={path}']) == 0
  rows = json.loads(path.read_text())
  assert [row['part'] for row in rows] == [part for part, K in WANTED if K == 1]
  assert [path.name for path in tmp_path.iterdir()] == ['rows.json']
  by_part = {row['part']: row for row in rows}
  assert by_part['heads']['command'] == ' '.join(
    ['python -m gqa_t5x.benchmark', *WORDS]
  )
  assert by_part['largest batch']['batch_size'] == 16  # A CPU's memory is not filled.
  assert (by_part['beams']['batch_size'], by_part['beams']['num_beams']) == (1, 4)
  assert by_part['training']['kind'] == 'train_benchmark'
  stored = [row['quantize'] for row in rows if row['part'] == 'int8']
  assert stored == ['weights', 'weights_and_cache']
  encoded = [row['part'] for row in rows if 'encode_ms' in row]
  assert encoded == ['with encoder']
  out = capsys.readouterr().out
  assert "T5X's network: left out: decode: T5X's network is not installed." in out
  assert out.splitlines()[-1].startswith('target, no row where fewer heads are slower')


def test_a_paper_size_has_the_models_of_the_issue():
  found = accelerator_benchmark.parts('xxl', 64, 2048, 32)
  first = [(part.name, part.setting.num_kv_heads) for part in found[:9]]
  assert first == [
    *(('heads', K) for K in (64, 8, 1)),
    *(('largest batch', K) for K in (64, 8, 1)),
    ('beams', 8),
    *[('int8', 8)] * 2,
  ]
  stored = [part.setting.quantize for part in found[6:9]]
  assert stored == [None, 'weights', 'weights_and_cache']
  assert found[0].setting == decode_benchmark.Setting(
    'xxl', 64, 64, 2048, 32, 'float32', 1
  )
  assert found[6].setting.batch_size == 8
  training, t5x, ours = (part.setting for part in found[9:12])
  assert (training.size, training.num_kv_heads) == ('large', 16)
  assert (t5x.size, t5x.system, ours.system) == ('base', 't5x', 'gqa_t5x')


def test_made_up_arrays():
  """Of their own dtypes, or of one for all; no two are the same."""
  shapes = [jax.ShapeDtypeStruct((3, 50), d) for d in ('int8', 'float32', 'float32')]
  whole, *floats = workload.random_like(shapes)
  assert whole.dtype == 'int8'
  assert -100 <= whole.min() < 0 < whole.max() < 100
  assert all(0 < abs(x).max() <= 1 and x.dtype == 'float32' for x in floats)
  assert not (floats[0] == floats[1]).any()
  (half,) = workload.random_like(shapes[:1], 'bfloat16')
  assert half.dtype == 'bfloat16'


def pretended(monkeypatch, seconds, fail=()):
  """Rows that take so many seconds by the clock; some numbers of rows fail."""
  now, calls = [0.0], []
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])

  def measure(settings, repeats, command, others=None):
    calls.append(settings[0])
    now[0] += seconds
    if len(calls) in fail:
      raise RuntimeError(fail[len(calls)])
    row = dict(ms_per_step=1.0, tokens_per_s=1.0, system='gqa_t5x', device='cpu')
    row |= dict(stream_gb_per_s=1e9, matmul_gflop_per_s=1e9, roofline_fraction=0.8)
    yield row | vars(settings[0])

  monkeypatch.setattr(decode_benchmark, 'measure', measure)
  monkeypatch.setattr(train_benchmark, 'measure', measure)
  monkeypatch.setattr(timing, 'free_bytes', lambda: 1e9)
  return calls


def test_what_does_not_fit_into_the_time_is_left_out(tmp_path, monkeypatch, capsys):
  pretended(monkeypatch, seconds=16)
  words = [*WORDS, '--minutes=1', f'--json={tmp_path}/rows.json']
  assert benchmark.main(['benchmark', *words]) == 0
  rows = json.loads((tmp_path / 'rows.json').read_text())
  assert [(row['part'], row['num_kv_heads']) for row in rows] == WANTED[:3]
  out = capsys.readouterr().out
  assert 'largest batch: one_layer, 1 K/V heads: left out: it takes about 16 s' in out
  assert out.count('left out') == len(WANTED) + 1 - 3


def test_a_slower_part_is_expected_to_take_longer(monkeypatch):
  """Twice what its steps take more: 16 times the batch has 16 times the cache."""
  setting = decode_benchmark.Setting('one_layer', 8, 8, 512, 4, 'float32', 1)
  part = accelerator_benchmark.Part('heads', setting)
  larger = decode_benchmark.Setting('one_layer', 8, 128, 512, 4, 'float32', 1)
  row = {'stream_gb_per_s': 1e-3, 'matmul_gflop_per_s': 1e9}
  found = accelerator_benchmark._expected(part, larger, 2, (7.0, part, setting, row))
  more = 3 * 5 * (larger.cost.bytes - setting.cost.bytes) / 1e6
  assert found == pytest.approx(7 + 2 * more)


def test_a_part_that_fails_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
  """What is too large is tried with a smaller batch."""
  without_t5x(monkeypatch)
  fail = {1: 'INTERNAL: no such kernel', 3: 'RESOURCE_EXHAUSTED: 2 GB'}
  calls = pretended(monkeypatch, 1, fail)
  monkeypatch.setattr(timing, 'free_bytes', lambda: 14e3)
  monkeypatch.setattr(decode_benchmark.Setting, 'check', lambda self: None)
  monkeypatch.setattr(train_benchmark.Setting, 'check', lambda self: None)
  path = tmp_path / 'rows.json'
  assert benchmark.main(['benchmark', *WORDS, f'--json={path}']) == 1
  found = [(row['part'], row['num_kv_heads']) for row in json.loads(path.read_text())]
  assert found == WANTED[1:]
  assert calls[2].num_kv_heads == calls[3].num_kv_heads == 8
  out = capsys.readouterr().out
  assert 'heads: one_layer, 8 K/V heads: failed: INTERNAL: no such kernel' in out
  assert 'not known (1 heads 80.0%, 8 heads not measured)' in out


def test_rows_of_a_run_that_is_stopped_are_kept(tmp_path, monkeypatch):
  def stopped(*args):
    yield {'part': 'heads'}
    raise KeyboardInterrupt

  monkeypatch.setattr(accelerator_benchmark, 'measure', stopped)
  assert benchmark.main(['benchmark', *WORDS, f'--json={tmp_path}/rows.json']) == 130
  (left,) = tmp_path.iterdir()
  assert left.name == 'rows.json.partial'
  assert json.loads(left.read_text()) == [{'part': 'heads'}]


def row(part, K, share=0.75, tokens_per_s=1.0, system='gqa_t5x'):
  found = {'part': part, 'num_kv_heads': K, 'system': system}
  return found | {'roofline_fraction': share, 'tokens_per_s': tokens_per_s}


def test_targets():
  rows = [row('heads', 64), row('heads', 8, 0.7), row('heads', 1, 0.9, 2.0)]
  near, slower = accelerator_benchmark.verdicts(rows, 'xxl')
  said = '64 heads 75.0%, 8 heads 70.0%, 1 heads 90.0%'
  assert near == f'target, 70% of a streaming read: met ({said})'
  assert slower.endswith('slower: met (2 pairs of rows)')
  rows[2] = row('heads', 1, 0.69)
  rows += [row('beams', 8, 0.9, 4.0), row('beams', 64, 0.9, 5.0)]
  rows.append(row('beams', 1, 0.9, 9.0, 't5x'))
  near, slower = accelerator_benchmark.verdicts(rows, 'xxl')
  assert ': missed (' in near
  said = 'beams, 8 heads against 64: 80.0% of the tokens a second'
  assert slower.endswith(f'slower: missed ({said})')
  assert ': not known (' in accelerator_benchmark.verdicts([], 'xxl')[0]


@pytest.mark.parametrize(
  ('word', 'said'),
  [
    ('--output_length=3', 'output_length=3'),
    ('--minutes=0', 'minutes=0'),
    ('--size=huge', 'size'),
    ('--num_kv_heads=8', "Unknown command line flag 'num_kv_heads'"),
  ],
)
def test_bad_input(word, said, capsys):
  assert benchmark.main(['benchmark', 'accelerator', word]) == 1
  err = capsys.readouterr().err
  assert err.startswith('error: ')
  assert said in err
