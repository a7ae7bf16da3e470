"""Checkpoints of every format: found, read a tensor at a time, written."""
