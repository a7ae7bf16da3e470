"""Model sizes by name, the one table of them; or as a checkpoint has them."""

from typing import Any

# T5.1.1, T5 1.0 and ByT5 as published; `tiny` and `mini` are this project's own, for
# laptops. Shazeer's translation models (2019, section 4): what MQA saves in all
# attention, the encoder's, too, widens the MLP, so that both have as many parameters.
# fmt: off
_FIELDS = ('emb_dim', 'num_heads', 'head_dim', 'mlp_dim',
           'num_encoder_layers', 'num_decoder_layers')
_TABLE = {
  'tiny': (128, 8, 16, 256, 2, 4),
  'mini': (256, 8, 64, 512, 2, 6),
  'small': (512, 6, 64, 1024, 8, 8),
  'base': (768, 12, 64, 2048, 12, 12),
  'large': (1024, 16, 64, 2816, 24, 24),
  'xl': (2048, 32, 64, 5120, 24, 24),
  'xxl': (4096, 64, 64, 10240, 24, 24),
  't5_1_0_small': (512, 8, 64, 2048, 6, 6),
  't5_1_0_base': (768, 12, 64, 3072, 12, 12),
  't5_1_0_large': (1024, 16, 64, 4096, 24, 24),
  't5_1_0_3b': (1024, 32, 128, 16384, 24, 24),
  't5_1_0_11b': (1024, 128, 128, 65536, 24, 24),
  'byt5_small': (1472, 6, 64, 3584, 12, 4),
  'byt5_base': (1536, 12, 64, 3968, 18, 6),
  'byt5_large': (1536, 16, 64, 3840, 36, 12),
  'byt5_xl': (2560, 32, 64, 6720, 36, 12),
  'byt5_xxl': (4672, 64, 64, 12352, 36, 12),
  'shazeer_mha': (1024, 8, 128, 4096, 6, 6),
  'shazeer_mqa': (1024, 8, 128, 5440, 6, 6),
}
SIZES = {size: dict(zip(_FIELDS, row, strict=True)) for size, row in _TABLE.items()}
# mT5 is T5.1.1 with more tokens, umT5 has a position bias in each layer, too.
for _size in ('small', 'base', 'large', 'xl', 'xxl'):
  SIZES[f'mt5_{_size}'] = SIZES[_size] | dict(vocab_size=250112)
  SIZES[f'umt5_{_size}'] = SIZES[_size] | dict(vocab_size=256384, relpos_per_layer=True)
  SIZES[f'byt5_{_size}'] |= dict(vocab_size=384)
for _size in ('t5_1_0_small', 't5_1_0_base', 't5_1_0_large', 't5_1_0_3b', 't5_1_0_11b',
              'shazeer_mha', 'shazeer_mqa'):
  SIZES[_size] |= dict(mlp_activations=('relu',), logits_via_embedding=True)
for _size, _K in (('shazeer_mha', 8), ('shazeer_mqa', 1)):
  SIZES[_size] |= dict(num_kv_heads=_K, encoder_num_kv_heads=_K, vocab_size=32768)
# fmt: on
# T5's 32100 ids, padded to a multiple of 128.
VOCAB_SIZE = 32128


def from_checkpoint(architecture: Any, model_config: Any) -> dict[str, Any]:
  """Returns the fields of a `network.T5Config` that a checkpoint gives.

  Args:
    architecture: a `checkpoints.tree.Architecture`, of the shapes of its tensors.
    model_config: a `checkpoints.config.ModelConfig`, of what shapes do not show.
  """
  own = model_config.mlp_activation
  activations = (own or 'gelu', 'linear') if architecture.gated else (own or 'relu',)
  heads = architecture.num_kv_heads
  return dict(
    vocab_size=architecture.vocab_size,
    emb_dim=architecture.emb_dim,
    num_heads=architecture.num_heads,
    head_dim=architecture.head_dim,
    mlp_dim=architecture.mlp_dim,
    num_encoder_layers=architecture.num_layers['encoder'],
    num_decoder_layers=architecture.num_layers['decoder'],
    mlp_activations=activations,
    logits_via_embedding=not architecture.own_logits,
    self_attention_num_kv_heads=heads['self_attention'],
    cross_attention_num_kv_heads=heads['cross_attention'],
    encoder_num_kv_heads=heads['encoder'],
    kv_head_dim=architecture.kv_head_dim,
    relpos_per_layer=architecture.bias_per_layer,
    relpos_num_buckets=model_config.relpos_num_buckets,
    relpos_max_distance=model_config.relpos_max_distance,
    layer_norm_epsilon=model_config.layer_norm_epsilon,
  )
