"""What gin hands to T5X. The only room that imports it."""

from gqa_t5x.training import gin_command  # noqa: F401 (checks every configuration)
