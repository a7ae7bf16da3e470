"""What all commands share."""

import os
import subprocess
import sys

import pytest

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
