"""Training and decoding compiled for TPUs: what fits, what is read, what is sent.

Run by `make test-tpu`. Layers are few, but as wide as T5.1.1-XXL's, and caches are
larger than what fits on a chip outside of its HBM.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa_t5x import tpu_compile
from gqa_t5x.analysis.costs import formulas
from gqa_t5x.analysis.hlo import parse, traffic
from gqa_t5x.analysis.tpu import topology
from gqa_t5x.model import network

pytestmark = pytest.mark.tpu

TINY, GIN = '--size=tiny', '--gin_file=gin/local/uptrain_gqa2.gin'
XXL = ['--size=xxl', '--num_layers=1', '--batch_size=64', '--input_length=2048']


def compiled(folder, *args, code=0):
  """Runs the command in this process; returns its object and the program's text."""
  row, text = folder / 'row.json', folder / 'program.txt'
  argv = ['tpu_compile', *args, f'--json={row}', f'--hlo={text}']
  assert tpu_compile.main(argv) == code
  return json.loads(row.read_text()), text.read_text() if text.exists() else ''


@pytest.mark.parametrize('chips', ['v4:2x2x1', 'v5e:2x2'])
def test_training(tmp_path, chips):
  row, text = compiled(tmp_path, f'--topology={chips}', GIN)
  assert text.startswith('HloModule')
  assert row['fits']
  assert row['source'] == 'compiled'
  assert row['command'].startswith('python -m gqa_t5x.tpu_compile --topology=')
  assert (row['chips'], row['data_partitions'], row['model_partitions']) == (4, 4, 1)
  cfg = network.config('tiny', num_kv_heads=2, vocab_size=4096)  # gin/local
  assert row['parameters_bytes'] == 4 * formulas.num_parameters(cfg)
  assert 0 < row['optimizer_bytes'] < 0.1 * row['parameters_bytes']
  arguments = row['parameters_bytes'] + row['optimizer_bytes']
  assert arguments < row['argument_bytes'] < 1.1 * arguments
  # Every chip trains on 4 of the 16 rows; all add up their gradients, and little else.
  flops = formulas.training_step(
    cfg, 4, row['input_length'], row['output_length']
  ).flops
  assert row['flops_per_step'] == pytest.approx(flops, rel=0.02)
  sent = 2 * 3 / 4 * row['parameters_bytes']
  assert sent <= row['collective_bytes_per_step'] <= 1.1 * sent
  times = [row[f'{name}_ms'] for name in ('compute', 'memory', 'links')]
  assert row['roofline_ms'] == max(times)


@pytest.mark.parametrize('chips', ['v4:2x2x1', 'v5e:2x2'])
def test_decoding(tmp_path, chips):
  words = f'--topology={chips}', TINY, '--num_kv_heads=4', '--num_layers=2'
  row, _ = compiled(tmp_path, *words)
  assert row['fits']
  assert (row['data_partitions'], row['model_partitions']) == (1, 4)
  assert row['cache_bytes'] == 2 * 2 * 4 * 16 * 2 * 8 * (512 + 64) / 4
  total = row['prepare_roofline_ms'] + 64 * row['roofline_ms']
  assert row['seconds_per_sample'] == pytest.approx(1e-3 * total * 4 / 8)


@pytest.mark.parametrize('K', [64, 8, 1])
@pytest.mark.parametrize('chips', ['v4:2x2x2', 'v5e:2x4'])
def test_a_step_in_int8(tmp_path, K, chips):
  """12% more than it must, so that no copy of keys, values or kernels in bfloat16."""
  words = f'--topology={chips}', *XXL, f'--num_kv_heads={K}'
  row, _ = compiled(tmp_path, *words, '--quantize=weights_and_cache')
  assert row['fits']
  exact, _ = compiled(tmp_path, *words)
  assert row['least_bytes_per_step'] < 0.56 * exact['least_bytes_per_step']
  assert row['hbm_bytes_per_step'] <= 1.12 * row['least_bytes_per_step']
  embedding = 32128 * 4096 * 2 / 8  # It stays as it is: a step reads little of it.
  whole, halved = (r['parameters_bytes'] - embedding for r in (exact, row))
  assert halved < 0.52 * whole


