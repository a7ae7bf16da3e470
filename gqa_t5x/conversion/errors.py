"""One exception for bad input, so that the command can tell it from a bug."""


class ConversionError(ValueError):
  """Input that cannot be converted; the message names it and the mend."""
