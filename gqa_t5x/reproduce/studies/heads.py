"""Conversion of heads that were trained for long: how much of a model is left.

All self-attention of a sentence encoder is converted, without any training after it,
and its embeddings of texts are compared with the original's. Statistics are of other
texts. Both are docstrings (data/corpus.py), one sample of them after the other.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import tqdm
from etils import epath

from gqa_t5x import files
from gqa_t5x.conversion.input_statistics import InputStatistics
from gqa_t5x.conversion.kernels import AttentionModule, Kernels, heads_of
from gqa_t5x.conversion.methods import convert_module
from gqa_t5x.conversion.output_refit import RIDGE, refit
from gqa_t5x.conversion.shared_heads import key_moments, spectra, value_moments
from gqa_t5x.data import corpus
from gqa_t5x.errors import BadInput
from gqa_t5x.reproduce.experiments.models import METHODS, SVD, SVD_BY_WEIGHTS, Method
from gqa_t5x.reproduce.experiments.targets import heads_file
from gqa_t5x.reproduce.results.rows import Row, measured
from gqa_t5x.reproduce.studies import cache_budget, sentence_encoder
from gqa_t5x.reproduce.studies.sentence_encoder import SentenceEncoder
from gqa_t5x.reproduce.studies.spectra import describe

NUM_KV_HEADS = (6, 3, 1)  # of 12
CORPUS = 'pydocs'
TEXTS = 200  # of a sample: as many to calibrate on, as many to judge by
SAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to convert, at the cache of a number of key/value heads.

  Attributes:
    method: of conversion.
    latent: whether all heads read one key/value head, of as many numbers as the K heads
      have together.
    joint: of latent: whether keys and values are made of the same numbers, those of
      both together.
    refit_outputs: whether `refit_outputs` comes after it.
  """

  method: Method
  latent: bool = False
  joint: bool = False
  refit_outputs: bool = False

  @property
  def title(self) -> str:
    """What a reader calls it, e.g. 'svd (calibrated), outputs refitted'."""
    words = ['latent'] * self.latent + ['joint'] * self.joint + [self.method.title]
    return ', '.join(words + ['outputs refitted'] * self.refit_outputs)


LATENT = Variant(SVD, latent=True)
JOINT = Variant(SVD, latent=True, joint=True)
VARIANTS = (
  *map(Variant, METHODS),
  Variant(SVD, refit_outputs=True),
  Variant(SVD_BY_WEIGHTS, latent=True),
  LATENT,
  JOINT,
  Variant(SVD, latent=True, refit_outputs=True),
)
SPECTRA = (Variant(SVD_BY_WEIGHTS), Variant(SVD), LATENT)
Texts = Sequence[np.ndarray]  # tokens, int [B, L] each
Attention = Sequence[Kernels]


def write(output_dir: str) -> None:
  """Writes the rows into the folder of all results.

  Raises:
    BadInput: the package of the model is missing, or of another version.
  """
  folder = sentence_encoder.find()
  encoder = sentence_encoder.load(folder)
  rows = []
  for sample in range(1, SAMPLES + 1):
    calibration, evaluation = (
      sentence_encoder.batches(folder, _texts(split, sample))
      for split in ('train', 'validation')
    )
    rows += sample_rows(encoder, calibration, evaluation, sample)
  files.write_json(heads_file(epath.Path(output_dir)), rows)


def _texts(split: str, sample: int) -> list[str]:
  """The texts of a split that belong to a sample, 1 to SAMPLES."""
  found = corpus.read(corpus.CORPORA[CORPUS], split)
  texts = list(itertools.islice(found, (sample - 1) * TEXTS, sample * TEXTS))
  if len(texts) < TEXTS:
    raise BadInput(
      f'the corpus {CORPUS!r} has too few texts in its {split} split: {SAMPLES} samples'
      f' take {SAMPLES * TEXTS}'
    )
  return texts


