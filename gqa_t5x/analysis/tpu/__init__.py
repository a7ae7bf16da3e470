"""Compiles for TPU slices, on machines without one."""
