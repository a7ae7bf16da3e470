"""Says which of the two distributions named t5x is installed."""

__version__ = '0.0.0+lite'
