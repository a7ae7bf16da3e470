"""Imports TensorFlow without its lines about a missing GPU."""

from gqa_t5x import quiet

quiet.import_tensorflow()
