"""What programs move and compute, by hand and by XLA."""

import collections
import functools

import jax
import jax.numpy as jnp
import pytest

from gqa_t5x.analysis.hlo import traffic
from helpers.hlo_programs import moved, program, traced

NOTED = ', backend_config={"known_trip_count":{"n":"5"}}'
# Of each round of the loops below: `+ 1` and `< 7` read two integers each and write an
# integer and a bool; the array is 1024 bytes.
READ, WRITTEN = 4 * 4 + 1024, 4 + 1 + 1024


def loop(goes_on=lambda i, n: i < 7, begin=0, step=1, change=jnp.negative):
  """A program that counts in a loop, and changes 256 numbers in each round."""

  def run(x, n):
    return jax.lax.while_loop(
      lambda state: goes_on(state[0], n),
      lambda state: (state[0] + step, change(state[1])),
      (n if begin is None else begin, x),
    )

  return traced(run, jnp.zeros(256), 3)


@pytest.mark.parametrize(('begin', 'rounds'), [(0, 7), (2, 5), (9, 0)])
def test_loops_that_say_how_often_they_run(begin, rounds):
  module = loop(begin=begin)
  assert moved(module) == (rounds * READ, rounds * WRITTEN)
  with pytest.raises(ValueError, match='0 loops of the program may stop early'):
    traffic.main_loop(module)


@pytest.mark.parametrize(
  'change',
  [
    # Ends that no constant tells, and counters that do not count from one by one.
    {'goes_on': lambda i, n: i < n},
    {'goes_on': lambda i, n: i != 7},
    {'step': 2},
    {'begin': None},
  ],
)
def test_loops_that_may_stop_early(change):
  module = loop(**change)
  name = traffic.main_loop(module)
  assert moved(module, trips={name: 3}) == (3 * READ, 3 * WRITTEN)
  with pytest.raises(ValueError, match=f'may stop early; say how often {name} runs.'):
    moved(module)


def test_what_the_compiler_notes_of_a_loop_comes_first():
  computations = """
  %body (s: (s32[])) -> (s32[]) {
    %s = (s32[]) parameter(0)
    %n = s32[] get-tuple-element(%s), index=0
    %negative = s32[] negate(%n)
    ROOT %t = (s32[]) tuple(%negative)
  }
  %condition (c: (s32[])) -> pred[] {
    ROOT %always = pred[] constant(true)
  }
  """
  entry = """
  %n = s32[] parameter(0)
  %s = (s32[]) tuple(%n)
  ROOT %w = (s32[]) while(%s), condition=%condition, body=%body"""
  module = program(entry + NOTED, computations)
  assert moved(module) == (5 * 4, 5 * 4)
  # Who counts may know better.
  assert moved(module, trips={'body': 3}) == (3 * 4, 3 * 4)


def test_a_loop_in_a_loop():
  def three_times(x):
    state = 0, x
    return jax.lax.while_loop(
      lambda state: state[0] < 3, lambda state: (state[0] + 1, -state[1]), state
    )[1]

  # Each round of the outer loop counts as well.
  expected = 7 * (3 * READ + 4 * 4), 7 * (3 * WRITTEN + 4 + 1)
  assert moved(loop(change=three_times)) == expected


def test_all_counts_are_multiplied():
  counts = (1, 2, 3, 4)
  once = traffic.Traffic(*counts, collections.Counter({'all-reduce': 5}))
  seven = traffic.Traffic(7, 14, 21, 28, collections.Counter({'all-reduce': 35}))
  assert once * 7 == seven


@pytest.mark.parametrize(
  'line',
  [
    'ROOT %y = f32[16,256]{1,0:S(1)} call(%x), to_apply=%twice',
    '%s = ((f32[16,256]), f32[16,256]{1,0:S(1)}, s32[]) async-start(%x), calls=%twice\n'
    'ROOT %y = f32[16,256]{1,0:S(1)} async-done(%s)',
  ],
)
def test_calls(line):
  called = """
  %twice (p: f32[16,256]) -> f32[16,256] {
    %p = f32[16,256]{1,0} parameter(0)
    ROOT %sum = f32[16,256]{1,0:S(1)} add(%p, %p)
  }
  """
  body = f'%x = f32[16,256]{{1,0}} parameter(0)\n{line}'
  assert moved(program(body, called)) == (16384, 0)


def test_cycles_are_those_that_the_compiler_notes():
  entry = """
  %x = f32[256] parameter(0)
  ROOT %y = f32[256] negate(%x)"""
  noted = ', backend_config={"window_config":{"estimated_cycles":"120"}}'
  assert traffic.count(program(entry + noted)).cycles == 120
  assert traffic.count(program(entry)).cycles == 0


