"""How much of each attention module fits into shared heads: the spectra behind svd."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from gqa_t5x.checkpoints import folders
from gqa_t5x.checkpoints.tree import TARGET, parameters, read_architecture
from gqa_t5x.conversion.input_statistics import from_norms, open_statistics
from gqa_t5x.conversion.kernels import ALL_KERNELS, AttentionModule
from gqa_t5x.conversion.shared_heads import spectra
from gqa_t5x.reproduce.results.rows import Row

SHARES = (0.99, 0.95, 0.90)


def rows(
  source: Any,
  statistics: Any,
  num_kv_heads: Sequence[int],
  latents: Sequence[int] = (),
) -> Iterator[Row]:
  """Describes the spectra of a checkpoint's decoder.

  Args:
    source: folder of the MHA checkpoint.
    statistics: its file of statistics.
    num_kv_heads: the K to look at.
    latents: numbers of heads whose cache one latent head has; 1 is among the K then.

  Yields:
    For each module, K (or `kv_head_dim`), side ('key' or 'value') and kind of
    statistics: `dropped_share`, the part of the eigenvalues' sum beyond the head size,
    and `rank_99`, `rank_95`, `rank_90`, the directions that hold as much of it; lists
    with one entry a group.
  """
  tensors = folders.open_checkpoint(epath.Path(source))
  shapes = {name: tensor.shape for name, tensor in parameters(tensors).items()}
  architecture = read_architecture(shapes)
  measured = open_statistics(statistics)
  for kind, path in architecture.attention_modules():
    if kind not in ('self_attention', 'cross_attention'):
      continue
    kernels = {n: tensors[f'{TARGET}{path}/{n}/kernel'].read() for n in ALL_KERNELS}
    inputs = {
      'weights': from_norms(tensors, kind, path),
      'calibrated': measured.read(path),
    }
    for K, name in itertools.product(num_kv_heads, inputs):
      module = AttentionModule(
        path=path,
        source_num_kv_heads=architecture.num_kv_heads[kind],
        num_kv_heads=K,
        head_dim=architecture.head_dim,
      )
      for side, values in spectra(kernels, module, inputs[name]).items():
        found = {
          'layer': int(path.split('/')[1].removeprefix('layers_')),
          'module': kind,
          'side': side,
          'num_kv_heads': K,
          'statistics': name,
        }
        yield {**found, **describe(values, architecture.head_dim)}
        # The spectrum of all heads together also tells what one latent head keeps.
        for latent in latents if K == 1 else ():
          yield {
            **found,
            'kv_head_dim': latent * architecture.head_dim,
            **describe(values, latent * architecture.head_dim),
          }


def describe(values: np.ndarray, head_dim: int) -> dict[str, list]:
  """Sums up spectra.

  Args:
    values: eigenvalues [K, G*H], falling.
    head_dim: H, how many are kept.

  Returns:
    `dropped_share` and `rank_99`, ..., as in `rows`; a spectrum of zeros drops nothing.
  """
  total = np.maximum(values.sum(axis=1, keepdims=True), np.finfo(float).tiny)
  kept = np.cumsum(values, axis=1) / total
  described = {'dropped_share': values[:, head_dim:].sum(axis=1) / total[:, 0]}
  for share in SHARES:
    # A hair below, or rounding asks for one direction more.
    ranks = (kept < share - 1e-12).sum(axis=1) + 1
    described[f'rank_{100 * share:.0f}'] = ranks
  return {name: value.tolist() for name, value in described.items()}