@pytest.mark.parametrize(('K', 'R'), [(64, 64), (8, 64), (1, 64), (1, 512)])
@pytest.mark.parametrize('chips', ['v4:2x2x2', 'v5e:2x4'])
def test_a_step_reads_little_more_than_it_must(tmp_path, K, R, chips):
  """The parameters once and the keys and values once: 15% more at most."""
  heads = f'--num_kv_heads={K}', f'--kv_head_dim={R}'
  row, text = compiled(tmp_path, f'--topology={chips}', *XXL, *heads)
  cfg = network.config('xxl', num_kv_heads=K, kv_head_dim=R, dtype=jnp.bfloat16)
  layers = {'num_encoder_layers': 1, 'num_decoder_layers': 1}
  cfg = network.T5Config(**(vars(cfg) | layers))
  least = formulas.decode_step(cfg, 64, 2048, 64, param_itemsize=2).bytes / 8
  assert row['least_bytes_per_step'] == pytest.approx(least)
  assert row['hbm_bytes_per_step'] <= 1.15 * least
  # Of what is read, at most a chip's own memory is left out.
  assert row['hbm_bytes_per_step'] >= least - 128 * 2**20
  # No keys and values travel: nothing as large as those of one input.
  module = parse.parse(text)
  loop = traffic.main_loop(module)
  body = module.computations[traffic.main_loop(module, loop)]
  kinds = ('all-gather', 'all-to-all', 'collective-permute')
  moved = [i for i in body.instructions.values() if i.opcode.startswith(kinds)]
  of_one_input = 2048 * R * min(K, 8)
  assert all(np.prod(s.dims) < of_one_input for i in moved for s in i.shapes)


def test_time_goes_with_bytes(tmp_path):
  """Between MHA and GQA-8: nothing but memory bounds a step."""
  mha, gqa = (
    compiled(tmp_path, '--topology=v4:2x2x2', *XXL, f'--num_kv_heads={K}')[0]
    for K in (64, 8)
  )
  times = mha['roofline_ms'] / gqa['roofline_ms']
  assert times == pytest.approx(
    mha['hbm_bytes_per_step'] / gqa['hbm_bytes_per_step'], rel=0.15
  )
  assert times > 3
  # Nor does XLA multiply element by element what it reads, which would take 3 times.
  assert mha['cycles_per_step'] < 2 * 1050e6 * mha['memory_ms'] / 1e3


def test_rows_of_the_cache_are_split_where_heads_cannot_be(tmp_path):
  args = '--topology=v4:2x2x2', *XXL, '--num_kv_heads=1'
  by_rule, _ = compiled(tmp_path, *args)
  replicated, _ = compiled(tmp_path, *args, '--kv_sharding=replicated')
  cache = 8 * by_rule['cache_bytes']  # Every chip reads all, not an eighth.
  more = replicated['hbm_bytes_per_step'] - by_rule['hbm_bytes_per_step']
  assert more == pytest.approx(7 / 8 * cache, rel=0.1)
  assert by_rule['collectives_per_step']['all-to-all'] > 0


