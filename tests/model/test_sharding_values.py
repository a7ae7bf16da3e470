"""Over eight devices the model computes what it does on one, and moves no K and V."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_t5x.analysis.hlo import parse
from gqa_t5x.analysis.hlo.collectives import COLLECTIVES
from gqa_t5x.decoding import beam_search, sampling
from gqa_t5x.decoding.generate import generate
from gqa_t5x.model import network, sharding
from helpers import model_oracle as oracle
from helpers.sharding_cases import (
  DEVICES,
  EOS,
  B,
  H,
  S,
  T,
  batch,
  config,
  entered,
  partitioner,
  sharded_params,
  sharded_rows,
)

CONFIG = config(2, kv_head_dim=12)


@oracle.jit
@jax.value_and_grad
def loss_and_gradients(params, inputs, decoder_inputs, targets):
  """Of the cross-entropy of the targets, a sum; K = 2, of a size of their own."""
  logits = network.Transformer(CONFIG).apply(
    {'params': params}, inputs, decoder_inputs, targets, enable_dropout=False
  )
  log_probs = jax.nn.log_softmax(logits)
  of_targets = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  return -jnp.sum(of_targets * (targets > 0))


@functools.cache
def unsharded_gradients():
  return loss_and_gradients(oracle.params(CONFIG), *batch())


@pytest.mark.parametrize(('num_partitions', 'parameter_dims'), [(2, 1), (4, 2)])
def test_loss_and_gradients(num_partitions, parameter_dims):
  """With whole heads, and with the rows of the batch."""
  layout = partitioner(2, num_partitions, None, parameter_dims)
  with entered(layout):
    got, gradients = loss_and_gradients(
      sharded_params(CONFIG, layout), *sharded_rows(layout, *batch())
    )
  expected, expected_gradients = unsharded_gradients()
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert len(gradients['decoder']['layers_0']) == 6
  for path, gradient in oracle.flat(gradients).items():
    reference = np.asarray(oracle.flat(expected_gradients)[path])
    largest = np.abs(reference).max()
    np.testing.assert_allclose(
      gradient, reference, rtol=1e-5, atol=1e-5 * largest, err_msg=path
    )


DECODE_FNS = {
  'greedy': sampling.greedy,
  'beams': functools.partial(beam_search.beam_search, num_decodes=3),
  'samples': functools.partial(sampling.temperature_sample, num_decodes=3, topk=5),
}


def decode(cfg, name):
  module = network.Transformer(cfg)

  def run(params, inputs, prompts):
    return generate(module, params, inputs, prompts, DECODE_FNS[name], eos_id=EOS)

  return oracle.jit(run)


@functools.cache
def unsharded_decodes(cfg, name, rows):
  prompts = np.zeros((rows, T), np.int32)
  return decode(cfg, name)(oracle.params(cfg), batch(rows)[0], prompts)


def found_collectives(compiled) -> list[tuple[str, int]]:
  """The kind of each in a compiled program, and how many numbers a device gets."""
  return [
    (i.opcode, sum(math.prod(shape.dims) for shape in i.shapes))
    for computation in parse.parse(compiled.as_text()).computations.values()
    for i in computation.instructions.values()
    if i.opcode in COLLECTIVES
  ]


@pytest.mark.parametrize(
  ('K', 'R', 'num_partitions', 'kv_sharding', 'name', 'rows', 'platform', 'moves'),
  [
    (2, H, 2, None, 'greedy', B, 'cpu', 0),
    # Where rows are split, queries go to them and outputs back, in two attentions.
    # And on a TPU new keys and values are pending.
    (2, H, 4, None, 'greedy', B, 'tpu', 4),
    (2, H, 4, 'replicated', 'greedy', B, 'tpu', 0),
    (8, H, 4, None, 'greedy', B, 'tpu', 0),
    # The latent form: by heads, and one head by rows.
    (2, 12, 2, None, 'greedy', B, 'cpu', 0),
    (1, 24, 8, None, 'greedy', B, 'tpu', 4),
    # Rows that the devices do not divide, or fewer than devices.
    (2, H, 4, None, 'samples', 6, 'cpu', None),
    (1, H, 8, None, 'beams', 3, 'cpu', None),
  ],
)
def test_decodes(
  K, R, num_partitions, kv_sharding, name, rows, platform, moves, monkeypatch
):
  """The same tokens; and in the loop keys and values stay where they are."""
  cfg = config(K, kv_head_dim=R)
  expected_tokens, expected_scores = unsharded_decodes(cfg, name, rows)
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  layout = partitioner(K, num_partitions, kv_sharding)
  args = (
    sharded_params(cfg, layout),
    *sharded_rows(layout, batch(rows)[0], np.zeros((rows, T), np.int32)),
  )
  with entered(layout):
    compiled = decode(cfg, name).lower(*args).compile()
  tokens, scores = compiled(*args)
  assert len(np.unique(expected_tokens)) > 10
  np.testing.assert_array_equal(tokens, expected_tokens)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
  if moves is not None:
    found = found_collectives(compiled)
    parts = layout.mesh.shape['data'] if kv_sharding == 'replicated' else DEVICES
    smallest_kept = B * K * R * S // parts
    assert max(size for kind, size in found if kind != 'all-reduce') < smallest_kept
    kinds = [kind for kind, _ in found]
    assert kinds.count('all-to-all') == moves
    # Behind both attentions and the MLP.
    assert kinds.count('all-reduce') >= 3


@pytest.mark.parametrize(('name', 'num_partitions'), [('beams', 4), ('samples', 1)])
def test_logits_are_not_gathered(name, num_partitions):
  """Of each device's part of them only the best travel."""
  vocab_size, rows = 640, 3 * B
  cfg, layout = config(2, vocab_size=vocab_size), partitioner(2, num_partitions)
  args = (
    sharded_params(cfg, layout),
    *sharded_rows(layout, batch()[0], np.zeros((B, T), np.int32)),
  )
  with entered(layout):
    found = found_collectives(decode(cfg, name).lower(*args).compile())
  sizes = [size for kind, size in found if kind != 'all-reduce']
  assert max(sizes, default=0) < rows * vocab_size // DEVICES


@pytest.mark.parametrize(
  ('K', 'num_partitions', 'name', 'platform'),
  [(2, 4, 'greedy', 'tpu'), (1, 8, 'beams', 'cpu'), (2, 2, 'samples', 'tpu')],
)
def test_decodes_in_int8(K, num_partitions, name, platform, monkeypatch):
  """With whole heads and with rows of the batch, they are those of one device."""
  cfg = config(K, quantize='weights_and_cache')
  expected_tokens, expected_scores = unsharded_decodes(cfg, name, B)
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  layout = partitioner(K, num_partitions)
  args = (
    sharded_params(cfg, layout),
    *sharded_rows(layout, batch()[0], np.zeros((B, T), np.int32)),
  )
  with entered(layout):
    tokens, scores = decode(cfg, name)(*args)
  np.testing.assert_array_equal(tokens, expected_tokens)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)
