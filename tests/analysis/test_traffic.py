"""What compiled programs move and compute, against numbers worked out by hand."""

import textwrap

import pytest

from gqa_t5x.analysis.hlo import traffic
from helpers.hlo_programs import LOOP_BYTES, loop, moved, program

NOTED = ', backend_config={"known_trip_count":{"n":"5"}}'


@pytest.mark.parametrize(
  ('change', 'trips'),
  [
    ({}, 7),
    ({'begin': 'constant(2)'}, 5),
    ({'begin': 'constant(9)'}, 0),
    # What the compiler notes comes first.
    ({'noted': NOTED}, 5),
    ({'noted': NOTED, 'end': 'get-tuple-element(%c), index=0'}, 5),
  ],
)
def test_loops_that_say_how_often_they_run(change, trips):
  assert moved(*loop(**change)) == (trips * LOOP_BYTES, 0)
  # Who counts may know better.
  assert moved(*loop(**change), trips={'body': 3}) == (3 * LOOP_BYTES, 0)
  with pytest.raises(ValueError, match='0 loops of the program may stop early'):
    traffic.main_loop(program(*loop(**change)))


@pytest.mark.parametrize(
  'change',
  [
    # Ends that no constant tells, and counters that do not count from one by one.
    {'end': 'get-tuple-element(%c), index=0'},
    {'direction': 'NE'},
    {'step': '2'},
    {'begin': 'parameter(1)'},
  ],
)
def test_loops_that_may_stop_early(change):
  assert moved(*loop(**change), trips={'body': 3}) == (3 * LOOP_BYTES, 0)
  message = 'Loop w may stop early; say how often body runs.'
  with pytest.raises(ValueError, match=message):
    moved(*loop(**change))
  assert traffic.main_loop(program(*loop(**change))) == 'body'


def test_a_loop_in_a_loop():
  outer = """
  %outer (s: (s32[], f32[256])) -> (s32[], f32[256]) {
    %s = (s32[], f32[256]{0}) parameter(0)
    %n = s32[] get-tuple-element(%s), index=0
    %one = s32[]{:S(6)} constant(1)
    %new = s32[]{:S(6)} add(%n, %one)
    %v = f32[256]{0} get-tuple-element(%s), index=1
    %zero = s32[]{:S(6)} constant(0)
    %into = (s32[], f32[256]{0}) tuple(%zero, %v)
    %run = (s32[], f32[256]{0}) while(%into), condition=%condition, body=%body
    %w = f32[256]{0} get-tuple-element(%run), index=1
    ROOT %t = (s32[], f32[256]{0}) tuple(%new, %w)
  }
  %outer_condition (c: (s32[], f32[256])) -> pred[] {
    %c = (s32[], f32[256]{0}) parameter(0)
    %i = s32[] get-tuple-element(%c), index=0
    %end = s32[]{:S(6)} constant(4)
    ROOT %less = pred[]{:S(6)} compare(%i, %end), direction=LT
  }
  """
  entry = """
  %n = s32[]{:S(6)} constant(0)
  %v = f32[256]{0:S(1)} parameter(0)
  %s = (s32[], f32[256]{0}) tuple(%n, %v)
  ROOT %w = (s32[], f32[256]{0}) while(%s), condition=%outer_condition, body=%outer
  """
  _, inner = loop(end='constant(3)')
  # Each round of the outer loop reads its own counter twice.
  expected = 4 * (3 * LOOP_BYTES + 4 + 4)
  assert moved(entry, inner + textwrap.dedent(outer)) == (expected, 0)


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
  assert moved(body, called) == (16384, 0)


def test_cycles_are_those_that_the_compiler_notes():
  noted = ', backend_config={"window_config":{"estimated_cycles":"120"}}'
  counted = traffic.count(program(*loop(work='negate(%v)' + noted)))
  assert counted.cycles == 7 * 120
  assert traffic.count(program(*loop())).cycles == 0


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
  assert moved(body, branches) == (16384, 0)


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


def test_collectives_of_a_loop_count_as_often_as_it_runs():
  summed = 'all-reduce(%v), replica_groups=[4,2]<=[8], to_apply=%add'
  counted = traffic.count(program(*loop(work=summed)))
  assert counted.collectives == {'all-reduce': 7 * 1024}  # 2 * 1 / 2 of 1024 bytes.


