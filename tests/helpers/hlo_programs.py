"""Small programs for tests of what they move: of JAX functions, or written by hand."""

import textwrap

import jax

from gqa_t5x.analysis.hlo import parse, traffic

ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


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


def traced(function, *args):
  """The program of a JAX function as the compiler gets it."""
  lowered = jax.jit(function).lower(*args)
  return parse.parse(lowered.compiler_ir('hlo').get_hlo_module().to_string())


def moved(module, **kwargs):
  """Returns (bytes read, bytes written) of a program."""
  counted = traffic.count(module, **kwargs)
  return counted.read_bytes, counted.written_bytes
