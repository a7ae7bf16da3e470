"""Measures decoding, training and conversion on this machine."""
