"""One exception for bad input, so that a command can tell it from a bug."""


class BadInput(ValueError):
  """Input that cannot be used; the message names it and says what to do."""


def first_line(error: Exception) -> str:
  """The first line of what an exception says, or its type if it says nothing."""
  return (str(error) or type(error).__name__).splitlines()[0]