def sample_rows(
  encoder: SentenceEncoder, calibration: Texts, evaluation: Texts, sample: int
) -> Iterator[Row]:
  """Converts with the statistics of some texts, and judges by others.

  Yields:
    Rows of kind 'heads', one for each variant (its title) and cache, that of
    `cache_heads` heads: `cosine`, the mean over texts of the embedding's cosine with
    the original's, and `same_neighbour`, the share of texts whose nearest other text is
    the same. Rows of kind 'heads_spectrum', for each layer and side, of the variants
    SPECTRA: see `spectra.rows`. Rows of kind 'heads_budget': `dropped_share` of caches
    that are spent as `cache_budget.WAYS` says, in the form `form`.
  """
  N, H, layers = encoder.num_heads, encoder.head_dim, len(encoder.attention)
  inputs = [encoder.run(tokens)[1] for tokens in calibration]
  statistics = {
    'none': [None] * layers,
    'weights': [_from_norm(*encoder.norm_before(i)) for i in range(layers)],
    'calibrated': _moments(calibration, inputs),
  }
  original = _embed(encoder, evaluation, encoder.attention)
  ways = list(itertools.product(NUM_KV_HEADS, VARIANTS))
  for K, variant in tqdm.tqdm(ways, f'sample {sample} of {SAMPLES}', unit='model'):
    separate = variant.latent and not variant.joint
    if K == 1 and (separate or variant.method.grouping != 'contiguous'):
      continue  # One head: latent is GQA, and there is one grouping.
    form = {'num_kv_heads': K, 'kv_head_dim': H}
    if variant.latent:
      form = {'num_kv_heads': 1, 'kv_head_dim': K * H * (1 + variant.joint)}
    shared = {
      'model': f'{sentence_encoder.PACKAGE} {sentence_encoder.VERSION}',
      'sample': sample,
      'calibration_texts': sum(map(len, calibration)),
      'texts': sum(map(len, evaluation)),
      'corpus': corpus.CORPORA[CORPUS].folder.name,
      'num_heads': N,
      **form,
      'cache_heads': K,
      'variant': variant.title,
    }
    attention = convert(encoder, variant, K, statistics[variant.method.statistics])
    if variant.refit_outputs:
      attention = refit_outputs(encoder, attention, calibration, inputs)
    yield {
      **_common('heads'),
      **shared,
      **agreement(original, _embed(encoder, evaluation, attention)),
    }
    if variant in SPECTRA:
      used = statistics[variant.method.statistics]
      for place in _dropped(encoder, used, **form):
        yield {**_common('heads_spectrum'), **shared, **place}
  for row in _budgets(encoder, statistics['calibrated']):
    yield {**_common('heads_budget'), 'sample': sample, 'num_heads': N, **row}


def _common(kind: str) -> Row:
  return measured(kind, 'python -m gqa_t5x.reproduce run heads --scale=local')


def _from_norm(scale_D: np.ndarray, bias_D: np.ndarray) -> InputStatistics:
  """What weights alone say, as `from_norms`: inputs white before scale and bias."""
  variance_E = np.append(np.square(scale_D, dtype=np.float64), 0.0)
  mean_E = np.append(bias_D.astype(np.float64), 1.0)
  second = np.diag(variance_E) + np.outer(mean_E, mean_E)
  return InputStatistics(query=second, key=variance_E, value=second)


def _moments(texts: Texts, inputs: Sequence[np.ndarray]) -> list[InputStatistics]:
  """Second moments of what each layer reads, [layers, B, L, E] by batch."""
  count = sum(np.count_nonzero(tokens) for tokens in texts)
  layers, E = len(inputs[0]), inputs[0].shape[-1]
  second, centred = np.zeros((2, layers, E, E))
  for tokens_BL, read in zip(texts, inputs, strict=True):
    real_BL1 = (tokens_BL > 0)[..., None]
    lengths_B11 = real_BL1.sum(axis=1, keepdims=True)
    for i, x_BLE in enumerate(read.astype(np.float64)):
      x_BLE *= real_BL1
      second[i] += np.tensordot(x_BLE, x_BLE, ((0, 1), (0, 1))) / count
      x_BLE -= real_BL1 * x_BLE.sum(axis=1, keepdims=True) / lengths_B11
      centred[i] += np.tensordot(x_BLE, x_BLE, ((0, 1), (0, 1))) / count
  return [
    InputStatistics(query=x, key=k, value=x)
    for x, k in zip(second, centred, strict=True)
  ]


def convert(
  encoder: SentenceEncoder,
  variant: Variant,
  num_kv_heads: int,
  statistics: Sequence[InputStatistics | None],
) -> Attention:
  """Converts the attention of all layers.

  Args:
    statistics: of each layer; those that the variant's method names.
    num_kv_heads: K, whose cache the result has.
  """
  converted, H = [], encoder.head_dim
  for i, (kernels, inputs) in enumerate(
    zip(encoder.attention, statistics, strict=True)
  ):
    if variant.joint:
      new = joint(kernels, H, inputs, 2 * num_kv_heads * H)
    else:
      heads = (1, num_kv_heads * H) if variant.latent else (num_kv_heads, H)
      module = _module(encoder, i, *heads)
      name, _, grouping = variant.method
      new = convert_module(kernels, module, name, inputs, grouping)
      if module.is_latent:  # The same function: what each query head reads.
        read = {name: new[name] @ new[f'{name}_up'] for name in ('key', 'value')}
        new = {**kernels, **read}
    converted.append(new)
  return converted


