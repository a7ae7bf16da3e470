"""The stand-in for T5X: the part of its API that gqa_t5x uses (see README.md)."""

from t5x.version import __version__ as __version__