def test_a_conditional_counts_its_costlier_branch():
  branches = """
  %small (p: f32[16,256]) -> f32[] {
    %p = f32[16,256]{1,0} parameter(0)
    ROOT %zero = f32[]{:S(6)} constant(0)
  }
  %large (q: f32[16,256]) -> f32[] {
    %q = f32[16,256]{1,0} parameter(0)
    %zero = f32[]{:S(6)} constant(0)
    ROOT %sum = f32[]{:S(6)} reduce(%q, %zero), dimensions={0,1}, to_apply=%add
  }
  """
  body = """
  %x = f32[16,256]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  ROOT %y = f32[]{:S(6)} conditional(%i, %x, %x), branch_computations={%small, %large}
  """
  assert moved(program(body, branches)) == (16384, 0)


@pytest.mark.parametrize(
  ('kind', 'attributes', 'expected'),
  [
    # 4096 numbers of 4 bytes, among 4 devices.
    ('all-gather', 'replica_groups={{0,1,2,3}}, dimensions={0}', 3 * 16384),
    ('reduce-scatter', 'replica_groups={{0,1,2,3}}, to_apply=%add', 12288),
    ('all-reduce', 'replica_groups={{0,1,2,3}}, to_apply=%add', 24576),
    ('all-to-all', 'replica_groups={{0,1,2,3}}, dimensions={0}', 12288),
    ('collective-permute', 'source_target_pairs={{0,1},{1,0}}', 16384),
  ],
)
def test_collectives(kind, attributes, expected):
  at_once = f"""
  %x = f32[4096] parameter(0)
  ROOT %y = f32[4096] {kind}(%x), {attributes}
  """
  counted = traffic.count(program(at_once))
  assert counted.collectives == {kind: expected}
  asynchronous = f"""
  %x = f32[4096] parameter(0)
  %s = (f32[4096], f32[4096]) {kind}-start(%x), {attributes}
  ROOT %y = f32[4096] {kind}-done(%s)
  """
  assert traffic.count(program(asynchronous)) == counted


def all_reduced(groups):
  """Bytes received when 4096 numbers of 4 bytes are added up."""
  counted = traffic.count(
    program(f"""
    %x = f32[4096] parameter(0)
    ROOT %y = f32[4096] all-reduce(%x){groups}, to_apply=%add
    """)
  )
  return counted.collectives['all-reduce']


@pytest.mark.parametrize(
  ('groups', 'size'),
  [
    ('{{0,1,2,3},{4,5,6,7}}', 4),
    ('[2,4]<=[8]', 4),
    ('[2,4]<=[4,2]T(1,0)', 4),
    ("mesh['a'=2,'b'=4] {'b'}", 4),
    ("mesh['a'=2,'b'=2] {'a','b'}", 4),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", 4),
    # A part of an axis: 8 devices in two groups.
    ("mesh['a'=8] {'a':(2)4}", 4),
    ('{}', 8),
  ],
)
def test_groups(groups, size):
  received = 2 * (size - 1) / size * 16384
  assert all_reduced(f', replica_groups={groups}') == received


def test_without_groups_all_8_devices_take_part():
  assert all_reduced('') == 2 * 7 / 8 * 16384


def test_groups_that_are_written_in_no_known_way():
  with pytest.raises(ValueError, match=r'y: replica_groups=\[8\], to_apply=%add'):
    all_reduced(', replica_groups=[8]')


@pytest.mark.parametrize(
  ('view', 'kept', 'expected'),
  [
    ('bitcast', 'dynamic-slice(%view, %i)', {'reduce-scatter': 2 * 12288}),
    # All of the second sum is kept, or something else is made of it.
    ('bitcast', 'bitcast(%view)', {'all-reduce': 2 * 24576}),
    ('negate', 'dynamic-slice(%view, %i)', {'all-reduce': 2 * 24576}),
  ],
)
def test_a_sum_of_which_a_part_is_kept_is_a_reduce_scatter(view, kept, expected):
  fused = f"""
  %fused (p: f32[4096], q: f32[4096]) -> (f32[1024], f32[1024]) {{
    %p = f32[4096]{{0}} parameter(0)
    %q = f32[4096]{{0}} parameter(1)
    %sum = (f32[4096], f32[4096]) all-reduce(%p, %q), replica_groups=[1,4]<=[4]
    %i = s32[] constant(0)
    %a = f32[4096]{{0}} get-tuple-element(%sum), index=0
    %b = f32[4096]{{0}} get-tuple-element(%sum), index=1
    %c = f32[1024]{{0}} dynamic-slice(%a, %i)
    %view = f32[4096]{{0}} {view}(%b)
    %d = f32[1024]{{0}} {kept}
    ROOT %parts = (f32[1024]{{0}}, f32[1024]{{0}}) tuple(%c, %d)
  }}
  """
  entry = """
  %x = f32[4096]{0} parameter(0)
  %y = f32[4096]{0} parameter(1)
  ROOT %z = (f32[1024]{0}, f32[1024]{0}) fusion(%x, %y), calls=%fused
  """
  counted = traffic.count(program(entry, fused))
  assert counted.collectives == expected
  assert (counted.read_bytes, counted.written_bytes) == (2 * 16384, 2 * 4096)