def joint(
  kernels: Kernels, head_dim: int, inputs: InputStatistics, rank: int
) -> Kernels:
  """Keys and values of the same few numbers: those of the least error of both.

  The errors of keys and values count by their shares. Returned are the kernels of all
  heads, made of these numbers: the function is the same, only the cache is not.
  """
  C_EE, H = np.asarray(inputs.value, np.float64), head_dim
  values, vectors = np.linalg.eigh(C_EE)
  root, inverse = (
    (vectors * np.maximum(values, 1e-12 * values[-1]) ** power) @ vectors.T
    for power in (0.5, -0.5)
  )
  weighed = []
  for name, moments in (('key', key_moments), ('value', value_moments)):
    _, M_JHH = moments(kernels, inputs, H)
    # Columns times M^1/2: as its square counts, any root of M does.
    root_JHH = np.linalg.cholesky(M_JHH + 1e-9 * M_JHH.max() * np.eye(H))
    heads_JEH = root @ heads_of(kernels, name, H) @ root_JHH
    weighed += list(heads_JEH / np.linalg.norm(heads_JEH))
  left, _, _ = np.linalg.svd(np.concatenate(weighed, axis=1), full_matrices=False)
  kept = left[:, :rank]
  project = inverse @ kept @ (kept.T @ root)
  new = {
    name: (project @ kernels[name]).astype(np.float32) for name in ('key', 'value')
  }
  return {**kernels, **new}


def _module(
  encoder: SentenceEncoder,
  layer: int,
  num_kv_heads: int,
  kv_head_dim: int | None = None,
) -> AttentionModule:
  return AttentionModule(
    path=f'encoder/layers_{layer}/attention',
    source_num_kv_heads=encoder.num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=encoder.head_dim,
    kv_head_dim=kv_head_dim,
  )


def refit_outputs(
  encoder: SentenceEncoder,
  attention: Attention,
  texts: Texts,
  inputs: Sequence[np.ndarray],
  ridge: float = RIDGE,
) -> Attention:
  """Moves the output kernels to where modules come closest to the original's outputs.

  By ridge regression, which starts from the kernels that conversion left. Each module
  is given what it reads in the original model.

  Args:
    attention: converted kernels by layer.
    texts: to fit to.
    inputs: what each layer reads of them, [layers, B, L, E] by batch.
    ridge: as of `output_refit.refit`.
  """
  refitted = []
  for i, new in enumerate(attention):
    # Z what the heads read, Y what the original module adds to a token.
    ZZ, ZY = 0.0, 0.0
    for tokens_BL, read in zip(texts, inputs, strict=True):
      Z, old = (
        np.asarray(_heads(dict(kernels), read[i], tokens_BL, encoder.num_heads))[
          tokens_BL > 0
        ].astype(np.float64)
        for kernels in (new, encoder.attention[i])
      )
      ZZ = ZZ + Z.T @ Z
      ZY = ZY + Z.T @ (old @ encoder.attention[i]['out'] - Z @ new['out'])
    out = refit(new['out'], ZZ, ZY, ridge)
    refitted.append({**new, 'out': out.astype(np.float32)})
  return refitted


_heads = jax.jit(sentence_encoder.read_heads, static_argnames='num_heads')


def _dropped(
  encoder: SentenceEncoder,
  statistics: Sequence[InputStatistics],
  num_kv_heads: int,
  kv_head_dim: int,
) -> Iterator[Row]:
  """What of each layer's spectra does not fit into the shared heads."""
  for i, kernels in enumerate(encoder.attention):
    module = _module(encoder, i, num_kv_heads)
    for side, values in spectra(kernels, module, statistics[i]).items():
      yield {'layer': i, 'side': side, **describe(values, kv_head_dim)}


def _budgets(
  encoder: SentenceEncoder, statistics: Sequence[InputStatistics]
) -> Iterator[Row]:
  """What would be dropped if the bytes of the cache were spent where they hold most."""
  N, H = encoder.num_heads, encoder.head_dim
  forms: dict[str, dict] = {'GQA': {}, 'latent': {}}
  step = max(H // 4, 1)
  for i, kernels in enumerate(encoder.attention):
    for K in (K for K in range(1, N + 1) if N % K == 0):
      module = _module(encoder, i, K)
      for side, found in spectra(kernels, module, statistics[i]).items():
        share = float(found[:, H:].sum() / found.sum())
        forms['GQA'].setdefault((i, side), {})[K * H] = share
        if K == 1:
          kept = 1 - np.cumsum(found[0]) / found.sum()
          ranks = range(step, N * H + 1, step)
          forms['latent'][i, side] = {R: float(kept[R - 1]) for R in ranks}
  for (form, choices), K in itertools.product(forms.items(), NUM_KV_HEADS):
    for way, share in cache_budget.spend(choices, K * H).items():
      yield {'form': form, 'cache_heads': K, 'spent': way, 'dropped_share': share}


def _embed(encoder: SentenceEncoder, texts: Texts, attention: Attention) -> np.ndarray:
  """Embeddings of all texts, [texts, D]."""
  return np.concatenate([encoder.run(tokens, attention)[0] for tokens in texts])


def agreement(original: np.ndarray, converted: np.ndarray) -> Mapping[str, float]:
  """Compares embeddings of the same texts, [texts, D] each, of length 1."""

  def nearest(embeddings):
    likeness = embeddings @ embeddings.T
    np.fill_diagonal(likeness, -np.inf)
    return likeness.argmax(axis=1)

  same = nearest(original) == nearest(converted)
  return {
    'cosine': float(np.mean(np.sum(original * converted, axis=1))),
    'same_neighbour': float(np.mean(same)),
  }
