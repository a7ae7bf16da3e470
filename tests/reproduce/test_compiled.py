"""The compiler's times in the report."""

import json

import pytest

from gqa_t5x import tpu_compile
from gqa_t5x.reproduce.experiments import paper
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.scales import PAPER
from gqa_t5x.reproduce.experiments.targets import make_plan
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.report.tables import compiled
from gqa_t5x.reproduce.results.reader import Reader
from helpers.reports import tables

# Input and output length -> seconds of MHA-XXL.
SECONDS = {(512, 256): 0.2, (2048, 512): 1.2, (2048, 32): 0.4}
# Model -> K, and how much faster than MHA-XXL these rows say that it is.
MODELS = {
  'MHA-Large': ('large', 16, 10),
  'MHA-XXL': ('xxl', 64, 1),
  'MQA-XXL': ('xxl', 1, 5),
  'GQA-8-XXL': ('xxl', 8, 4),
}
ROW = {
  'kind': 'tpu_compile',
  'source': 'compiled',
  'device': 'TPU',
  'versions': {},
  'fits': True,
  'chips': 8,
  'batch_size': 128,
  'seconds_per_sample': 1.0,
  'roofline_ms': 2.5,
  'hbm_bytes_per_step': 3e9,
  'least_bytes_per_step': 2.5e9,
  'cycles_per_step': 4e6,
  'flops_per_step': 7e12,
  'collective_bytes_per_step': 5e9,
  'hbm_peak_bytes': 8 * 2**30,
  'hbm_capacity_bytes': 31 * 2**30,
}


@pytest.fixture
def report(tmp_path):
  """Writes rows, as values_of(flags) of each stage; returns the report and problems."""

  def report(values_of=None):
    plan, doc, found = Planner(PAPER, str(tmp_path)), Document('T'), Reader()
    stages = make_plan('compiled', 'paper', str(tmp_path)).stages if values_of else []
    for stage in stages:
      command = tpu_compile.define_flags()
      args = command.values
      args(command.rewrite(stage.command[1:]))
      row = {**ROW, 'command': str(stage), 'output_length': args.output_length}
      stage.result.parent.mkdir(parents=True, exist_ok=True)
      stage.result.write_text(json.dumps(row | values_of(args)))
    compiled.write(Part(doc, found, plan, tmp_path))
    return doc.markdown(), found.problems

  return report


def by_name(text):
  return [{line[0]: line[1:] for line in table[1:]} for table in tables(text)]


def test_times_stand_next_to_the_papers(report, tmp_path):
  faster = {(size, K): times for size, K, times in MODELS.values()}

  def values_of(args):
    if args.gin_file:
      return {'roofline_ms': 3000.0, 'num_kv_heads': 8, 'chips': 128}
    K = args.num_kv_heads
    seconds = SECONDS[args.input_length, args.output_length]
    seconds /= faster.get((args.size, K), 2)
    return {
      'num_kv_heads': K, 'seconds_per_sample': seconds, 'hbm_bytes_per_step': 1e9 * K
    }  # fmt: skip

  text, problems = report(values_of)
  assert problems == []
  table1, figure6, uptraining = by_name(text)
  # Two tasks of 512/256, four of 2048/512 and one of 2048/32.
  mean = (2 * 0.2 + 4 * 1.2 + 0.4) / 7
  for name, (_, _, times) in MODELS.items():
    theirs = paper.SECONDS_PER_SAMPLE[name]
    assert table1[name] == [
      *(f'{s / times:.3f}, 128' for s in SECONDS.values()),
      f'{mean / times:.2f} ({mean / times - theirs:+.2f})',
      f'{theirs:.2f}',
      f'{4 / times:.2f}',
      f'{theirs / 0.28:.2f}',
    ]
  # As fast as MQA: these rows are told apart by K alone.
  assert table1['Latent-512-XXL'] == [
    *(f'{s / 5:.3f}, 128' for s in SECONDS.values()),
    f'{mean / 5:.2f}',
    'not in the paper',
    f'{4 / 5:.2f}',
    'not in the paper',
  ]
  assert [*figure6] == ['1', '4', '8', '16', '32', '64', '1 of 512']
  assert figure6['1 of 512'][:2] == ['not in the paper', f'{1.2 / 5:.3f}']
  assert figure6['64'] == [
    'about 2', '1.200 (-0.800)', '128', '2.50', '64.00', '25.600', '4.00',
  ]  # fmt: skip
  assert figure6['16'][:2] == ['a drawing', '0.600']
  assert "HBM bytes 8.00, time 1.00, the compiler's cycles 1.00" in text
  assert (tmp_path / 'figures' / 'figure6_compiled.png').stat().st_size > 5000
  days = 3.0 * 50_000 * 128 / 86400
  assert uptraining['v3:8x16'] == [
    '8 devices, 4', '8.0 of 31.0', '7', '3', '5', '3.0', f'{days:.0f}',
  ]  # fmt: skip
  assert 'not run' not in text


def test_what_is_missing_is_not_run(report):
  for table in by_name(report()[0]):
    assert all('not run' in cells for cells in table.values())


def test_rows_of_something_else_are_skipped(report):
  _, problems = report(lambda args: {'num_kv_heads': 2, 'fits': not args.gin_file})
  assert any('num_kv_heads=2, not 64' in problem for problem in problems)
  assert any('fits=False, not True' in problem for problem in problems)
