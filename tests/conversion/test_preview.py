"""--dry_run: what would be converted, kept and dropped; nothing is written."""

import numpy as np
import pytest

from gqa_t5x import convert
from gqa_t5x.checkpoints import writer
from gqa_t5x.conversion import run as run_lib
from helpers.trees import (
  D,
  H,
  N,
  flat,
  tiny_shapes,
  tiny_state,
  write_msgpack,
)


def run(*args):
  return convert.main(['convert', *map(str, args)])


@pytest.fixture
def mha(tmp_path):
  tree = tiny_state(moments=False, decoder_layers=3)
  source = write_msgpack(tmp_path / 'mha' / 'checkpoint_1000', tree)
  (source / 'train_ds-000-of-001.index').write_text('')
  return source


def test_what_would_be_done(mha, tmp_path, capsys, monkeypatch):
  usage = type('usage', (), {'free': 123_456})
  monkeypatch.setattr(writer.shutil, 'disk_usage', lambda path: usage)
  before = sorted(tmp_path.rglob('*'))
  output = tmp_path / 'new' / 'gqa'
  flags = (f'--input={mha}', f'--output={output}', '--num_kv_heads=1')
  assert run(*flags, '--dry_run') == 0
  assert sorted(tmp_path.rglob('*')) == before
  lines = capsys.readouterr().out.splitlines()
  module = 'decoder/layers_{0..2}/%s/%s/kernel  [6, 8] -> [6, 2]  mean'
  names = ('encoder_decoder_attention', 'self_attention')
  assert lines[:5] == [
    f'Converted: 12 tensors, {12 * D * H * 4:,} bytes',
    *('  ' + module % (name, part) for name in names for part in ('key', 'value')),
  ]
  # The bytes of a model of N and of 1 heads, and 4 of the step.
  old, new = (
    4 + 4 * sum(int(np.prod(s)) for s in tiny_shapes(k, decoder_layers=3).values())
    for k in (N, 1)
  )
  kept = new - 12 * D * H * 4
  count = len(tiny_shapes(decoder_layers=3)) - 12 + 1  # and the step
  assert lines[5] == f'Kept: {count} tensors, {kept:,} bytes'
  assert '  decoder/layers_{0..2}/mlp/wi_0/kernel  [6, 5]' in lines
  assert '  encoder/layers_0/attention/key/kernel  [6, 8]' in lines
  assert '  token_embedder/embedding  [11, 6]' in lines
  assert '  state/step  []' in lines
  assert lines[-5:] == [
    'Dropped: train_ds-000-of-001.index',
    f'Checkpoint: {old:,} -> {new:,} bytes uncompressed, {old - new:,} saved',
    f'{old // 4 - 1:,} -> {new // 4 - 1:,} parameters; decode cache in bfloat16'
    # K and V, 3 layers, 4 or 1 heads of 2, 2 bytes.
    ' 96 -> 24 bytes per output token, 96 -> 24 bytes per input token',
    f'Disk at {output}/checkpoint_1000: {new:,} bytes needed at most, 123,456 free',
    'Nothing was written',
  ]


def test_no_output_is_needed(mha, capsys):
  assert run(f'--input={mha}', '--num_kv_heads=2', '--dry_run') == 0
  out = capsys.readouterr().out
  assert '  [6, 8] -> [6, 4]  mean\n' in out
  assert 'Disk at' not in out


def test_moments_say_what_becomes_of_them(tmp_path, capsys):
  source = write_msgpack(tmp_path / 'mha' / 'checkpoint_1000', tiny_state())
  assert run(f'--input={source}', '--num_kv_heads=2', '--dry_run') == 0
  out = capsys.readouterr().out.splitlines()
  kernel = 'decoder/layers_{0..1}/self_attention/key/kernel'
  how = 'v (6, 8) -> v (6, 4), summed over each group'
  assert f'  moments of {kernel}  {how}' in out
  others = len(tiny_shapes()) - 8  # K and V of self- and cross-attention, two layers
  assert f'  moments of these, {4 * others} tensors' in out
  assert not [line for line in out if 'param_states' in line]


def test_bad_input_is_found(mha, capsys):
  assert run(f'--input={mha}', '--num_kv_heads=3', '--dry_run') == 1
  assert 'is not divisible by num_kv_heads=3' in capsys.readouterr().err


def test_reads_shapes_only(mha, tmp_path):
  """A lost chunk is not noticed."""
  source = tmp_path / 'new' / 'checkpoint_1000'
  assert run(f'--input={mha}', f'--output={source}', '--num_kv_heads=4') == 0
  chunks = list(source.glob('target.*/[0-9]*'))
  assert len(chunks) == len(list(flat(tiny_state(moments=False, decoder_layers=3)))) - 1
  for chunk in chunks:
    chunk.unlink()
  assert run(f'--input={source}', '--num_kv_heads=2', '--dry_run') == 0


def test_layers_that_are_alike_are_one_line():
  entries = {f'target/a/layers_{i}/w': '[2]' for i in (0, 1, 10, 2)}
  entries |= {'target/b/layers_0/w': '[2]', 'target/a/layers_3/w': '[3]'}
  entries |= {'target/b/layers_5/w': '[2]', 'target/c': '[1]'}
  assert run_lib.group_layers(entries) == [
    'a/layers_{0,1,2,10}/w  [2]',
    'b/layers_{0,5}/w  [2]',
    'a/layers_3/w  [3]',
    'c  [1]',
  ]


def test_lines_of_24_layers_are_few():
  """A page, not hundreds of lines."""
  entries = {f'target/{p}': '' for p in tiny_shapes(decoder_layers=24)}
  lines = run_lib.group_layers(entries)
  assert len(lines) == len(tiny_shapes(decoder_layers=1))
  assert sum('{0..23}' in line for line in lines) == 14
