"""Packages the stand-in for T5X under T5X's own name, so that pip swaps the two."""

from setuptools import setup

setup(
  name='t5x',
  version='0.0.0+lite',
  description="The part of T5X's API that gqa_t5x uses, on one host",
  license='Apache-2.0',
  packages=['t5x'],
  python_requires='>=3.11',
  # Versions are pinned by the constraints file of the repository.
  install_requires=[
    'absl-py',
    'clu',
    'etils',
    'flax',
    'gin-config',
    'jax',
    'numpy',
    'optax',
    'orbax-checkpoint',
    'seqio',
    'tensorflow',
    'tensorstore',
  ],
)
