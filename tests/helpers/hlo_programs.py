"""Small compiled programs, written by hand, for tests of what they move."""

import string
import textwrap

from gqa_t5x.analysis.hlo import parse, traffic

ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""
_LOOP = string.Template("""
%body (s: (s32[], f32[256])) -> (s32[], f32[256]) {
  %s = (s32[], f32[256]{0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %old = s32[]{:S(6)} copy(%n)
  %step = s32[]{:S(6)} constant($step)
  %new = s32[]{:S(6)} add(%old, %step)
  %v = f32[256]{0} get-tuple-element(%s), index=1
  %w = f32[256]{0:S(1)} $work
  ROOT %t = (s32[], f32[256]{0}) tuple(%new, %w)
}

%condition (c: (s32[], f32[256])) -> pred[] {
  %c = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %end = s32[]{:S(6)} $end
  ROOT %less = pred[]{:S(6)} compare(%i, %end), direction=$direction
}
""")
_RUNS_LOOP = string.Template("""
%n = s32[]{:S(6)} $begin
%v = f32[256]{0:S(1)} parameter(0)
%s = (s32[], f32[256]{0}) tuple(%n, %v)
ROOT %w = (s32[], f32[256]{0}) while(%s), condition=%condition, body=%body$noted
""")
# What each round of it reads: the counter, twice, and 256 numbers.
LOOP_BYTES = 4 + 4 + 1024


def program(entry, computations=''):
  """A module for 8 devices.

  Args:
    entry: the lines of its entry, %main.
    computations: others that it calls.
  """
  lines = textwrap.indent(textwrap.dedent(entry).strip(), '  ')
  return parse.parse(
    f'HloModule test, is_scheduled=true, num_partitions=8\n{ADD}\n'
    f'{textwrap.dedent(computations)}\nENTRY %main () -> f32[] {{\n{lines}\n}}\n'
  )


def moved(entry, computations='', **kwargs):
  """Returns (bytes read, bytes written) of a program."""
  counted = traffic.count(program(entry, computations), **kwargs)
  return counted.read_bytes, counted.written_bytes


def loop(
  *,
  begin='constant(0)',
  end='constant(7)',
  step='1',
  direction='LT',
  noted='',
  work='negate(%v)',
):
  """`entry` and `computations` of a program that counts in a loop.

  Args:
    begin: what the counter begins with.
    end: what it is compared with.
    step: what is added to it each time.
    direction: of the comparison.
    noted: what the compiler notes of the loop.
    work: what each round makes of the array %v.
  """
  computations = _LOOP.substitute(end=end, step=step, direction=direction, work=work)
  return _RUNS_LOOP.substitute(begin=begin, noted=noted), computations
