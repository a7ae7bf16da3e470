"""The compiler's times in the report."""

import json
import re

from gqa_t5x import tpu_compile
from gqa_t5x.reproduce.experiments import paper
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.scales import PAPER
from gqa_t5x.reproduce.experiments.targets import make_plan
from gqa_t5x.reproduce.report.document import Document
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.report.tables import compiled
from gqa_t5x.reproduce.results.reader import Reader

LENGTHS = [(512, 256), (2048, 512), (2048, 32)]
# Model -> K, and how much faster than MHA-XXL these rows say that it is.
MODELS = {
  'MHA-Large': ('large', 16, 10),
  'MHA-XXL': ('xxl', 64, 1),
  'MQA-XXL': ('xxl', 1, 5),
  'GQA-8-XXL': ('xxl', 8, 4),
}


def flags_of(stage):
  command = tpu_compile.define_flags()
  assert command.values(command.rewrite(stage.command[1:])) == ['gqa_t5x.tpu_compile']
  return command.values


def row(stage, **values):
  args = flags_of(stage)
  common = {
    'kind': 'tpu_compile',
    'source': 'compiled',
    'command': str(stage),
    'device': 'TPU',
    'versions': {},
    'fits': True,
    'chips': 8,
    'num_kv_heads': args.num_kv_heads,
    'batch_size': 128,
    'output_length': args.output_length,
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
  return common | values


def written(plan, values_of):
  """Writes the rows of a plan: values_of(flags) -> what a row has besides."""
  for stage in plan.stages:
    stage.result.parent.mkdir(parents=True, exist_ok=True)
    values = values_of(flags_of(stage))
    stage.result.write_text(json.dumps(row(stage, **values)))


def report(tmp_path):
  doc, found = Document('T'), Reader()
  plan = Planner(PAPER, str(tmp_path))
  compiled.write(Part(doc, found, plan, tmp_path))
  return re.sub(r' <sup>.*?</sup>', '', doc.markdown()), found


def tables(text):
  found = re.findall(r'((?:^\|.*\n)+)', text, flags=re.MULTILINE)
  return [
    {
      cells[0]: cells[1:]
      for line in table.splitlines()[2:]
      for cells in [line.strip('| ').split(' | ')]
    }
    for table in found
  ]


def test_times_stand_next_to_the_papers(tmp_path):
  plan = make_plan('compiled', 'paper', str(tmp_path))
  faster = {(size, K): times for size, K, times in MODELS.values()}
  base = dict(zip(LENGTHS, (0.2, 1.2, 0.4), strict=True))

  def values_of(args):
    if args.gin_file:
      return {'roofline_ms': 3000.0, 'num_kv_heads': 8, 'chips': 128}
    seconds = base[args.input_length, args.output_length]
    seconds /= faster.get((args.size, args.num_kv_heads), 2)
    K = args.num_kv_heads
    return {'seconds_per_sample': seconds, 'hbm_bytes_per_step': 1e9 * K}

  written(plan, values_of)
  text, found = report(tmp_path)
  assert found.problems == []
  table1, figure6, uptraining = tables(text)
  # Two tasks of 512/256, four of 2048/512 and one of 2048/32.
  mean = (2 * 0.2 + 4 * 1.2 + 0.4) / 7
  for name, (_, _, times) in MODELS.items():
    theirs = paper.SECONDS_PER_SAMPLE[name]
    assert table1[name] == [
      *(f'{s / times:.3f}, 128' for s in base.values()),
      f'{mean / times:.2f} ({mean / times - theirs:+.2f})',
      f'{theirs:.2f}',
      f'{4 / times:.2f}',
      f'{theirs / 0.28:.2f}',
    ]
  assert [*figure6] == ['1', '4', '8', '16', '32', '64']
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
  assert 'Not run' not in text


def test_what_is_missing_is_not_run(tmp_path):
  text, _ = report(tmp_path)
  table1, figure6, uptraining = tables(text)
  for table in (table1, figure6, uptraining):
    assert all('not run' in cells for cells in table.values())


def test_rows_of_something_else_are_skipped(tmp_path):
  plan = make_plan('compiled', 'paper', str(tmp_path))
  written(plan, lambda args: {'num_kv_heads': 2, 'fits': not args.gin_file})
  _, found = report(tmp_path)
  assert any('num_kv_heads=2, not 64' in problem for problem in found.problems)
  assert any('fits=False, not True' in problem for problem in found.problems)
