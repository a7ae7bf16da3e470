"""What the TPU compiler says of table 1's times, of figure 6, and of uptraining."""

from gqa_t5x.reproduce.experiments import compiled, paper
from gqa_t5x.reproduce.experiments.models import Model
from gqa_t5x.reproduce.experiments.scales import LATENT, PAPER
from gqa_t5x.reproduce.report.part import Part
from gqa_t5x.reproduce.report.tables import figure6
from gqa_t5x.reproduce.results import reader
from gqa_t5x.reproduce.results.reader import Measured
from gqa_t5x.reproduce.results.rows import Row

KIND = 'tpu_compile'
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


def _row(part: Part, model: Model, lengths: tuple[int, int]) -> Row | None:
  path = compiled.decoding(part.plan.output_dir, model, lengths).result
  return part.found.row(path, KIND, fits=True, num_kv_heads=model.num_kv_heads)


def _table1(part: Part) -> None:
  doc = part.doc

  def with_batch(row):
    seconds = part.number(row, row['seconds_per_sample'], 3)
    return f'{seconds}, {row["batch_size"]}'

  def time(by_lengths):
    """Per sample, as table 1 averages it over the tasks."""
    rows = [by_lengths[task[1:]] for task in paper.TASKS.values()]
    seconds = [row and Measured.of(row, row['seconds_per_sample']) for row in rows]
    return reader.mean(seconds)

  rows = {
    model.label: {lengths: _row(part, model, lengths) for lengths in paper.LENGTHS}
    for model in PAPER.models
  }
  times = {label: time(by_lengths) for label, by_lengths in rows.items()}
  table, gqa = [], 'GQA-8-XXL'
  for label, by_lengths in rows.items():
    theirs = paper.SECONDS_PER_SAMPLE.get(label)
    pair = times[label], times[gqa]
    ratio = reader.combine(lambda values: values[0] / values[1], pair)
    over_gqa = doc.number(ratio, 2)
    cells = [part.cells(row, [with_batch])[0] for row in by_lengths.values()]
    cells += [doc.number(times[label], 2, theirs)]
    printed = [paper.NOT_THERE] * 2
    if theirs:
      over = theirs / paper.SECONDS_PER_SAMPLE[gqa]
      printed = [f'{theirs:.2f}', f'{over:.2f}']
    table.append([label, *cells, printed[0], over_gqa, printed[1]])
  heads = [f'{i} to {o}: s/sample, batch' for i, o in paper.LENGTHS]
  means = ['mean of the tasks', 'paper', 'over GQA-8', 'paper']
  doc.table(['model', *heads, *means], table)


def _figure6(part: Part) -> None:
  inputs, outputs = compiled.FIGURE6_LENGTHS
  part.doc.text(
    f'Figure 6, T5-XXL, {inputs} to {outputs}. A step is one token of the whole batch'
    ' with the cache full, all numbers of one chip. Least: the parameters once and the'
    ' keys and values once. Cycles: what the compiler thinks its instructions take,'
    ' one after another.'
  )
  lengths = inputs, outputs
  rows = {K: _row(part, Model('xxl', K), lengths) for K in paper.FIGURE6_HEADS}
  columns = {
    'batch': lambda row: str(row['batch_size']),
    'ms/step': lambda row: f'{row["roofline_ms"]:.2f}',
    'HBM, GB/step': lambda row: f'{row["hbm_bytes_per_step"] / 1e9:.2f}',
    'over the least': lambda row: (
      f'{row["hbm_bytes_per_step"] / row["least_bytes_per_step"]:.3f}'
    ),
    'Mcycles/step': lambda row: f'{row["cycles_per_step"] / 1e6:.2f}',
  }
  latent = _row(part, LATENT, lengths)
  figure6.add_table(part, rows, columns, {LATENT.kv_head_dim: latent})
  mha, gqa = rows[paper.FIGURE6_HEADS[-1]], rows[8]
  if mha and gqa:
    compared = {
      'HBM bytes': 'hbm_bytes_per_step',
      'time': 'roofline_ms',
      "the compiler's cycles": 'cycles_per_step',
    }
    ratios = [f'{name} {mha[key] / gqa[key]:.2f}' for name, key in compared.items()]
    part.doc.text(
      f'A step of MHA over one of GQA-8, each at its batch: {", ".join(ratios)}.'
    )
  found = {K: row for K, row in rows.items() if row}
  if not found:
    return
  decoder_ms = {
    K: row['roofline_ms'] * row['output_length'] * row['chips'] / row['batch_size']
    for K, row in found.items()
  }
  caption = f"Figure 6: T5.1.1-XXL on {compiled.SLICE}, at the chips' peaks (compiled)."
  name, label = 'figure6_compiled.png', 'least time per sample (s)'
  figure6.add_figure(part, name, caption, found, decoder_ms, label)


def _uptraining(part: Part) -> None:
  part.doc.text(
    'Uptraining GQA-8-XXL (`gin/uptrain_gqa8.gin`): batch 2048, Adafactor, full'
    f' rematerialisation. Chip-days: of {UPTRAIN_STEPS:,} steps at the peaks; the paper'
    f' took about {paper.UPTRAIN_CHIP_DAYS} TPUv3 chip-days.'
  )

  def memory(row):
    peak, most = (row[f'hbm_{name}_bytes'] / 2**30 for name in ('peak', 'capacity'))
    return f'{peak:.1f} of {most:.1f}'

  def chip_days(row):
    days = row['roofline_ms'] / 1e3 * UPTRAIN_STEPS * row['chips'] / 86_400
    return part.number(row, days, 0)

  columns = {
    'GiB a chip': memory,
    'TFLOP': lambda row: f'{row["flops_per_step"] / 1e12:,.0f}',
    'HBM, GB': lambda row: f'{row["hbm_bytes_per_step"] / 1e9:,.0f}',
    'links, GB': lambda row: f'{row["collective_bytes_per_step"] / 1e9:,.0f}',
    's/step': lambda row: part.number(row, row['roofline_ms'] / 1e3, 1),
    'chip-days': chip_days,
  }
  table = []
  for slice_name, (partitions, microbatches) in compiled.TRAININGS.items():
    path = compiled.uptraining(part.plan.output_dir, slice_name).result
    cells = part.cells(part.found.row(path, KIND, fits=True), columns.values())
    layout = f'{partitions} devices, {microbatches}'
    table.append([slice_name, layout, *cells])
  part.doc.table(['slice', 'a model on, microbatches', *columns], table)
