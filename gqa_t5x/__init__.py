"""gqa_t5x: grouped-query attention for T5, on T5X."""

__version__ = '0.1.0'