@pytest.mark.parametrize('chips', ['v4:2x2x2', 'v5e:2x4'])
def test_a_joint_latent_would_be_read_twice(chips):
  """Why keys and values have a latent each: docs/conversion.md."""
  B, N, S, R = 32, 64, 2048, 512
  place = jax.sharding.SingleDeviceSharding(topology.devices(chips)[0])

  def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

  def attend(q, k, v):
    logits = jnp.einsum('BNR,BRS->BNS', q, k, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(logits).astype(q.dtype)
    return jnp.einsum('BNS,BSR->BNR', probs, v)

  def share_read(layer, q, *kept):
    def layers(q, kept):  # Each reads its own keys and values.
      for arrays in kept:
        q = layer(q, *arrays)
      return q

    compiled = jax.jit(layers).lower(q, [kept] * 4).compile().as_text()
    cache = 4 * 2 * B * S * R * 2  # bytes, of either form
    return traffic.count(parse.parse(compiled)).read_bytes / cache

  apart = share_read(attend, array(B, N, R), array(B, R, S), array(B, S, R))
  joint = share_read(
    lambda q, c: attend(q, jnp.swapaxes(c, 1, 2), c),
    array(B, N, 2 * R),
    array(B, S, 2 * R),
  )
  assert apart < 1.3
  assert joint > 1.9


def test_what_does_not_fit(tmp_path, capsys):
  args = ['--size=xxl', '--num_layers=1', '--batch_size=4096', '--input_length=8192']
  row, text = compiled(tmp_path, '--topology=v5e:2x2', *args, code=2)
  assert not row['fits']
  assert text == ''
  assert row['hbm_peak_bytes'] > row['hbm_capacity_bytes'] == 15.75 * 2**30
  assert 'GiB too much' in capsys.readouterr().out


def test_search(tmp_path, capsys):
  words = '--topology=v5e:2x2', TINY, '--num_layers=1', '--max_batch_per_chip=2'
  row, _ = compiled(tmp_path, *words, '--search')
  tried = capsys.readouterr().err.strip().split('\n')
  assert [line.partition(',')[0] for line in tried] == [
    'model 4 x data 1',
    'model 2 x data 2',
    'model 1 x data 4',
  ]
  assert all('batch 8:' in line for line in tried)
  best = min(float(line.split(', ')[-1].split()[0]) for line in tried)
  assert row['seconds_per_sample'] == pytest.approx(best, abs=5e-4)


@pytest.mark.parametrize('chips', ['v4:2x2x1', 'v5e:2x2'])
@pytest.mark.parametrize(
  ('expression', 'left', 'right'),
  [
    ('BD,DF->BF', (256, 512), (512, 1024)),
    ('BKGH,BKHS->BKGS', (16, 8, 8, 64), (16, 8, 64, 512)),
    ('BKGS,BKSH->BKGH', (16, 8, 8, 512), (16, 8, 512, 64)),
  ],
)
def test_flops_are_those_of_the_compiler(chips, expression, left, right):
  mesh = Mesh(np.array(topology.devices(chips)[:1]), ('x',))
  whole = NamedSharding(mesh, PartitionSpec())
  shapes = [
    jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=whole) for s in (left, right)
  ]
  program = jax.jit(lambda x, y: jnp.einsum(expression, x, y)).lower(*shapes).compile()
  counted = traffic.count(parse.parse(program.as_text()))
  assert counted.flops == pytest.approx(program.cost_analysis()['flops'], rel=0.01)


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (
      [TINY, '--topology=v4:3x5x7'],
      'topology=v4:3x5x7: the compiler knows no such slice',
    ),
    (
      [TINY, '--model_partitions=3'],
      'model_partitions=3 does not divide the 4 devices of v4:2x2x1.',
    ),
    (
      [TINY, '--model_partitions=1', '--batch_size=6'],
      'batch_size=6 is not divisible by the 4 copies of the model',
    ),
    ([TINY, '--num_kv_heads=2', '--kv_sharding=heads'], "kv_sharding='heads'"),
    ([GIN, '--gin.MODEL_PARTITIONS=3'], 'num_partitions=3'),
    (
      [GIN, '--gin.BATCH_SIZE=6'],
      'BATCH_SIZE=6 is not divisible by the 4 copies of the model on v4:2x2x1',
    ),
  ],
)
def test_bad_input(capsys, args, message):
  assert tpu_compile.main(['tpu_compile', '--topology=v4:2x2x1', *args]) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert message in error
  assert error.count('\n') == 1
