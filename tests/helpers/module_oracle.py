"""Random attention modules for the conversion tests, and an oracle of what they do.

The oracle is NumPy in float64, one head at a time. Errors are measured over a finite
sample of inputs, whose moments the conversion is told.
"""

import numpy as np

from gqa_t5x.conversion.input_statistics import InputStatistics
from gqa_t5x.conversion.kernels import AttentionModule
from helpers import model_oracle

D, N, H = 24, 8, 5
T, P = 40, 60  # queries and keys of a sample; more than D: regular moments
# Source and new key/value heads.
HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (4, 4), (4, 2), (4, 1), (2, 1), (1, 1)]
FEWER = [(S, K) for S, K in HEADS if K < S]
RNG = np.random.default_rng


def module(S, K, *, head_dim=H, kv_head_dim=None):
  path = 'decoder/layers_0/encoder_decoder_attention'
  return AttentionModule(path, S, K, head_dim, kv_head_dim=kv_head_dim)


def unfolded(kernels, K, *, num_heads=N):
  """The four kernels of the MHA that a latent module is: F_k U_n for query head n."""
  unfolded = {name: kernels[name] for name in ('query', 'out')}
  for side in ('key', 'value'):
    shared, up = kernels[side], kernels[f'{side}_up']
    R, width = up.shape[0], up.shape[1] // num_heads
    columns = []
    for n in range(num_heads):
      k = n * K // num_heads
      head = shared[:, k * R : (k + 1) * R] @ up[:, n * width : (n + 1) * width]
      columns.append(head)
    unfolded[side] = np.concatenate(columns, axis=1)
  return unfolded


def random_kernels(S=N, seed=0, dtype=np.float64):
  """Kernels whose heads differ in size."""
  rng = RNG(seed)

  def draw(heads):
    kernel = rng.normal(size=(D, heads, H)) * rng.uniform(0.3, 1.2, (heads, 1))
    return kernel.reshape(D, -1) / np.sqrt(D)

  kernels = {'query': draw(N), 'key': draw(S), 'value': draw(S), 'out': draw(N).T}
  return {name: kernel.astype(dtype) for name, kernel in kernels.items()}


def related_kernels(clusters, seed=0, noise=0.0, dtype=np.float64):
  """K/V head i is B R_i, with B of its cluster and R_i any basis of its own."""
  rng = RNG(seed)
  kernels = random_kernels(len(clusters), seed)
  for name in ('key', 'value'):
    bases = rng.normal(size=(max(clusters) + 1, D, H)) / np.sqrt(D)
    heads = [bases[c] @ rng.normal(size=(H, H)) for c in clusters]
    kernels[name] = np.concatenate(heads, axis=1)
    kernels[name] += noise * rng.normal(size=kernels[name].shape) / np.sqrt(D)
  return {name: kernel.astype(dtype) for name, kernel in kernels.items()}


def sample(seed=0):
  """Inputs of queries [T, D] and of keys and values [P, D]; neither white nor centred.

  Returns:
    Both, and their moments.
  """
  rng = RNG(100 + seed)
  x_TD, y_PD = (
    (rng.normal(size=(rows, D)) @ rng.normal(size=(D, D)) + rng.normal(size=D)) / 3
    for rows in (T, P)
  )
  centred = y_PD - y_PD.mean(axis=0)
  return (
    x_TD,
    y_PD,
    InputStatistics(x_TD.T @ x_TD / T, centred.T @ centred / P, y_PD.T @ y_PD / P),
  )


def scales(seed=0):
  """Moments as the weights alone give them."""
  rng = RNG(200 + seed)
  query, key = rng.uniform(0.2, 2.0, (2, D)) ** 2
  return InputStatistics(query, key, key)


def attention(kernels, x_TD, y_PD, bias_NTP=None):
  """The output [T, D] of the whole module."""
  p = {name: {'kernel': k.astype(np.float64)} for name, k in kernels.items()}
  return model_oracle.attention_layer(x_TD, y_PD, p, bias_NTP, H)


def relative_error(got, expected):
  return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def measured(before, after, K, x_TD, y_PD):
  """Squared errors of logits and of outputs, by group of heads, over a sample.

  A constant that is added to all logits of a query does not count.

  Returns:
    "key" and "value" -> [K].
  """
  errors = {'key': np.zeros(K), 'value': np.zeros(K)}
  for n in range(N):
    columns = slice(n * H, (n + 1) * H)
    logits, outputs = [], []
    for kernels in (before, after):
      heads = kernels['key'].shape[1] // H
      shared = slice(n * heads // N * H, (n * heads // N + 1) * H)
      key, value = kernels['key'][:, shared], kernels['value'][:, shared]
      logits.append((x_TD @ kernels['query'][:, columns]) @ (y_PD @ key).T)
      outputs.append(y_PD @ value @ kernels['out'][columns])
    wrong_TP = logits[0] - logits[1]
    wrong_TP = wrong_TP - wrong_TP.mean(axis=1, keepdims=True)
    errors['key'][n * K // N] += np.mean(wrong_TP**2)
    wrong_PD = outputs[0] - outputs[1]
    errors['value'][n * K // N] += np.mean(np.sum(wrong_PD**2, axis=1))
  return errors


def best_approximation(x_PD, heads, weights, rank=H):
  """Eckart and Young: cuts [x K_1 L_1, x K_2 L_2, ...] down to a rank.

  With M_i = L_i L_i^T, its squared Frobenius norm is the error of the logits.

  Returns:
    The squared singular values, and x times the best stand-in of each K_i.
  """
  lower = [np.linalg.cholesky(weight) for weight in weights]
  stacked = np.concatenate(
    [x_PD @ head @ factor for head, factor in zip(heads, lower, strict=True)], axis=1
  )
  left, values, right = np.linalg.svd(stacked, full_matrices=False)
  cut = (left[:, :rank] * values[:rank]) @ right[:rank]
  parts = np.split(cut, len(heads), axis=1)
  best = [p @ np.linalg.inv(factor) for p, factor in zip(parts, lower, strict=True)]
  return values**2, best


def group_problem(kernels, heads, inputs, name):
  """What `best_approximation` needs of some key/value heads: kernels and weights."""
  S = kernels['key'].shape[1] // H
  queries = kernels['query'].reshape(D, S, -1, H)
  outs = kernels['out'].reshape(S, -1, H, D)
  columns = [kernels[name][:, s * H : (s + 1) * H] for s in heads]
  if name == 'key':
    weights = [
      sum(queries[:, s, r].T @ inputs.query @ queries[:, s, r] for r in range(N // S))
      for s in heads
    ]
  else:
    weights = [sum(out @ out.T for out in outs[s]) for s in heads]
  return columns, weights
