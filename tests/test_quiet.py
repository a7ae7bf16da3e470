"""Lines that mean nothing are left out; all others pass."""

import os
import subprocess
import sys

LINES = {
  'WARNING: All log messages before absl::InitializeLog() is called are written': False,
  'I0000 cudart_stub.cc:31] Could not find cuda drivers on your machine': False,
  'Failed to find host bounds: could not determine TPU accelerator type': False,
  '=== Source Location Trace: ===': False,
  'learning/45eac/tfrc/runtime/libtpu_init_utils.cc:327': False,
  'E0000 some.cc:1] a fault': True,
}
PROGRAM = """
import os, sys
from gqa_t5x import quiet
with quiet._without_lines():
  for line in sys.argv[1:]:
    os.write(2, (line + '\\n').encode())  # As C++ does.
  if ending:
    os._exit(3)
print('before' if ending else 'after', file=sys.stderr)
"""


def said(program, *args, **variables):
  done = subprocess.run(
    [sys.executable, '-c', program, *args],
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | variables,
  )
  return done.stderr.splitlines()


def test_lines_pass_unless_they_mean_nothing():
  kept = [line for line, passes in LINES.items() if passes]
  assert said('ending = False' + PROGRAM, *LINES) == [*kept, 'after']
  assert said('ending = True' + PROGRAM, *LINES) == kept  # It ends the process.
  assert said('ending = False' + PROGRAM, *LINES, PATH='') == [*LINES, 'after']


def test_nothing_is_said_by_what_is_imported():
  program = 'from gqa_t5x import quiet; quiet.import_tensorflow(); quiet.find_devices()'
  assert said(program) == []
