"""One exception for bad input, so that a command can tell it from a bug."""


class BadInput(ValueError):
  """Input that cannot be used; the message names it and says what to do."""
