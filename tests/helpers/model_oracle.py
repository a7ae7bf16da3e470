"""A small T5.1.1 for the model tests, and an oracle that shares no code with it.

The oracle is NumPy in float64, one example at a time, without padding, batch or
cache: a loop over layers, heads and positions that can be checked against the paper
by eye. Dimensions are all distinct, so that a mix-up of two of them cannot pass.
"""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, traverse_util
from flax.linen import partitioning as nn_partitioning

from gqa_t5x.decoding import beam_search, sampling
from gqa_t5x.decoding.generate import generate
from gqa_t5x.model import network

V, D, F, N, H = 50, 20, 28, 4, 6
ENCODER_LAYERS, DECODER_LAYERS = 1, 2
B, S, T = 4, 7, 6
KV_HEADS = (1, 2, N)
# Key/value heads and their size R, below and above H; one holds all that N heads have.
LATENT = ((1, 4), (1, 15), (2, 9), (N, 5), (1, N * H))
INPUT_LENGTHS = (5, 7, 3, 6)
TARGET_LENGTHS = (6, 4, 5, 2)
DECODE_LENGTH = 8


# Compiling is what these tests wait for, so XLA is told not to optimise.
jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)
SIZES = dict(
  vocab_size=V,
  emb_dim=D,
  mlp_dim=F,
  num_heads=N,
  head_dim=H,
  num_encoder_layers=ENCODER_LAYERS,
  num_decoder_layers=DECODER_LAYERS,
  mlp_activations=('gelu', 'linear'),
  dropout_rate=0.0,
)


def config(num_kv_heads=None, **overrides):
  return network.T5Config(**(SIZES | overrides), num_kv_heads=num_kv_heads)


def init(module, rng=0):
  """Returns T5X's initial variables of the module, as plain dicts."""
  ones = jnp.ones((1, 1), jnp.int32)
  key = jax.random.PRNGKey(rng)
  return core.unfreeze(module.init(key, ones, ones, ones, enable_dropout=False))


@functools.cache
def initial_shapes(cfg):
  return core.unfreeze(jax.eval_shape(lambda: init(network.Transformer(cfg))))


def flat(tree):
  return traverse_util.flatten_dict(core.unfreeze(tree), sep='/')


def axis_names(variables):
  """Returns parameter path -> its logical axes."""
  names = nn_partitioning.get_axis_names(variables['params_axes'])
  return {path: tuple(axes) for path, axes in flat(names).items()}


def random_value(name, shape):
  """Returns a parameter's values, which depend on its name and shape alone."""
  normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if name.endswith('scale'):
    value = 1 + 0.3 * normal
  elif name.endswith('embedding'):
    value = normal
  else:
    value = normal * math.sqrt(1.5 / shape[0])
    value *= 0.5 if '/query/' in name else 1.0
  return value.astype(np.float32)


@functools.cache
def params(cfg):
  shapes = flat(initial_shapes(cfg)['params'])
  values = {name: random_value(name, leaf.shape) for name, leaf in shapes.items()}
  return traverse_util.unflatten_dict(values, sep='/')


