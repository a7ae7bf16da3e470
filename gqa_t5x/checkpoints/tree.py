"""Reads sizes and head counts from a T5.1.1 tree, and says what does not fit.

Everything is found in the checkpoint itself: the relative position bias has one row a
query head, the query kernel gives the head size, the key kernels the key/value heads.

Letters: V vocabulary, D width, F MLP width, N query heads, K key/value heads, H head
size.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gqa_t5x.errors import BadInput

# Where parameters and Adafactor's moments are in the tree of a train state.
TARGET = 'target/'
PARAM_STATES = 'state/param_states/'

# The three kinds of attention, and where their modules live.
KINDS = {
  'encoder': ('encoder', 'attention'),
  'self_attention': ('decoder', 'self_attention'),
  'cross_attention': ('decoder', 'encoder_decoder_attention'),
}
_NORMS = {
  'encoder': ('pre_attention_layer_norm', 'pre_mlp_layer_norm'),
  'decoder': (
    'pre_self_attention_layer_norm',
    'pre_cross_attention_layer_norm',
    'pre_mlp_layer_norm',
  ),
}
_EMBEDDING = 'token_embedder/embedding'
_BIAS = '{}/relpos_bias/rel_embedding'
_QUERY = 'decoder/layers_0/self_attention/query/kernel'
_MLP = 'decoder/layers_0/mlp/wi_0/kernel'

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Sizes of a T5.1.1 model.

  Attributes:
    num_buckets: columns of the relative position bias (32).
    num_layers: by stack, "encoder" and "decoder".
    num_kv_heads: by kind of attention, the keys of KINDS.
  """

  vocab_size: int
  emb_dim: int
  mlp_dim: int
  num_heads: int
  head_dim: int
  num_buckets: int
  num_layers: dict[str, int]
  num_kv_heads: dict[str, int]

  def attention_modules(self) -> Iterator[tuple[str, str]]:
    """Yields (kind, path) of every attention module."""
    for kind, (stack, name) in KINDS.items():
      for layer in range(self.num_layers[stack]):
        yield kind, f'{stack}/layers_{layer}/{name}'

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The whole tree: path -> shape of every parameter."""
    V, D, F = self.vocab_size, self.emb_dim, self.mlp_dim
    NH = self.num_heads * self.head_dim
    shapes = {_EMBEDDING: (V, D), 'decoder/logits_dense/kernel': (D, V)}
    for stack, norms in _NORMS.items():
      shapes[_BIAS.format(stack)] = (self.num_heads, self.num_buckets)
      shapes[f'{stack}/{stack}_norm/scale'] = (D,)
      for layer in range(self.num_layers[stack]):
        prefix = f'{stack}/layers_{layer}'
        shapes |= {f'{prefix}/{norm}/scale': (D,) for norm in norms}
        shapes |= {f'{prefix}/mlp/wi_{i}/kernel': (D, F) for i in (0, 1)}
        shapes[f'{prefix}/mlp/wo/kernel'] = (F, D)
    for kind, path in self.attention_modules():
      KH = self.num_kv_heads[kind] * self.head_dim
      shapes[f'{path}/query/kernel'] = (D, NH)
      shapes[f'{path}/key/kernel'] = (D, KH)
      shapes[f'{path}/value/kernel'] = (D, KH)
      shapes[f'{path}/out/kernel'] = (NH, D)
    return shapes

  def num_parameters(self) -> int:
    """Elements of all parameters."""
    return sum(math.prod(shape) for shape in self.shapes().values())

  def cache_bytes_per_token(self, kind: str) -> int:
    """Bytes of bfloat16 keys and values that decoding keeps, over all layers.

    Args:
      kind: "self_attention", for a token of the output, or "cross_attention", for one
        of the input.
    """
    layers = self.num_layers[KINDS[kind][0]]
    return 2 * layers * self.num_kv_heads[kind] * self.head_dim * 2


def norms_before(kind: str, path: str) -> tuple[str, str]:
  """The layer norms whose outputs the attention module of a kind at a path reads.

  Returns:
    Paths of the scales in front of the queries, and of the keys and values.
  """
  layer = path.rpartition('/')[0]
  if kind == 'cross_attention':
    return (
      f'{layer}/pre_cross_attention_layer_norm/scale',
      'encoder/encoder_norm/scale',
    )
  name = 'pre_attention' if kind == 'encoder' else 'pre_self_attention'
  return (f'{layer}/{name}_layer_norm/scale',) * 2


def read_architecture(shapes: Shapes) -> Architecture:
  """Reads the sizes of a model from the shapes of its parameters, all of them.

  Args:
    shapes: path ("decoder/layers_0/mlp/wo/kernel") -> shape.

  Raises:
    BadInput: the tree is not a T5.1.1's. The message lists every missing, extra
      and mismatched key.
  """
  num_layers = {stack: _count_layers(shapes, stack) for stack in _NORMS}
  # Sizes play no role for the names.
  sizes = (*[1] * 6, num_layers, dict.fromkeys(KINDS, 1))
  names = Architecture(*sizes).shapes().keys()
  missing, extra = sorted(names - shapes.keys()), sorted(shapes.keys() - names)
  problems = []
  if missing:
    problems.append(f'{len(missing)} missing: {", ".join(missing)}')
  if extra:
    problems.append(f'{len(extra)} extra: {", ".join(extra)}')
  anchors = (_EMBEDDING, _MLP, _QUERY, _BIAS.format('decoder'))
  unusable = [a for a in anchors if a in shapes and len(shapes[a]) != 2]
  problems += [f'{a} has shape {shapes[a]}, expected 2 dimensions' for a in unusable]
  if unusable or not all(a in shapes for a in anchors):
    raise _not_t5(problems)
  architecture = _read_sizes(shapes, num_layers, problems)
  expected = architecture.shapes()
  mismatched = [
    f'{path} has shape {tuple(shapes[path])}, expected {expected[path]}'
    for path in sorted(expected.keys() & shapes.keys())
    if tuple(shapes[path]) != expected[path]
  ]
  if mismatched:
    problems.append(f'{len(mismatched)} mismatched: {", ".join(mismatched)}')
  if problems:
    raise _not_t5(problems)
  return architecture


def _count_layers(shapes: Shapes, stack: str) -> int:
  pattern = re.compile(rf'{stack}/layers_(\d+)/')
  found = [int(m[1]) for path in shapes if (m := pattern.match(path))]
  return max(found, default=0) + 1


def _read_sizes(
  shapes: Shapes, num_layers: dict[str, int], problems: list[str]
) -> Architecture:
  """Takes the sizes from four anchor tensors and the first key kernels."""
  num_heads, num_buckets = shapes[_BIAS.format('decoder')]
  vocab_size, emb_dim = shapes[_EMBEDDING]
  query_columns = shapes[_QUERY][1]
  if query_columns % num_heads:
    problems.append(
      f'{_QUERY} has {query_columns} columns, not a multiple of the {num_heads} heads'
      f' in {_BIAS.format("decoder")}'
    )
  head_dim = max(query_columns // num_heads, 1)
  num_kv_heads = {}
  for kind, (stack, name) in KINDS.items():
    key = f'{stack}/layers_0/{name}/key/kernel'
    columns = shapes.get(key, (0, 0))[-1]
    heads, rest = divmod(columns, head_dim)
    if key in shapes and (rest or not heads or num_heads % heads):
      problems.append(
        f'{key} has {columns} columns, not a number of heads of size {head_dim} that'
        f' divides num_heads={num_heads}'
      )
    num_kv_heads[kind] = heads
  return Architecture(
    vocab_size=vocab_size,
    emb_dim=emb_dim,
    mlp_dim=shapes[_MLP][1],
    num_heads=num_heads,
    head_dim=head_dim,
    num_buckets=num_buckets,
    num_layers=num_layers,
    num_kv_heads=num_kv_heads,
  )


def parameters(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters among all tensors of a checkpoint, their paths without TARGET."""
  return {p.removeprefix(TARGET): t for p, t in tensors.items() if p.startswith(TARGET)}


def _not_t5(problems: list[str]) -> BadInput:
  return BadInput(f'not a T5.1.1 checkpoint: {"; ".join(problems)}')


def flatten(
  tree: Mapping[str, Any],
  is_leaf: Callable[[Mapping], bool] = lambda node: False,
  prefix: str = '',
) -> Iterator[tuple[str, Any]]:
  """Yields ("a/b/c", leaf) of nested mappings, in their order.

  `is_leaf` says of a mapping whether it is a leaf itself; `prefix` is put before paths.
  """
  for key, value in tree.items():
    if isinstance(value, Mapping) and not is_leaf(value):
      yield from flatten(value, is_leaf, f'{prefix}{key}/')
    else:
      yield f'{prefix}{key}', value


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{"a/b/c": leaf} -> nested dicts."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree
