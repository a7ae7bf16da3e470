"""What the TPU compiler says of table 1's times, of figure 6, and of uptraining."""

import statistics

from gqa_t5x.reproduce.experiments import compiled, paper
from gqa_t5x.reproduce.experiments.scales import PAPER
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.results.reader import Measured
from gqa_t5x.reproduce.results.rows import Row

KIND = 'tpu_compile'
GIB = 2**30
DAY_S = 86_400
UPTRAIN_STEPS = round(paper.ALPHA * 1_000_000)


def write(part: Part) -> None:
  """Adds three tables and a figure."""
  part.doc.text(
    f'Compiled for {compiled.SLICE} without a TPU. A time is what the products, the'
    ' bytes of HBM and those of the links take at the published peaks, whichever is'
    ' most: a TPU needs longer. s/sample: on one chip, with the encoder; the batch is'
    ' the largest that fits, 32 a chip at most, as in the paper.'
  )
  _table1(part)
  _figure6(part)
  _uptraining(part)


def _table1(part: Part) -> None:
  doc = part.doc
  rows, times = {}, {}
  for model in PAPER.models:
    rows[model] = [
      _decoding(part, model.size, model.num_kv_heads, lengths)
      for lengths in compiled.LENGTHS
    ]
    times[model] = _mean_over_tasks(rows[model])
  gqa = next(model for model in times if model.label == 'GQA-8-XXL')
  table = []
  for model, several in rows.items():
    theirs = paper.SECONDS_PER_SAMPLE[model.label]
    ratio = theirs / paper.SECONDS_PER_SAMPLE[gqa.label]
    ours = _ratio(part, times[model], times[gqa])
    cells = [_with_batch(part, row) for row in several]
    mean = doc.number(times[model], 2, theirs)
    table.append([model.label, *cells, mean, f'{theirs:.2f}', ours, f'{ratio:.2f}'])
  heads = [f'{i} to {o}: s/sample, batch' for i, o in compiled.LENGTHS]
  means = ['mean of the tasks', 'paper', 'over GQA-8', 'paper']
  doc.table(['model', *heads, *means], table)


def _mean_over_tasks(rows: list[Row | None]) -> Measured | None:
  """Time per sample as table 1 averages it."""
  if None in rows:
    return None
  by_lengths = dict(zip(compiled.LENGTHS, rows, strict=True))
  seconds = [
    by_lengths[task[1:]]['seconds_per_sample'] for task in paper.TASKS.values()
  ]
  commands = tuple(row['command'] for row in rows)
  return Measured((statistics.fmean(seconds),), 'compiled', commands)


def _ratio(part: Part, a: Measured | None, b: Measured | None) -> str:
  if a is None or b is None:
    return part.doc.not_run()
  commands = tuple(dict.fromkeys(a.commands + b.commands))
  return part.doc.number(Measured((a.mean / b.mean,), 'compiled', commands), 2)


def _with_batch(part: Part, row: Row | None) -> str:
  cell = part.number(row, 'seconds_per_sample', 3)
  return f'{cell}, {row["batch_size"]}' if row else cell


