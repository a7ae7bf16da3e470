"""Reads sizes and head counts from the tree of a T5, and says what does not fit.

Everything is found in the checkpoint itself: the relative position bias has one row a
query head, the query kernel gives the head size, the key kernels the key/value heads,
and kernels `key_up` their size, if they have one of their own.
T5 1.0 is known by its one input kernel of an MLP, and by logits without a kernel of
their own, umT5 by its position bias in every layer.

Letters: V vocabulary, D width, F MLP width, N query heads, K key/value heads, H head
size, R size of a key/value head.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
INT8_SCALE = '_scale'  # ends the name of one
EMBEDDING = 'token_embedder/embedding'
LOGITS = 'decoder/logits_dense/kernel'
_QUERY = 'decoder/layers_0/self_attention/query/kernel'
_KEY_UP = 'decoder/layers_0/self_attention/key_up/kernel'
_MLP = 'decoder/layers_0/mlp/wo/kernel'

# Parts of names in the trees of relatives, and why they are not read.
_RELATIVES = {
  'expert': 'it is a Switch Transformer, whose MLPs are choices among experts',
  'side_relpos_bias': 'it is a LongT5, whose encoder attends locally',
}

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Sizes of a T5, and which of its variants it is.

  Attributes:
    num_buckets: columns of the relative position bias (32).
    num_layers: by stack, "encoder" and "decoder".
    num_kv_heads: by kind of attention, the keys of KINDS.
    kv_head_dim: size of the decoder's key/value heads; None: head_dim.
    gated: whether the MLP has a gate: kernels `wi_0` and `wi_1`, not `wi`.
    own_logits: whether logits have a kernel of their own; else they are those of the
      embedding, divided by sqrt(D).
    bias_per_layer: whether every layer has a position bias of its own, as in umT5; else
      the layers of a stack share one.
  """

  vocab_size: int
  emb_dim: int
  mlp_dim: int
  num_heads: int
  head_dim: int
  num_buckets: int
  num_layers: dict[str, int]
  num_kv_heads: dict[str, int]
  gated: bool = True
  own_logits: bool = True
  bias_per_layer: bool = False
  kv_head_dim: int | None = None

  def attention_modules(self) -> Iterator[tuple[str, str]]:
    """Yields (kind, path) of every attention module."""
    for kind, (stack, name) in KINDS.items():
      for layer in range(self.num_layers[stack]):
        yield kind, f'{stack}/layers_{layer}/{name}'

  def bias_path(self, module: str) -> str:
    """Where the position bias of a self-attention module is, by its path."""
    stack, layer, _ = module.split('/')
    return _bias(stack, layer if self.bias_per_layer else None)

  def kv_size(self, kind: str) -> int:
    """Size of a key/value head of a kind of attention."""
    own = None if kind == 'encoder' else self.kv_head_dim
    return self.head_dim if own is None else own

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The whole tree: path -> shape of every parameter."""
    V, D, F = self.vocab_size, self.emb_dim, self.mlp_dim
    NH = self.num_heads * self.head_dim
    shapes = {EMBEDDING: (V, D)} | ({LOGITS: (D, V)} if self.own_logits else {})
    wi = ('wi_0', 'wi_1') if self.gated else ('wi',)
    for stack, norms in _NORMS.items():
      shapes[f'{stack}/{stack}_norm/scale'] = (D,)
      for layer in range(self.num_layers[stack]):
        prefix = f'{stack}/layers_{layer}'
        shapes |= {f'{prefix}/{norm}/scale': (D,) for norm in norms}
        shapes |= {f'{prefix}/mlp/{name}/kernel': (D, F) for name in wi}
        shapes[f'{prefix}/mlp/wo/kernel'] = (F, D)
    for kind, path in self.attention_modules():
      if kind != 'cross_attention':
        shapes[self.bias_path(path)] = (self.num_heads, self.num_buckets)
      R = self.kv_size(kind)
      KR = self.num_kv_heads[kind] * R
      shapes[f'{path}/query/kernel'] = (D, NH)
      shapes[f'{path}/key/kernel'] = (D, KR)
      shapes[f'{path}/value/kernel'] = (D, KR)
      shapes[f'{path}/out/kernel'] = (NH, D)
      if self.head_dim != R:
        shapes |= {f'{path}/{name}/kernel': (R, NH) for name in ('key_up', 'value_up')}
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
    return 2 * layers * self.num_kv_heads[kind] * self.kv_size(kind) * 2


def _bias(stack: str, layer: str | None) -> str:
  return '/'.join(filter(None, (stack, layer, 'relpos_bias/rel_embedding')))


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
    BadInput: the tree is not a T5's. The message lists every missing, extra and
      mismatched key.
  """
  num_layers = {stack: _count_layers(shapes, stack) for stack in _NORMS}
  per_layer = _bias('decoder', 'layers_0')
  variant = {
    'gated': 'decoder/layers_0/mlp/wi/kernel' not in shapes,
    'own_logits': LOGITS in shapes,
    'bias_per_layer': per_layer in shapes,
  }
  # Sizes play no role for the names, but for that of key/value heads: is it 1, too?
  sizes = (*[1] * 6, num_layers, dict.fromkeys(KINDS, 1))
  own_size = 2 if _KEY_UP in shapes else None
  names = Architecture(*sizes, **variant, kv_head_dim=own_size).shapes().keys()
  missing, extra = sorted(names - shapes.keys()), sorted(shapes.keys() - names)
  problems = []
  problems += [
    why for part, why in _RELATIVES.items() if any(part in name for name in extra)
  ]
  if missing:
    problems.append(f'{len(missing)} missing: {", ".join(missing)}')
  if extra:
    problems.append(f'{len(extra)} extra: {", ".join(extra)}')
  bias = per_layer if variant['bias_per_layer'] else _bias('decoder', None)
  anchors = (EMBEDDING, _MLP, _QUERY, bias)
  read = (*anchors, _KEY_UP)
  unusable = [a for a in read if a in shapes and len(shapes[a]) != 2]
  problems += [f'{a} has shape {shapes[a]}, expected 2 dimensions' for a in unusable]
  if unusable or not all(a in shapes for a in anchors):
    raise _not_t5(problems)
  architecture = _read_sizes(shapes, bias, num_layers, variant, problems)
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
  shapes: Shapes,
  bias: str,
  num_layers: dict[str, int],
  variant: Mapping[str, bool],
  problems: list[str],
) -> Architecture:
  """Takes the sizes from four anchor tensors and the first key kernels."""
  num_heads, num_buckets = shapes[bias]
  vocab_size, emb_dim = shapes[EMBEDDING]
  query_columns = shapes[_QUERY][1]
  if query_columns % num_heads:
    problems.append(
      f'{_QUERY} has {query_columns} columns, not a multiple of the {num_heads} heads'
      f' in {bias}'
    )
  head_dim = max(query_columns // num_heads, 1)
  kv_head_dim = shapes[_KEY_UP][0] if _KEY_UP in shapes else None
  if kv_head_dim == head_dim:
    problems.append(
      f'{_KEY_UP} has {kv_head_dim} rows, the head size: key/value heads of that size'
      ' have no such kernel'
    )
  num_kv_heads = {}
  for kind, (stack, name) in KINDS.items():
    key = f'{stack}/layers_0/{name}/key/kernel'
    columns = shapes.get(key, (0, 0))[-1]
    size = head_dim if kind == 'encoder' else kv_head_dim or head_dim
    heads, rest = divmod(columns, size)
    if key in shapes and (rest or not heads or num_heads % heads):
      problems.append(
        f'{key} has {columns} columns, not a number of heads of size {size} that'
        f' divides num_heads={num_heads}'
      )
    num_kv_heads[kind] = heads
  return Architecture(
    vocab_size=vocab_size,
    emb_dim=emb_dim,
    mlp_dim=shapes[_MLP][0],
    num_heads=num_heads,
    head_dim=head_dim,
    num_buckets=num_buckets,
    num_layers=num_layers,
    num_kv_heads=num_kv_heads,
    kv_head_dim=kv_head_dim,
    **variant,
  )


def parameters(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters among all tensors of a checkpoint, their paths without TARGET."""
  return {p.removeprefix(TARGET): t for p, t in tensors.items() if p.startswith(TARGET)}


def int8_scales(names: Iterable[str]) -> list[str]:
  """Those of names that are of scales of int8 parameters (model/quantize.py)."""
  return [name for name in names if name.endswith(INT8_SCALE)]


def _not_t5(problems: list[str]) -> BadInput:
  return BadInput(f'not a T5 checkpoint: {"; ".join(problems)}')


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
