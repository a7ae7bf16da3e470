"""What all commands share."""

import os
import pathlib
import subprocess
import sys

import pytest

from gqa_t5x.command_line import Command

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMANDS = sorted(
  '.'.join(file.relative_to(ROOT).with_suffix('').parts).removesuffix('.__main__')
  for file in (ROOT / 'gqa_t5x').rglob('*.py')
  if "__name__ == '__main__'" in file.read_text()
)
HELP = """
import runpy, sys
module = sys.argv[1]
sys.argv[1:] = ['--help']
try:
  runpy.run_module(module, run_name='__main__')
except SystemExit as end:
  heavy = {'tensorflow', 'seqio', 't5x', 't5', 'clu', 'matplotlib', 'sklearn'}
  print('ends with', end.code, heavy & sys.modules.keys() or 'nothing heavy')
"""
PROGRAM = """
import sys
from gqa_t5x.command_line import Command
sys.exit(Command('x', '± of x').run(sys.argv, lambda args: print('µs in Ω/█')))
"""


@pytest.mark.parametrize(
  ('encoding', 'printed'),
  [
    ('ascii', r'\xb5s in \u03a9/\u2588'),
    ('latin-1', r'µs in \u03a9/\u2588'),
    ('utf-8', 'µs in Ω/█'),
  ],
)
def test_signs_that_a_terminal_does_not_know(encoding, printed):
  """A command that has worked does not fail because of them."""

  def said(*flags):
    return subprocess.run(
      [sys.executable, '-c', PROGRAM, *flags],
      env=os.environ | {'PYTHONIOENCODING': encoding},
      capture_output=True,
      check=True,
    ).stdout.decode(encoding)

  assert said() == printed + '\n'
  assert 'of x\nFlags:' in said('--help')


@pytest.mark.parametrize('module', COMMANDS)
def test_help_waits_for_nothing(module):
  done = subprocess.run(
    [sys.executable, '-c', HELP, module], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stderr == ''
  assert 'Flags:' in done.stdout
  assert done.stdout.endswith('\nends with 0 nothing heavy\n')


def test_every_command_is_tested():
  assert len(COMMANDS) == 10
  assert 'gqa_t5x.reproduce' in COMMANDS


@pytest.mark.parametrize('number', ['2147483648', 30 * '9'])
def test_numbers_are_not_too_large(number, capsys):
  command = Command('x', 'x')
  command.whole('jobs', 1, 'How many.')
  assert command.run(['x', f'--jobs={number}'], lambda args: 0) == 1
  said = capsys.readouterr().err
  assert said.endswith(f'--jobs={number}: must be at most 2147483647.\n')


def test_what_is_empty_is_not_what_is_left_out(capsys):
  command = Command('x', 'x')
  command.text('statistics', None, 'A file.')
  command.words('sizes', 'base', 'Names.')
  command.texts('more', [], 'Names.')
  assert command.run(['x'], lambda args: 0) == 0
  for name in ('statistics', 'sizes'):
    assert command.run(['x', f'--{name}='], lambda args: 0) == 1
    said = f'error: --{name} is missing its value; give one, or leave the flag out.\n'
    assert capsys.readouterr().err == said
    command.values.unparse_flags()
    command.values[name].present = 0
