"""Small compiled programs, written by hand, for tests of what they move."""

import textwrap

from gqa_t5x.analysis.hlo import parse, traffic

ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def program(body, more=''):
  """A module for 8 devices whose entry has the given lines."""
  lines = textwrap.indent(textwrap.dedent(body).strip(), '  ')
  return parse.parse(
    f'HloModule test, is_scheduled=true, num_partitions=8\n{ADD}\n'
    f'{textwrap.dedent(more)}\nENTRY %main () -> f32[] {{\n{lines}\n}}\n'
  )


def moved(body, more='', **kwargs):
  """Returns (bytes read, bytes written) of a program."""
  counted = traffic.count(program(body, more), **kwargs)
  return counted.read_bytes, counted.written_bytes
