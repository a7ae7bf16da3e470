"""What is read from the names and shapes of a checkpoint."""

import dataclasses
import re

import numpy as np
import pytest

from gqa_t5x.checkpoints.tree import Architecture, read_architecture
from gqa_t5x.errors import BadInput
from helpers.trees import D, F, H, N, V, tiny_shapes


def test_reads_sizes_and_heads():
  got = read_architecture(tiny_shapes(2))
  assert got == Architecture(
    vocab_size=V,
    emb_dim=D,
    mlp_dim=F,
    num_heads=N,
    head_dim=H,
    num_buckets=32,
    num_layers={'encoder': 1, 'decoder': 2},
    num_kv_heads={'encoder': 4, 'self_attention': 2, 'cross_attention': 2},
  )


@pytest.mark.parametrize(
  ('num_kv_heads', 'kv_head_dim'), [(1, None), (2, None), (4, None), (1, 5), (2, 1)]
)
def test_shapes_of_an_architecture_equal_the_tree(num_kv_heads, kv_head_dim):
  shapes = tiny_shapes(num_kv_heads, kv_head_dim=kv_head_dim)
  architecture = read_architecture(shapes)
  assert architecture.kv_head_dim == kv_head_dim
  assert set(architecture.num_kv_heads.values()) == {N, num_kv_heads}
  assert architecture.shapes() == shapes
  count = sum(int(np.prod(shape)) for shape in shapes.values())
  assert architecture.num_parameters() == count


def test_parameter_count_and_cache_of_t5_1_1_xxl():
  mha = Architecture(
    vocab_size=32128,
    emb_dim=4096,
    mlp_dim=10240,
    num_heads=64,
    head_dim=64,
    num_buckets=32,
    num_layers={'encoder': 24, 'decoder': 24},
    num_kv_heads={'encoder': 64, 'self_attention': 64, 'cross_attention': 64},
  )
  assert mha.num_parameters() == 11_135_332_352
  # 2 (K and V) * 24 layers * 64 heads * 64 * 2 bytes.
  assert mha.cache_bytes_per_token('self_attention') == 393_216
  heads = {'encoder': 64, 'self_attention': 8, 'cross_attention': 1}
  gqa = dataclasses.replace(mha, num_kv_heads=heads)
  # 24 layers * 2 kernels * 4096 * 64 * (56 + 63 heads fewer).
  assert mha.num_parameters() - gqa.num_parameters() == 24 * 2 * 4096 * 64 * 119
  assert gqa.cache_bytes_per_token('self_attention') == 49_152
  assert gqa.cache_bytes_per_token('cross_attention') == 6_144
  heads = {'encoder': 64, 'self_attention': 1, 'cross_attention': 1}
  latent = dataclasses.replace(mha, num_kv_heads=heads, kv_head_dim=512)
  assert latent.num_parameters() == 9_927_372_800
  assert latent.cache_bytes_per_token('self_attention') == 49_152


def test_every_missing_extra_and_mismatched_key_is_listed():
  shapes = tiny_shapes()
  del shapes['decoder/layers_1/mlp/wo/kernel']
  del shapes['encoder/encoder_norm/scale']
  shapes['decoder/layers_0/bias'] = (3,)
  shapes['lm_head/kernel'] = (D, V)
  shapes['decoder/layers_1/self_attention/value/kernel'] = (D, 2 * H)
  shapes['encoder/layers_0/mlp/wi_1/kernel'] = (D, F + 1)
  with pytest.raises(BadInput) as error:
    read_architecture(shapes)
  assert str(error.value) == (
    'not a T5 checkpoint: 2 missing: decoder/layers_1/mlp/wo/kernel,'
    ' encoder/encoder_norm/scale; 2 extra: decoder/layers_0/bias, lm_head/kernel;'
    ' 2 mismatched: decoder/layers_1/self_attention/value/kernel has shape (6, 4),'
    ' expected (6, 8), encoder/layers_0/mlp/wi_1/kernel has shape (6, 6),'
    ' expected (6, 5)'
  )


@pytest.mark.parametrize(
  ('path', 'shape', 'message'),
  [
    (
      'decoder/relpos_bias/rel_embedding',
      (3, 32),
      'self_attention/query/kernel has 8 columns, not a multiple of the 3 heads',
    ),
    (
      'decoder/layers_0/self_attention/key/kernel',
      (D, 3),
      'has 3 columns, not a number of heads of size 2 that divides num_heads=4',
    ),
    (
      'decoder/layers_0/self_attention/key/kernel',
      (D, 6),
      'has 6 columns, not a number of heads of size 2 that divides num_heads=4',
    ),
    ('token_embedder/embedding', (V,), 'expected 2 dimensions'),
    (
      'decoder/layers_0/self_attention/key_up/kernel',
      (3, N * H),
      '7 missing: decoder/layers_0/encoder_decoder_attention/key_up/kernel',
    ),
    (
      'decoder/layers_0/self_attention/key_up/kernel',
      (H, N * H),
      'key_up/kernel has 2 rows, the head size: key/value heads of that size have no',
    ),
    ('decoder/layers_0/self_attention/key_up/kernel', (3,), 'expected 2 dimensions'),
  ],
)
def test_shapes_that_contradict_each_other(path, shape, message):
  with pytest.raises(BadInput, match=re.escape(message)):
    read_architecture(tiny_shapes() | {path: shape})


def test_another_model_is_refused():
  with pytest.raises(BadInput, match=r'28 missing: .*; 1 extra: bert/kernel'):
    read_architecture({'bert/kernel': (3, 4)})


@pytest.mark.parametrize(
  ('extra', 'why'),
  [
    ('encoder/layers_0/mlp/expert/wi/kernel', 'whose MLPs are choices among experts'),
    ('encoder/side_relpos_bias/rel_embedding', 'whose encoder attends locally'),
  ],
)
def test_relatives_are_refused_by_name(extra, why):
  with pytest.raises(BadInput, match=f'^not a T5 checkpoint: it is a .*{why}; 1 extra'):
    read_architecture(tiny_shapes() | {extra: (3, 4)})


@pytest.mark.parametrize('per_layer', [False, True])
def test_variants(per_layer):
  """T5 1.0: one input kernel of an MLP, no kernel of logits; umT5: a bias a layer."""
  shapes = tiny_shapes()
  del shapes['decoder/logits_dense/kernel']
  for layer in ('encoder/layers_0', 'decoder/layers_0', 'decoder/layers_1'):
    del shapes[f'{layer}/mlp/wi_1/kernel']
    shapes[f'{layer}/mlp/wi/kernel'] = shapes.pop(f'{layer}/mlp/wi_0/kernel')
    if per_layer:
      stack = layer.partition('/')[0]
      shapes.pop(f'{stack}/relpos_bias/rel_embedding', None)
      shapes[f'{layer}/relpos_bias/rel_embedding'] = (N, 32)
  got = read_architecture(shapes)
  assert (got.gated, got.own_logits, got.bias_per_layer) == (False, False, per_layer)
  assert got.shapes() == shapes
