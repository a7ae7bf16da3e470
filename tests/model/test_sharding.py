"""How every array is laid out over eight devices.

By hand in the tables: the mesh axes of every parameter and of everything that decoding
keeps.
"""

import functools
import re

import jax.numpy as jnp
import pytest
import seqio
from jax.sharding import NamedSharding, PartitionSpec
from t5x import adafactor, models, utils

from gqa_t5x.decoding import generate
from gqa_t5x.model import network
from helpers import model_oracle as oracle
from helpers.sharding_cases import (
  DEVICES,
  B,
  H,
  N,
  T,
  batch,
  config,
  entered,
  partitioner,
  sharded_params,
  sharded_rows,
)

# End of a parameter's path -> mesh axes, 1-D and 2-D; `kv` is that of the K/V heads.
PARAMETERS = {
  r'token_embedder/embedding': (('model', None), ('model', 'data')),
  r'relpos_bias/rel_embedding': (('model', None), ('model', None)),
  r'(layer_)?norm/scale': ((None,), ('data',)),
  r'attention/query/kernel': ((None, 'model'), ('data', 'model')),
  r'attention/(key|value)_up/kernel': ((None, 'model'), (None, 'model')),
  r'encoder/.*/(key|value)/kernel': ((None, 'model'), ('data', 'model')),
  r'decoder/.*/(key|value)/kernel': ((None, 'kv'), ('data', 'kv')),
  r'attention/out/kernel': (('model', None), ('model', 'data')),
  r'mlp/wi_[01]/kernel': ((None, 'model'), ('data', 'model')),
  r'mlp/wo/kernel': (('model', None), ('model', 'data')),
  r'logits_dense/kernel': ((None, 'model'), ('data', 'model')),
}
# What splits keys and values -> rows and heads of all in `cache` and `encoded_kv`.
KEPT = {
  'heads': ('data', 'model'),
  'batch': (('data', 'model'), None),
  'replicated': ('data', None),
}


@functools.cache
def state_shapes(K, R):
  """Of T5X's train state: the model's with its optimizer."""
  vocabulary = seqio.ByteVocabulary()
  model = models.EncoderDecoderModel(
    network.Transformer(config(K, kv_head_dim=R)),
    vocabulary,
    vocabulary,
    adafactor.Adafactor(),
  )
  inputs = ('encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens')
  return utils.TrainStateInitializer(
    optimizer_def=model.optimizer_def,
    init_fn=model.get_initial_variables,
    input_shapes=dict.fromkeys(inputs, (B, T)),
    input_types=dict.fromkeys(inputs, jnp.int32),
    partitioner=partitioner(K, 1),
  ).global_train_state_shape


@pytest.mark.parametrize('parameter_dims', [1, 2])
@pytest.mark.parametrize('R', [H, 12])
@pytest.mark.parametrize(
  ('K', 'num_partitions', 'kv_sharding', 'kv'),
  [
    (1, 1, None, 'model'),
    (1, 8, None, None),
    (2, 2, None, 'model'),
    (2, 4, None, None),
    (4, 4, None, 'model'),
    (8, 8, None, 'model'),
    (2, 2, 'batch', None),
    (2, 2, 'replicated', None),
  ],
)
def test_parameters(K, num_partitions, kv_sharding, kv, R, parameter_dims):
  layout = partitioner(K, num_partitions, kv_sharding, parameter_dims)
  got = oracle.flat(layout.get_mesh_axes(state_shapes(K, R)).params)
  assert len(got) == 29 + (0 if R == H else 4)
  for path, spec in got.items():
    (axes,) = (row for end, row in PARAMETERS.items() if re.search(f'{end}$', path))
    expected = [kv if axis == 'kv' else axis for axis in axes[parameter_dims - 1]]
    assert list(spec) == expected, path


@pytest.mark.parametrize(
  ('K', 'num_partitions', 'kv_sharding', 'self_kv', 'cache', 'encoded_kv'),
  [
    (2, 2, None, None, 'heads', 'heads'),
    (2, 4, None, None, 'batch', 'batch'),
    (2, 4, 'replicated', None, 'replicated', 'replicated'),
    # Multi-head self-attention is split over heads next to multi-query attention.
    (1, 4, None, N, 'heads', 'batch'),
  ],
)
def test_kept_keys_and_values(
  K, num_partitions, kv_sharding, self_kv, cache, encoded_kv
):
  """After they are prepared and after a step."""
  cfg = config(K, self_attention_num_kv_heads=self_kv)
  layout = partitioner(K, num_partitions, kv_sharding)
  module, params = network.Transformer(cfg), sharded_params(cfg, layout)

  @oracle.jit
  def run(inputs, token):
    empty, kept = generate.prepare(module, params, inputs, T)
    _, after = generate.step(module, params, kept, empty, inputs, token, T)
    return {'empty': empty, 'after': after, 'encoded_kv': kept['encoded_kv']}

  with entered(layout):
    arrays = run(*sharded_rows(layout, batch()[0], batch()[0][:, 0]))
  got = {path: x for path, x in oracle.flat(arrays).items() if x.ndim == 4}
  assert len(got) == 6
  devices = dict(layout.mesh.shape) | {None: 1, ('data', 'model'): DEVICES}
  for path, array in got.items():
    rows, heads = KEPT[encoded_kv if path.startswith('encoded_kv') else cache]
    heads_in_all = K if path.startswith('encoded_kv') else cfg.self_kv
    assert array.shape[:2] == (B, heads_in_all), path
    expected = NamedSharding(layout.mesh, PartitionSpec(rows, heads, None, None))
    assert array.sharding.is_equivalent_to(expected, 4), path
    share = array.addressable_shards[3].data.shape[:2]
    assert share == (B // devices[rows], heads_in_all // devices[heads])
