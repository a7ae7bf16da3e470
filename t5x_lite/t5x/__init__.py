"""The stand-in for T5X: the part of its API that gqa_t5x uses (see README.md)."""

__version__ = '0.0.0+lite'  # It says which of the two distributions is installed.
