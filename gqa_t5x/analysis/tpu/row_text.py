"""A row of json_rows as text, for a person at a terminal."""

from gqa_t5x.analysis.tpu import topology
from gqa_t5x.analysis.tpu.chips import CHIPS, GIB
from gqa_t5x.analysis.tpu.json_rows import CompiledRow


def headline(row: CompiledRow) -> str:
  """Returns one line: the layout, and what a program needs of what there is."""
  parts, end = '', ': does not fit'
  if 'num_microbatches' in row:
    parts = f' in {row["num_microbatches"]} microbatches'
  if row['fits'] and row['mode'] == 'decode':
    end = f', {row["seconds_per_sample"]:.3f} s a sample and chip'
  elif row['fits']:
    end = f', {row["roofline_ms"]:.0f} ms a step'
  peak, capacity = row['hbm_peak_bytes'] / GIB, row['hbm_capacity_bytes'] / GIB
  return (
    f'model {row["model_partitions"]} x data {row["data_partitions"]},'
    f' batch {row["batch_size"]}{parts}: {peak:.2f} of {capacity:.2f} GiB{end}'
  )


def text(row: CompiledRow) -> str:
  """Returns the whole report of a row, all numbers per chip."""
  chip = CHIPS[topology.parse(row['topology'])[0]]
  int8 = f' and int8 {row["quantize"].replace("_", " ")}' if row.get('quantize') else ''
  size = f' of size {row["kv_head_dim"]}' if row.get('kv_head_dim') else ''
  lines = [
    f'{row["topology"]}: {row["chips"]} chips, each with'
    f' {chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s,'
    f' {chip.memory / GIB:.0f} GiB, links of {chip.links / 1e9:.0f} GB/s',
    f'model {row["model_partitions"]} x data {row["data_partitions"]} devices,'
    f' batch {row["batch_size"]}, input {row["input_length"]},'
    f' output {row["output_length"]}, {row["num_kv_heads"]} key/value heads{size},'
    f' {row["dtype"]}{int8}; compiled, per chip:',
    '',
    *_memory(row),
  ]
  if row['fits']:
    lines += ['', 'a step:', *_step(row)]
  return '\n'.join(lines)


def _memory(row: CompiledRow) -> list[str]:
  names = {
    'parameters_bytes': 'parameters',
    'optimizer_bytes': 'optimizer state',
    'cache_bytes': 'keys and values alone',
    'activation_bytes': 'activations and caches',
    'code_bytes': 'program',
  }
  held = {label: row[key] / GIB for key, label in names.items() if key in row}
  lines = [f'  {label:<26}{gib:>10.3f} GiB' for label, gib in held.items()]
  peak, capacity = row['hbm_peak_bytes'] / GIB, row['hbm_capacity_bytes'] / GIB
  verdict = 'fits' if row['fits'] else f'{peak - capacity:.2f} GiB too much'
  lines.append(f'  {"peak":<26}{peak:>10.3f} GiB of {capacity:.2f}: {verdict}')
  return lines


def _step(row: CompiledRow) -> list[str]:
  lines = [
    _line('compute', row['flops_per_step'] / 1e12, 'TFLOP', row['compute_ms']),
    _line('memory', row['hbm_bytes_per_step'] / 1e9, 'GB', row['memory_ms']),
    _line('links', row['collective_bytes_per_step'] / 1e9, 'GB', row['links_ms']),
  ]
  lines += [
    _line(f'  {kind}', nbytes / 1e9, 'GB')
    for kind, nbytes in sorted(row['collectives_per_step'].items())
  ]
  lines.append(f'  {"roofline":<26}{"":>16}{row["roofline_ms"]:>12.3f} ms')
  lines.append(_line("compiler's estimate", row['cycles_per_step'] / 1e6, 'Mcycles'))
  if row['mode'] == 'decode':
    ratio = row['hbm_bytes_per_step'] / row['least_bytes_per_step']
    flops, ms = row['prepare_flops'] / 1e12, row['prepare_roofline_ms']
    lines += [
      f'  {"memory / least possible":<26}{ratio:>10.3f}',
      _line('before the first step', flops, 'TFLOP', ms),
      f'  {"one sample":<26}{row["seconds_per_sample"]:>10.3f} s of one chip',
    ]
  return lines


def _line(name: str, value: float, unit: str, ms: float | None = None) -> str:
  line = f'  {name:<26}{value:>10.3f} {unit:<5}'
  return line if ms is None else f'{line}{ms:>12.3f} ms'