# Shapes of %x and %y, what is made of them, and its multiply-adds.
# fmt: off
PRODUCTS = [
  # A batch of 4, 3 x 5 by 5 x 7.
  ('[4,3,5] [4,5,7]',
   '%z = f32[4,3,7] dot(%x, %y), lhs_batch_dims={0}, lhs_contracting_dims={2}',
   4 * 3 * 5 * 7),
  # 3 x 5 by 5 x 7.
  ('[3,5] [5,7]', '%z = f32[3,7] convolution(%x, %y), dim_labels=bf_io->bf', 3 * 5 * 7),
  ('[3,5] [7,5]', '%z = f32[3,7] convolution(%x, %y), dim_labels=bf_oi->bf', 3 * 5 * 7),
  # A batch of 4 such products, as TPU programs write them: its positions are those of
  # a window as large as the batch, of which one each is within the array.
  ('[4,3,5] [4,5,7]',
   '%z = f32[4,3,7] convolution(%x, %y),'
   ' window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf',
   4 * 3 * 5 * 7),
  # An ordinary convolution over 6 positions by 3, padded by 1: 2 + 4 * 3 + 2 meet.
  ('[2,6,5] [3,5,7]',
   '%z = f32[2,6,7] convolution(%x, %y), window={size=3 pad=1_1},'
   ' dim_labels=b0f_0io->b0f',
   2 * 5 * 7 * 16),
  # Every second of them, padded on one side only: 2 + 3 + 3 meet.
  ('[2,6,5] [3,5,7]',
   '%z = f32[2,3,7] convolution(%x, %y), window={size=3 stride=2 pad=1_0},'
   ' dim_labels=b0f_0io->b0f',
   2 * 5 * 7 * 8),
  # The window skips every second position, and cuts off the first two: positions 2
  # and 4, 3 and 5, and 4 alone.
  ('[2,6,5] [2,5,7]',
   '%z = f32[2,3,7] convolution(%x, %y), window={size=2 pad=-2_1 rhs_dilate=2},'
   ' dim_labels=b0f_0io->b0f',
   2 * 5 * 7 * 5),
  # In two dimensions: 4 x 3 windows of 2 x 1.
  ('[1,5,3,5] [2,1,5,7]',
   '%z = f32[1,4,3,7] convolution(%x, %y), window={size=2x1},'
   ' dim_labels=b01f_01io->b01f',
   5 * 7 * 4 * 3 * 2),
  # Groups: a feature of the output comes from 5 of the 10 of the input.
  ('[3,10] [5,14]',
   '%z = f32[3,14] convolution(%x, %y), feature_group_count=2, dim_labels=bf_io->bf',
   3 * 5 * 14),
  # A batch of 4 is 2 of 2.
  ('[4,5] [5,14]',
   '%z = f32[2,14] convolution(%x, %y), batch_group_count=2, dim_labels=bf_io->bf',
   2 * 5 * 14),
  # What a kernel says of itself.
  ('[2,3,5] [2,5,7]',
   '%kernel = f32[2,3,7] custom-call(%x, %y), custom_call_target="tpu_custom_call",'
   ' backend_config={"custom_call_config":{"cost_estimate":{"flops":"1234"}}}',
   617),
  # softmax(x) y: a kernel of the compiler itself, which says nothing.
  ('[2,3,5] [2,5,7]',
   '%online-softmax.1 = f32[2,3,7] custom-call(%x, %y),'
   ' custom_call_target="tpu_custom_call"',
   2 * 3 * 5 * 7),
  ('[2,3] [5]', '%z = f32[2] custom-call(%x, %y), custom_call_target="Other"', 0),
  ('[2,3] [2,3]', '%z = f32[2,3] add(%x, %y)', 0),
]
# fmt: on


@pytest.mark.parametrize(('shapes', 'line', 'multiply_adds'), PRODUCTS)
def test_flops(shapes, line, multiply_adds):
  left, right = shapes.split()
  entry = f"""
  %x = f32{left} parameter(0)
  %y = f32{right} parameter(1)
  ROOT {line}
  """
  assert traffic.count(program(entry)).flops == 2 * multiply_adds


def test_flops_in_fusions():
  fused = """
  %inner (r: f32[5,7]) -> f32[5,7] {
    %r = f32[5,7] parameter(0)
    ROOT %s = f32[5,7] negate(%r)
  }
  %fused (p: f32[3,5], q: f32[5,7]) -> f32[3,7] {
    %p = f32[3,5] parameter(0)
    %q = f32[5,7] parameter(1)
    %new = f32[5,7] fusion(%q), kind=kLoop, calls=%inner
    ROOT %z = f32[3,7] convolution(%p, %new), dim_labels=bf_io->bf
  }
  """
  entry = """
  %x = f32[3,5] parameter(0)
  %y = f32[5,7] parameter(1)
  ROOT %z = f32[3,7] fusion(%x, %y), kind=kOutput, calls=%fused
  """
  assert traffic.count(program(entry, fused)).flops == 2 * 3 * 5 * 7