# A product for each of a batch of 4, as TPU programs write it: of the positions of its
# window, as large as the batch, one is within the array.
BATCH = {
  'dimension_numbers': ('WNC', 'WIO', 'WNC'),
  'window_strides': [3],
  'lhs_dilation': [4],
}


@pytest.mark.parametrize(
  ('left', 'right', 'options'),
  [
    ((3, 5), (5, 7), {'dimension_numbers': ('NC', 'IO', 'NC')}),
    ((3, 5), (7, 5), {'dimension_numbers': ('NC', 'OI', 'NC')}),
    ((4, 3, 5), (4, 5, 7), BATCH),
    # Convolutions.
    ((2, 6, 5), (3, 5, 7), {'padding': [(1, 1)]}),
    ((2, 6, 5), (3, 5, 7), {'padding': [(1, 0)], 'window_strides': [2]}),
    ((2, 6, 5), (2, 5, 7), {'padding': [(-2, 1)], 'rhs_dilation': [2]}),
    ((1, 5, 3, 5), (2, 1, 5, 7), {}),
    ((3, 10), (5, 14), {'feature_group_count': 2}),
    ((4, 5), (5, 14), {'batch_group_count': 2}),
  ],
)
def test_flops_of_convolutions_are_xlas(left, right, options):
  where = 'HW'[: len(left) - 2]
  by_default = {
    'window_strides': [1] * len(where),
    'padding': [(0, 0)] * len(where),
    'dimension_numbers': (f'N{where}C', f'{where}IO', f'N{where}C'),
  }
  convolve = functools.partial(jax.lax.conv_general_dilated, **by_default | options)
  arrays = jnp.zeros(left), jnp.zeros(right)
  expected = jax.jit(convolve).lower(*arrays).cost_analysis()['flops']
  assert traffic.count(traced(convolve, *arrays)).flops == expected > 0


def test_flops_of_a_product():
  module = traced(jnp.matmul, jnp.zeros((4, 3, 5)), jnp.zeros((4, 5, 7)))
  assert traffic.count(module).flops == 2 * 4 * 3 * 5 * 7


@pytest.mark.parametrize(
  ('line', 'flops'),
  [
    # What a kernel says of itself.
    (
      '%kernel = f32[2,3,7] custom-call(%x, %y), custom_call_target="tpu_custom_call",'
      ' backend_config={"custom_call_config":{"cost_estimate":{"flops":"1234"}}}',
      1234,
    ),
    # softmax(x) y: a kernel of the compiler itself, which says nothing.
    (
      '%online-softmax.1 = f32[2,3,7] custom-call(%x, %y),'
      ' custom_call_target="tpu_custom_call"',
      2 * 2 * 3 * 5 * 7,
    ),
    ('%z = f32[2,3,7] custom-call(%x, %y), custom_call_target="Other"', 0),
  ],
)
def test_flops_of_kernels(line, flops):
  entry = f"""
  %x = f32[2,3,5] parameter(0)
  %y = f32[2,5,7] parameter(1)
  ROOT {line}
  """
  assert traffic.count(program(entry)).flops == flops


def test_flops_in_fusions():
  fused = """
  %fused (p: f32[3,5], q: f32[5,7]) -> f32[3,7] {
    %p = f32[3,5] parameter(0)
    %q = f32[5,7] parameter(1)
    %new = f32[5,7] negate(%q)
    ROOT %z = f32[3,7] convolution(%p, %new), dim_labels=bf_io->bf
  }
  """
  entry = """
  %x = f32[3,5] parameter(0)
  %y = f32[5,7] parameter(1)
  ROOT %z = f32[3,7] fusion(%x, %y), kind=kOutput, calls=%fused
  """
  assert traffic.count(program(entry, fused)).flops == 2 * 3 * 5 * 7
