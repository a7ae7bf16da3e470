"""Model sizes by name: the one table of them."""

# T5.1.1 as published; `tiny` and `mini` are this project's own, for laptops. Shazeer's
# translation models (2019, section 4): what MQA saves in all attention, the encoder's,
# too, widens the MLP, so that both have as many parameters.
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
  'shazeer_mha': (1024, 8, 128, 4096, 6, 6),
  'shazeer_mqa': (1024, 8, 128, 5440, 6, 6),
}
SIZES = {size: dict(zip(_FIELDS, row, strict=True)) for size, row in _TABLE.items()}
for _size, _K in (('shazeer_mha', 8), ('shazeer_mqa', 1)):
  SIZES[_size] |= dict(num_kv_heads=_K, encoder_num_kv_heads=_K, vocab_size=32768,
                       mlp_activations=('relu',), logits_via_embedding=True)
# fmt: on
# T5's 32100 ids, padded to a multiple of 128.
VOCAB_SIZE = 32128
