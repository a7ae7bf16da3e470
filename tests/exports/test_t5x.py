"""A checkpoint with all heads computes the same: with our network, and with T5X's."""

import importlib.util

import numpy as np
import pytest
from etils import epath

from gqa_t5x.checkpoints import folders
from gqa_t5x.checkpoints.tree import read_architecture
from gqa_t5x.exports.source import open_source
from gqa_t5x.model import network
from helpers import exports, make_golden, model_oracle, trees
from helpers.model_oracle import N

NAME = f'checkpoint_{exports.STEP}'
HEADS = {
  'MQA': dict(num_kv_heads=1),
  'GQA': dict(num_kv_heads=2, encoder_num_kv_heads=1),
  'kinds': dict(self_attention_num_kv_heads=1, cross_attention_num_kv_heads=N),
  't5_1_0': dict(num_kv_heads=2, **exports.T5_1_0),
  'latent': dict(num_kv_heads=2, kv_head_dim=5, encoder_num_kv_heads=1),
  'silu': dict(num_kv_heads=2, **exports.FAMILY['silu']),
}


def export(tmp_path, cfg):
  """Exports a model of this configuration; returns the checkpoint's parameters."""
  source = exports.checkpoint(tmp_path / 'run', cfg)
  exports.command(source, tmp_path / 'out', 't5x', '--num_kv_heads=all')
  params, _ = folders.read_params(tmp_path / 'out' / NAME)
  return params


def logits(module, params):
  batch = model_oracle.batch()
  apply = model_oracle.jit(
    lambda params: module.apply({'params': params}, **batch, enable_dropout=False)
  )
  return np.asarray(apply(params))[batch['decoder_target_tokens'] > 0]


@pytest.mark.parametrize('engine', ['ours', 't5x'])
@pytest.mark.parametrize('case', HEADS)
def test_logits_are_the_same(case, engine, tmp_path):
  cfg = model_oracle.config(**HEADS[case])
  options = {n: x for n, x in HEADS[case].items() if 'kv_head' not in n}
  if engine == 't5x':
    if not importlib.util.find_spec('t5x.examples'):
      pytest.skip("needs T5X's own network")
    module = make_golden.t5x_module(**options)
  else:
    module = network.Transformer(model_oracle.config(**options))
  params = export(tmp_path, cfg)
  shapes = {path: x.shape for path, x in model_oracle.flat(params).items()}
  whole = model_oracle.initial_shapes(model_oracle.config(**options))['params']
  assert shapes == {path: x.shape for path, x in model_oracle.flat(whole).items()}
  expected = logits(network.Transformer(cfg), model_oracle.params(cfg))
  np.testing.assert_allclose(logits(module, params), expected, atol=1e-4, rtol=1e-5)


def test_it_is_what_the_oracle_repeats(tmp_path):
  cfg = model_oracle.config(2)
  got = model_oracle.flat(export(tmp_path, cfg))
  expected = model_oracle.repeat_kv_heads(model_oracle.params(cfg), 2)
  for path, value in model_oracle.flat(expected).items():
    np.testing.assert_array_equal(got[path], value, strict=True)


@pytest.mark.parametrize('case', ['GQA', 'latent'])
def test_sizes_with_all_heads_are_those_of_the_tensors(case, tmp_path):
  checkpoint = exports.checkpoint(tmp_path / 'run', model_oracle.config(**HEADS[case]))
  whole = open_source(checkpoint).with_all_heads()
  shapes = {path: tensor.shape for path, tensor in whole.params.items()}
  assert read_architecture(shapes) == whole.architecture


def test_the_step_stays_and_moments_do_not(tmp_path):
  source = trees.write_t5x(tmp_path / f'checkpoint_{trees.STEP}', trees.tiny_state(1))
  exports.command(source, tmp_path / 'out', 't5x')
  got = trees.read(tmp_path / 'out' / f'checkpoint_{trees.STEP}')
  assert got['state/step'] == trees.STEP
  assert got.keys() == {
    'state/step',
    *(f'target/{path}' for path in trees.tiny_shapes(trees.N)),
  }


def test_other_numbers_of_heads(tmp_path):
  source = exports.checkpoint(tmp_path / 'run', model_oracle.config(2))
  said = exports.refused(source, tmp_path / 'out', 't5x', num_kv_heads='2')
  assert said.endswith('for fewer, use python -m gqa_t5x.convert')


@pytest.mark.parametrize(
  ('sizes', 'tokens', 'said'),
  [
    (dict(relpos_max_distance=40), {}, 'relpos_max_distance=40'),
    (dict(relpos_num_buckets=12), {}, 'relpos_num_buckets=12'),
    (dict(layer_norm_epsilon=0.05), {}, 'layer_norm_epsilon=0.05'),
    ({}, dict(decoder_start_token_id=3), 'decoder_start_token_id=3'),
    (dict(relpos_per_layer=True), {}, 'is a umT5'),
  ],
)
def test_what_its_network_does_not_compute(sizes, tokens, said, tmp_path):
  cfg = model_oracle.config(2, **sizes)
  source = exports.checkpoint(tmp_path / 'run', cfg, **tokens)
  assert said in exports.refused(source, tmp_path / 'out', 't5x')


def test_what_can_be_set_is_kept(tmp_path):
  cfg = model_oracle.config(2, **exports.FAMILY['silu'])
  source = exports.checkpoint(tmp_path / 'run', cfg, eos_token_id=7)
  exports.command(source, tmp_path / 'out', 't5x')
  kept = folders.read_config(epath.Path(tmp_path / 'out' / NAME))
  assert (kept.mlp_activation, kept.eos_token_id) == ('silu', 7)
