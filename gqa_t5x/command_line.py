"""What all commands share: flags, --help, errors as exit codes, SIGTERM.

  command = command_line.Command('gqa_t5x.best', __doc__)
  command.text('model_dir', None, 'MODEL_DIR of the run.')
  sys.exit(command.run(sys.argv, act))

Flags end in the command: what is below it takes plain values or a frozen request.
"""

import contextlib
import functools
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags, logging

from gqa_t5x.errors import BadInput

# Packages of the errors that etils raises for buckets; importing them would be slow.
_BUCKETS = ('tensorflow.', 'gcsfs.', 'google.')


MOST = 2**31 - 1  # Of numbers that count something; arrays have no more positions.


class Terminated(KeyboardInterrupt):
  """SIGTERM, raised where the program is, so that it cleans up as after Ctrl-C."""


class Command:
  """The flags of one command, apart from absl's global ones, and how it ends.

  `text`, `whole`, `switch`, `choice`, `words` and `texts` define a flag each; the last
  two take a list, comma-separated or by repeating the flag. Arguments: name, default,
  help. `rewrite`, if set, is applied to the command's arguments before they are parsed.
  """

  def __init__(self, module: str, doc: str, max_words: int = 0):
    """Defines --help and --verbosity.

    Args:
      module: as in `python -m MODULE`.
      doc: what --help begins with.
      max_words: how many arguments that are no flags may be given.
    """
    self.values = flags.FlagValues()
    self.rewrite: Callable[[Sequence[str]], Sequence[str]] = list
    self._module, self._doc, self._max_words = module, doc, max_words
    define = {'flag_values': self.values, 'module_name': module}
    self.text = functools.partial(flags.DEFINE_string, **define)
    self.switch = functools.partial(flags.DEFINE_bool, **define)
    self.words = functools.partial(flags.DEFINE_list, **define)
    self.texts = functools.partial(flags.DEFINE_multi_string, **define)
    self._define = define
    self.switch('help', False, 'Show this text.', short_name='h')
    self.whole('verbosity', -1, '1: say where an error comes from.', least=None)

  def whole(
    self, name: str, default: int | None, text: str, least: int | None = 1
  ) -> None:
    """Defines a flag that is a whole number, of at least `least`."""
    flags.DEFINE_integer(name, default, text, least, **self._define)
    flags.register_validator(
      name,
      lambda value: value is None or value <= MOST,
      f'must be at most {MOST}.',
      self.values,
    )

  def choice(self, name: str, default: str | None, known: Any, text: str) -> None:
    """Defines a flag that is one of the words `known`."""
    flags.DEFINE_enum(name, default, list(known), text, **self._define)

  def run(
    self,
    argv: Sequence[str],
    act: Callable[..., int | None],
    *,
    expected: tuple[type[Exception], ...] = (),
    stopped: str = 'stopped',
  ) -> int:
    """Parses the arguments and runs the command.

    Args:
      argv: program name and arguments.
      act: takes the parsed flags and the arguments that are no flags, and returns the
        exit code; None is 0.
      expected: exceptions whose message is for the user, in addition to bad input and
        errors of the file system.
      stopped: what to say after Ctrl-C or SIGTERM.

    Returns:
      The exit code: that of `act`, 1 for bad input, 130 or 143 when stopped by SIGINT
      or SIGTERM.
    """
    args = self.values
    with contextlib.suppress(AttributeError):  # A terminal may know ASCII alone.
      sys.stdout.reconfigure(errors='backslashreplace')
    try:
      words = args(list(self.rewrite(argv)))[1:]
      logging.set_verbosity(args.verbosity)
      if args.help:
        print(f'{self._doc}\nFlags:{args.module_help(self._module)}')
        return 0
      if len(words) > self._max_words:
        raise BadInput(f'unexpected argument {words[self._max_words]!r}; see --help')
      for name in args:  # An empty text is no flag that is left out.
        if args[name].present and args[name].value in ('', []):
          raise BadInput(
            f'--{name} is missing its value; give one, or leave the flag out.'
          )
      with sigterm_raises():
        return act(args, *words) or 0
    except KeyboardInterrupt as error:
      print(stopped, file=sys.stderr)
      return 143 if isinstance(error, Terminated) else 130
    except (BadInput, flags.Error, *expected) as error:
      return self._fail(error)
    except Exception as error:
      if is_of_file_system(error):
        return self._fail(error)
      raise

  def _fail(self, error: Exception) -> int:
    if self.values.is_parsed() and self.values.verbosity > 0:
      traceback.print_exception(error)
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 1


def is_of_file_system(error: Exception) -> bool:
  """Whether an error comes from a file system, or from a bucket through etils."""
  return isinstance(error, OSError) or type(error).__module__.startswith(_BUCKETS)


def on_sigterm(
  act: Callable[[], None], *, ignore_others: bool = False
) -> Callable[[], None]:
  """Calls `act` at the first SIGTERM; does nothing outside of the main thread.

  Args:
    act: runs in the main thread, between two of its instructions.
    ignore_others: whether later signals are ignored; if not, the handler that was there
      before gets them.

  Returns:
    A function that puts the handler back that was there before.
  """
  if threading.current_thread() is not threading.main_thread():
    return lambda: None

  def receive(signum, frame):
    del signum, frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignore_others else previous)
    act()

  previous = signal.signal(signal.SIGTERM, receive)
  return lambda: signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
  """Raises `Terminated` at SIGTERM; a second one does not interrupt the clean-up."""

  def stop():
    raise Terminated

  give_back = on_sigterm(stop, ignore_others=True)
  try:
    yield
  finally:
    give_back()