def _figure6(part: Part) -> None:
  doc = part.doc
  inputs, outputs = compiled.FIGURE6_LENGTHS
  doc.text(
    f'Figure 6, T5-XXL, {inputs} to {outputs}. A step is one token of the whole batch'
    ' with the cache full, all numbers of one chip. Least: the parameters once and the'
    ' keys and values once. Cycles: what the compiler thinks its instructions take,'
    ' one after another.'
  )
  rows = {
    heads: _decoding(part, 'xxl', heads, (inputs, outputs))
    for heads in paper.FIGURE6_HEADS
  }
  table = []
  for heads, row in rows.items():
    mha = heads == paper.FIGURE6_HEADS[-1]
    theirs = paper.FIGURE6_MHA_SECONDS if mha else None
    text = f'about {theirs:g}' if theirs else 'a drawing'
    if row is None:
      table.append([str(heads), text, *[doc.not_run()] * 6])
      continue
    seconds = part.number(row, 'seconds_per_sample', 3, theirs)
    values = [
      f'{row["roofline_ms"]:.2f}',
      f'{row["hbm_bytes_per_step"] / 1e9:.2f}',
      f'{row["hbm_bytes_per_step"] / row["least_bytes_per_step"]:.3f}',
      f'{row["cycles_per_step"] / 1e6:.2f}',
    ]
    table.append([str(heads), text, seconds, str(row['batch_size']), *values])
  head = ['key/value heads', 'paper, s/sample', 's/sample', 'batch', 'ms/step']
  doc.table([*head, 'HBM, GB/step', 'over the least', 'Mcycles/step'], table)
  _compare(part, rows)
  seconds = {
    heads: (
      row['seconds_per_sample'],
      1e-3
      * row['roofline_ms']
      * row['output_length']
      * row['chips']
      / row['batch_size'],
    )
    for heads, row in rows.items()
    if row
  }
  part.time_against_heads(
    'figure6_compiled.png',
    f"Figure 6: T5.1.1-XXL on {compiled.SLICE}, at the chips' peaks (compiled).",
    seconds,
    'least time per sample (s)',
  )


def _compare(part: Part, rows: dict[int, Row | None]) -> None:
  """MHA against GQA-8: bytes, time, and the compiler's own estimate of it."""
  mha, gqa = rows[paper.FIGURE6_HEADS[-1]], rows[8]
  if mha is None or gqa is None:
    return
  parts = (
    ('HBM bytes', 'hbm_bytes_per_step'),
    ('time', 'roofline_ms'),
    ("the compiler's cycles", 'cycles_per_step'),
  )
  ratios = [f'{name} {mha[key] / gqa[key]:.2f}' for name, key in parts]
  part.doc.text(
    f'A step of MHA over one of GQA-8, each at its batch: {", ".join(ratios)}.'
  )


def _uptraining(part: Part) -> None:
  doc = part.doc
  doc.text(
    'Uptraining GQA-8-XXL (`gin/uptrain_gqa8.gin`): batch 2048, Adafactor, full'
    f' rematerialisation. Chip-days: of {UPTRAIN_STEPS:,} steps at the peaks; the paper'
    f' took about {paper.UPTRAIN_CHIP_DAYS} TPUv3 chip-days.'
  )
  table = []
  for training in compiled.TRAININGS:
    row = part.found.row(
      compiled.uptraining(part.plan.output_dir, training).result, KIND, fits=True
    )
    layout = f'{training.partitions} devices, {training.microbatches}'
    if row is None:
      table.append([training.slice_name, layout, *[doc.not_run()] * 6])
      continue
    peak, most = (row[f'hbm_{name}_bytes'] / GIB for name in ('peak', 'capacity'))
    seconds = row['roofline_ms'] / 1e3
    days = seconds * UPTRAIN_STEPS * row['chips'] / DAY_S
    table.append(
      [
        training.slice_name,
        layout,
        f'{peak:.1f} of {most:.1f}',
        f'{row["flops_per_step"] / 1e12:,.0f}',
        f'{row["hbm_bytes_per_step"] / 1e9:,.0f}',
        f'{row["collective_bytes_per_step"] / 1e9:,.0f}',
        part.computed(row, seconds, 1),
        part.computed(row, days, 0),
      ]
    )
  head = ['slice', 'a model on, microbatches', 'GiB a chip', 'TFLOP', 'HBM, GB']
  doc.table([*head, 'links, GB', 's/step', 'chip-days'], table)


def _decoding(
  part: Part, size: str, heads: int, lengths: tuple[int, int]
) -> Row | None:
  path = compiled.decoding(part.plan.output_dir, size, heads, lengths).result
  return part.found.row(path, KIND, fits=True, num_kv_heads=heads)