def repeat_kv_heads(tree, num_kv_heads):
  """Returns the MHA decoder whose K and V heads are equal within each group."""

  def repeat(path, value):
    is_kv = path.startswith('decoder/layers_') and path.split('/')[-2] in 'key value'
    if not is_kv:
      return value
    heads = np.asarray(value).reshape(value.shape[0], num_kv_heads, -1)
    repeated = np.repeat(heads, N // num_kv_heads, axis=1)
    return repeated.reshape(value.shape[0], -1)

  values = {path: repeat(path, value) for path, value in flat(tree).items()}
  return traverse_util.unflatten_dict(values, sep='/')


def _padded(rows, length):
  return np.array([list(row) + [0] * (length - len(row)) for row in rows], np.int32)


@functools.cache
def examples():
  """Returns B pairs of unpadded inputs and targets; no token is 0 (pad) or 1 (end)."""
  rng = np.random.default_rng(0)
  return [
    (rng.integers(2, V, s), rng.integers(2, V, t))
    for s, t in zip(INPUT_LENGTHS, TARGET_LENGTHS, strict=True)
  ]


def shift_right(targets):
  return np.concatenate([[0], targets[:-1]])


def batch(pairs=None):
  """Returns a padded batch under T5X's names."""
  pairs = pairs or examples()
  return {
    'encoder_input_tokens': _padded([x for x, _ in pairs], S),
    'decoder_input_tokens': _padded([shift_right(y) for _, y in pairs], T),
    'decoder_target_tokens': _padded([y for _, y in pairs], T),
  }


def packed_batch():
  """Returns the examples two to a row, with segment ids, as seqio packs them."""
  pairs = examples()
  rows = [(pairs[0], pairs[1]), (pairs[2], pairs[3])]
  lengths = S + 6, T + 5

  def pack(parts, length):
    return _padded([np.concatenate(row) for row in parts], length)

  inputs = [[x for x, _ in row] for row in rows]
  targets = [[y for _, y in row] for row in rows]
  shifted = [[shift_right(y) for y in row] for row in targets]

  def ids(parts, length):
    return pack(
      [[np.full(len(x), i + 1) for i, x in enumerate(row)] for row in parts], length
    )

  return {
    'encoder_input_tokens': pack(inputs, lengths[0]),
    'decoder_input_tokens': pack(shifted, lengths[1]),
    'decoder_target_tokens': pack(targets, lengths[1]),
    'encoder_segment_ids': ids(inputs, lengths[0]),
    'decoder_segment_ids': ids(targets, lengths[1]),
  }


@functools.cache
def forward(cfg):
  """Returns the compiled `(params, batch) -> logits`."""
  module = network.Transformer(cfg)
  return jit(
    lambda params, batch: module.apply(
      {'params': params}, **batch, enable_dropout=False
    )
  )


def prompt_batch(prompts=(), length=DECODE_LENGTH):
  """Returns int32 `[B, length]`: the start token, then the prompts, one a row."""
  tokens = np.zeros((B, length), np.int32)
  for b, prompt in enumerate(prompts):
    tokens[b, 1 : 1 + len(prompt)] = prompt
  return tokens


DECODE_FNS = {
  'greedy': sampling.greedy,
  'temperature_sample': sampling.temperature_sample,
  'beam_search': beam_search.beam_search,
}


@functools.cache
def decode(cfg, name='greedy', num_decodes=1, **options):
  """Returns one of our decode functions, compiled around the network.

  Args:
    cfg: the network's.
    name: of the decode function, a key of DECODE_FNS.
    num_decodes, **options: what it takes that must be static.

  Returns:
    `(params, prompts, eos_id, **options) -> (tokens [B, num_decodes, T], scores)`.
  """
  module = network.Transformer(cfg)
  decode_fn = functools.partial(DECODE_FNS[name], num_decodes=num_decodes, **options)

  @jit
  def run(params, prompts, eos_id, **traced):
    inputs = batch()['encoder_input_tokens']
    return generate(module, params, inputs, prompts, decode_fn, eos_id=eos_id, **traced)

  return run


# The oracle.


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def attend(q_TNH, k_SKH, v_SKH, bias_NTS=None):
  """One example, one query head at a time; head n reads K/V head n // G."""
  q, k, v = (np.asarray(x, np.float64) for x in (q_TNH, k_SKH, v_SKH))
  group = q.shape[1] // k.shape[1]
  out = np.zeros((*q.shape[:2], v.shape[-1]))
  for n in range(q.shape[1]):
    logits = q[:, n] @ k[:, n // group].T
    if bias_NTS is not None:
      logits = logits + bias_NTS[n]
    out[:, n] = softmax(logits) @ v[:, n // group]
  return out


def bucket(distance, bidirectional):
  """T5's bucket of key position minus query position, for one integer."""
  offset, num_buckets, max_distance = 0, 32, 128
  if bidirectional:
    num_buckets //= 2
    offset = num_buckets if distance > 0 else 0
    distance = abs(distance)
  else:
    distance = max(-distance, 0)
  exact = num_buckets // 2
  if distance < exact:
    return offset + distance
  ratio = math.log(distance / exact) / math.log(max_distance / exact)
  # 1e-6: where the ratio is a whole step, floating point decides; T5 rounds up.
  far = exact + math.floor(ratio * (num_buckets - exact) + 1e-6)
  return offset + min(far, num_buckets - 1)


def position_bias(table_NR, queries, keys, bidirectional):
  bias = np.zeros((len(table_NR), queries, keys))
  for t in range(queries):
    for s in range(keys):
      bias[:, t, s] = table_NR[:, bucket(s - t, bidirectional)]
  return bias


def layer_norm(x, p):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p['scale']


def gelu(x):
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp(x, p):
  return (gelu(x @ p['wi_0']['kernel']) * (x @ p['wi_1']['kernel'])) @ p['wo']['kernel']


def attention_layer(x_TD, y_SD, p, bias_NTS=None, head_dim=H):
  q = (x_TD @ p['query']['kernel']).reshape(len(x_TD), -1, head_dim)
  k, v = (_key_or_value_heads(y_SD, p, name, head_dim) for name in ('key', 'value'))
  return attend(q, k, v, bias_NTS).reshape(len(x_TD), -1) @ p['out']['kernel']


def _key_or_value_heads(y_SD, p, name, head_dim):
  """Returns K heads; of the latent form all N, each mapped from what it shares."""
  shared = y_SD @ p[name]['kernel']
  if f'{name}_up' not in p:
    return shared.reshape(len(y_SD), -1, head_dim)
  up = p[f'{name}_up']['kernel']
  num_heads, num_shared = up.shape[1] // head_dim, shared.shape[1] // len(up)
  heads = []
  for n in range(num_heads):
    start = n // (num_heads // num_shared) * len(up)
    latent = shared[:, start : start + len(up)]
    heads.append(latent @ up[:, n * head_dim : (n + 1) * head_dim])
  return np.stack(heads, axis=1)


def oracle_logits(tree, inputs, decoder_inputs):
  """Returns float64 logits `[T, V]` of one unpadded example."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
  encoder, decoder, table = p['encoder'], p['decoder'], p['token_embedder']['embedding']
  x = table[inputs]
  bias = position_bias(
    encoder['relpos_bias']['rel_embedding'], len(inputs), len(inputs), True
  )
  for i in range(ENCODER_LAYERS):
    layer = encoder[f'layers_{i}']
    y = layer_norm(x, layer['pre_attention_layer_norm'])
    x = x + attention_layer(y, y, layer['attention'], bias)
    x = x + mlp(layer_norm(x, layer['pre_mlp_layer_norm']), layer['mlp'])
  encoded = layer_norm(x, encoder['encoder_norm'])

  length = len(decoder_inputs)
  x = table[decoder_inputs]
  bias = position_bias(decoder['relpos_bias']['rel_embedding'], length, length, False)
  bias = bias + np.where(np.tri(length, dtype=bool), 0, -np.inf)
  for i in range(DECODER_LAYERS):
    layer = decoder[f'layers_{i}']
    y = layer_norm(x, layer['pre_self_attention_layer_norm'])
    x = x + attention_layer(y, y, layer['self_attention'], bias)
    y = layer_norm(x, layer['pre_cross_attention_layer_norm'])
    x = x + attention_layer(y, encoded, layer['encoder_decoder_attention'])
    x = x + mlp(layer_norm(x, layer['pre_mlp_layer_norm']), layer['mlp'])
  return layer_norm(x, decoder['decoder_norm']) @ decoder['logits_dense']['kernel']


@functools.cache
def expected_logits(cfg):
  """Returns the oracle's logits of every example, each `[target length, V]`."""
  tree = params(cfg)
  return [oracle_logits(tree, x, shift_right(y)) for x, y in examples()]


def assert_logits(got_BTV, cfg, tolerance=1e-4):
  """Compares a padded batch's logits with the oracle, real tokens only."""
  for b, expected in enumerate(expected_logits(cfg)):
    np.testing.assert_allclose(
      np.asarray(got_BTV)[b, : len(expected)], expected, atol=tolerance, rtol=tolerance
    )
