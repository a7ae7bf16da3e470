"""The T5X adapter: decoding through T5X's interface, and checks of parameters."""

import functools
import re
from concurrent import futures

import jax
import numpy as np
import pytest
import seqio
from etils import epath
from flax import traverse_util
from t5x import adafactor
from t5x import models as t5x_models
from t5x import trainer as t5x_trainer

from gqa_t5x.checkpoints import config
from gqa_t5x.decoding import beam_search, sampling
from gqa_t5x.decoding import generate as decoding
from gqa_t5x.errors import BadInput
from gqa_t5x.inference import saved
from gqa_t5x.model import network, quantize
from gqa_t5x.training import models, restore
from helpers import model_oracle as oracle
from helpers.trainers import K, make_state, make_trainer, model, params

KEY = 'decoder/layers_1/self_attention/key/kernel'


plain_generate = decoding.generate
generate = oracle.jit(
  plain_generate, static_argnames=('module', 'decode_fn', 'num_decodes')
)
sample_two = functools.partial(sampling.temperature_sample, topk=3)
DECODE_FNS = {1: sampling.greedy, 2: sample_two, 3: beam_search.beam_search}
RNG = jax.random.PRNGKey(5)


@pytest.fixture(autouse=True)
def compiled_generate(monkeypatch):
  """Compiles each decode function once for all tests."""
  monkeypatch.setattr(decoding, 'generate', generate)


def expected_decodes(num_decodes=1, eos_id=1, prompts=None, **options):
  """What gqa_t5x.decoding gives, which its own tests prove."""
  tokens, scores = generate(
    model().module,
    params(),
    oracle.batch()['encoder_input_tokens'],
    np.zeros((oracle.B, oracle.T), np.int32) if prompts is None else prompts,
    DECODE_FNS[num_decodes],
    num_decodes=num_decodes,
    eos_id=eos_id,
    **options,
  )
  return np.asarray(tokens), np.asarray(scores)


def test_predict(monkeypatch):
  """Greedy by default; targets say how long, nothing else."""
  monkeypatch.setattr(decoding, 'generate', plain_generate)  # Compiled as a part.
  tokens, aux = oracle.jit(model().predict_batch_with_aux)(params(), oracle.batch())
  expected_tokens, expected_scores = expected_decodes()
  assert aux.keys() == {'scores'}
  np.testing.assert_array_equal(tokens, expected_tokens[:, 0])
  np.testing.assert_allclose(aux['scores'], expected_scores[:, 0], atol=1e-5)
  assert (np.exp(expected_scores) < 1).all()


@pytest.mark.parametrize(
  ('num_decodes', 'default', 'asked', 'returned'),
  [
    (1, False, True, True),
    (2, True, None, True),
    (3, False, None, False),
    (3, True, False, False),
  ],
)
def test_predict_with_any_decode_function(num_decodes, default, asked, returned):
  """The best decode is the last; all are returned when asked for."""
  decoder_params = t5x_models.DecoderParams(
    return_all_decodes=default, num_decodes=num_decodes
  )
  this = model(decode_fn=DECODE_FNS[num_decodes], default_decoder_params=decoder_params)
  tokens, aux = this.predict_batch_with_aux(
    params(), oracle.batch(), rng=RNG, return_all_decodes=asked
  )
  expected = expected_decodes(num_decodes, decode_rng=RNG)
  assert (expected[1] == expected[1].max(1, keepdims=True))[:, -1].all()
  every = slice(None) if returned else -1
  np.testing.assert_array_equal(tokens, expected[0][:, every])
  np.testing.assert_array_equal(aux['scores'], expected[1][:, every])


def test_predict_ends_at_the_marker_of_the_vocabulary():
  eos_id = int(expected_decodes()[0][0, 0, 1])
  tokens = model(eos_id=eos_id).predict_batch(params(), oracle.batch())
  np.testing.assert_array_equal(tokens, expected_decodes(eos_id=eos_id)[0][:, 0])
  assert (np.asarray(tokens)[0, 2:] == 0).all()


def test_decoder_params_reach_the_decode_function():
  """Another penalty and another end marker than the vocabulary's."""
  eos_id = int(expected_decodes(3, decode_rng=RNG)[0][0, 2, 1])
  options = {'alpha': 2.0, 'eos_id': eos_id}
  tokens, aux = model(decode_fn=DECODE_FNS[3]).predict_batch_with_aux(
    params(), oracle.batch(), decoder_params=options, num_decodes=3
  )
  expected_tokens, expected_scores = expected_decodes(3, **options)
  np.testing.assert_array_equal(tokens, expected_tokens[:, -1])
  np.testing.assert_array_equal(aux['scores'], expected_scores[:, -1])
  others = expected_decodes(3, eos_id=eos_id, alpha=0.6)[1]
  assert (aux['scores'] != others[:, -1]).any()
  assert options == {'alpha': 2.0, 'eos_id': eos_id}  # Not changed.


def test_an_rng_draws_anew():
  """And a call says how many decodes, over what the model's default is, 1 here."""
  this = model(decode_fn=sample_two)
  for rng in (RNG, jax.random.PRNGKey(6)):
    expected = expected_decodes(2, decode_rng=rng)[0]
    for arguments in ({'rng': rng}, {'decoder_params': {'decode_rng': rng}}):
      tokens, _ = this.predict_batch_with_aux(
        params(), oracle.batch(), return_all_decodes=True, num_decodes=2, **arguments
      )
      np.testing.assert_array_equal(tokens, expected)
  assert (expected != expected_decodes(2, decode_rng=RNG)[0]).any()


def test_targets_as_prompts():
  """Without their end marker, and only if asked."""
  batch = oracle.batch()
  batch['decoder_input_tokens'] = np.zeros((oracle.B, oracle.T), np.int32)
  batch['decoder_input_tokens'][:3, 1:4] = [[7, 8, 1], [9, 1, 0], [4, 5, 6]]
  prompts = np.zeros((oracle.B, oracle.T), np.int32)
  prompts[:3, 1:4] = [[7, 8, 0], [9, 0, 0], [4, 5, 6]]
  predict = functools.partial(model().predict_batch_with_aux, params(), batch)
  tokens, aux = predict(prompt_with_targets=True)
  expected_tokens, expected_scores = expected_decodes(prompts=prompts)
  np.testing.assert_array_equal(tokens, expected_tokens[:, 0])
  np.testing.assert_array_equal(aux['scores'], expected_scores[:, 0])
  np.testing.assert_array_equal(tokens[:3, :2], [[7, 8], [9, tokens[1, 1]], [4, 5]])
  np.testing.assert_array_equal(predict()[0], expected_decodes()[0][:, 0])


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    ({'num_decodes': 4}, 'num_decodes=4, but greedy decoding has one result an input'),
    (
      {'rng': RNG, 'decoder_params': {'decode_rng': RNG}},
      'rng and decoder_params["decode_rng"] were given; keep one.',
    ),
  ],
)
def test_bad_input(arguments, said):
  with pytest.raises(ValueError, match=f'^{re.escape(said)}'):
    model().predict_batch_with_aux(params(), oracle.batch(), **arguments)


def test_loss_and_scores():
  """Cross entropy of the oracle's logits, summed over real tokens."""
  batch = oracle.batch()
  batch['decoder_loss_weights'] = (batch['decoder_target_tokens'] > 0).astype(int)
  vocabulary = seqio.PassThroughVocabulary(size=oracle.V, eos_id=1)
  plain = t5x_models.EncoderDecoderModel(
    model().module, vocabulary, vocabulary, adafactor.Adafactor()
  )
  expected = [
    sum(np.log(oracle.softmax(logits)[np.arange(len(targets)), targets]))
    for logits, (_, targets) in zip(
      oracle.expected_logits(oracle.config(K)), oracle.examples(), strict=True
    )
  ]
  scores, *losses = oracle.jit(
    lambda params: (
      model().score_batch(params, batch),
      model().loss_fn(params, batch, dropout_rng=None)[0],
      plain.loss_fn(params, batch, dropout_rng=None)[0],  # T5X's class takes it, too.
    )
  )(params())
  np.testing.assert_allclose(scores, expected, rtol=1e-4)
  np.testing.assert_allclose(losses, [-sum(expected)] * 2, rtol=1e-4)


# Parameters that do not fit.


def test_every_difference_is_listed():
  D, H = oracle.D, oracle.H
  leaves = oracle.flat(params()) | {
    KEY: np.zeros((D, 4 * H)),
    'token_embedder/embedding': np.zeros((51, D)),
    'decoder/position_embedder': np.zeros(3),
  }
  del leaves['encoder/encoder_norm/scale']
  wrong = traverse_util.unflatten_dict(leaves, sep='/')
  with pytest.raises(ValueError) as error:
    models.check_params(model(), wrong)
  assert str(error.value).splitlines() == [
    'The parameters of the checkpoint do not fit the model:',
    '  decoder/layers_1/self_attention/key/kernel: (20, 24) in the checkpoint,'
    ' (20, 12) in the model',
    '  decoder/position_embedder: (3,) in the checkpoint, unknown in the model',
    '  encoder/encoder_norm/scale: missing in the checkpoint, (20,) in the model',
    '  token_embedder/embedding: (51, 20) in the checkpoint, (50, 20) in the model',
    "If only key and value kernels differ, set NUM_KV_HEADS to the checkpoint's heads,"
    ' or convert it: python -m gqa_t5x.convert --help. If others do, this is a'
    ' checkpoint of another model size.',
  ]


@pytest.mark.parametrize(('ours', 'theirs'), [(None, 9), (9, None), (9, 15)])
def test_heads_of_another_size(ours, theirs):
  """It says what the checkpoint has, so that it can be set."""
  this = model()
  this.module = network.Transformer(oracle.config(K, kv_head_dim=ours))
  tree = oracle.params(oracle.config(K, kv_head_dim=theirs))
  shapes = [(R, 24) if R else other for R, other in ((theirs, 'missing'), (ours, 'un'))]
  said = f'/key_up/kernel: {shapes[0]} in the checkpoint, {shapes[1]}'
  with pytest.raises(ValueError, match=re.escape(said)) as error:
    models.check_params(this, tree)
  assert f' heads and KV_HEAD_DIM to {theirs}, or convert it' in str(error.value)


def test_a_long_list_is_cut():
  wrong = {'token_embedder': params()['token_embedder']}
  missing = len(oracle.flat(params())) - 1
  with pytest.raises(ValueError) as error:
    models.check_params(model(), wrong)
  lines = str(error.value).splitlines()
  assert len(lines) == 1 + 8 + 1 + 1
  assert lines[-2] == f'  ... and {missing - 8} more'


@pytest.mark.parametrize('call', ['predict_batch_with_aux', 'score_batch'])
@pytest.mark.parametrize('num_kv_heads', [1, oracle.N])
def test_decoding_and_scoring_refuse_other_heads(call, num_kv_heads):
  got, expected = (oracle.D, num_kv_heads * oracle.H), (oracle.D, K * oracle.H)
  said = f'{KEY}: {got} in the checkpoint, {expected} in the model'
  with pytest.raises(ValueError, match=re.escape(said)):
    getattr(model(), call)(params(num_kv_heads), oracle.batch())


# The trainer.


def test_trainer_refuses_other_heads():
  with pytest.raises(ValueError, match='The parameters of the checkpoint') as error:
    make_trainer(make_state(1))
  assert f'{KEY}: (20, 6) in the checkpoint, (20, 12) in' in str(error.value)


def test_trainer_refuses_other_moments():
  state = make_state()
  tree = state.state_dict()
  kernel = tree['state']['param_states']['decoder']['layers_1']['self_attention']['key']
  kernel['kernel']['v'] = np.zeros((20, 24), np.float32)
  with pytest.raises(ValueError, match='The optimizer moments of the') as error:
    make_trainer(state.restore_state(tree))
  assert f'{KEY}/v: (20, 24) in the checkpoint, (20, 12) in' in str(error.value)


def test_trainer_counts_steps_to_the_end_of_the_run(monkeypatch):
  """A bar of the whole run that starts where the checkpoint was written."""
  seen = []

  def train(self, batch_iter, num_steps, start_step=None):
    seen.extend(next(batch_iter) for _ in range(num_steps))
    summary = futures.Future()
    summary.set_exception(ValueError(start_step))  # T5X raises it, later.
    return summary

  monkeypatch.setattr(t5x_trainer.Trainer, 'train', train)
  this = make_trainer(make_state(), total_steps=100)
  for batches, num_steps, start_step in ('abcdef', 3, 40), ('xyz', 2, 43):
    summary = this.train(iter(batches), num_steps, start_step=start_step)
    assert summary.exception().args == (start_step,)
  assert seen == ['a', 'b', 'c', 'x', 'y']
  assert (this._bar.initial, this._bar.total) == (40, 100)
  assert this._bar.n == 40 + 3 + 2
  this.close()
  without_bar = make_trainer(make_state())
  without_bar.train(iter('ab'), 1)
  assert without_bar._bar is None
  without_bar.close()


@pytest.mark.parametrize('quantization', ['weights', 'weights_and_cache'])
def test_decoding_and_scoring_in_int8(quantization, monkeypatch):
  """Of a float checkpoint, as of parameters that are int8 already."""
  monkeypatch.setattr(decoding, 'generate', plain_generate)
  int8 = model(quantize=quantization)
  module, rounded = int8.module, quantize.params_to_int8(params())
  tokens, aux = oracle.jit(int8.predict_batch_with_aux)(params(), oracle.batch())
  prompts = np.zeros((oracle.B, oracle.T), np.int32)
  inputs = oracle.batch()['encoder_input_tokens']
  decode = oracle.jit(plain_generate, static_argnames=('module', 'decode_fn'))
  expected = decode(module, rounded, inputs, prompts, sampling.greedy, eos_id=1)
  np.testing.assert_array_equal(tokens, expected[0][:, 0])
  np.testing.assert_allclose(aux['scores'], expected[1][:, 0], rtol=1e-5)
  logits = oracle.forward(module.config)(rounded, oracle.batch())
  targets = oracle.batch()['decoder_target_tokens']
  log_probs = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=2
  )[..., 0]
  batch = oracle.batch() | {'decoder_loss_weights': (targets > 0).astype(int)}
  scores = oracle.jit(int8.score_batch)(params(), batch)
  np.testing.assert_allclose(scores, (log_probs * (targets > 0)).sum(1), rtol=1e-4)
  exact = oracle.jit(model().score_batch)(params(), batch)
  assert np.abs(scores - exact).max() > 1e-3


def test_training_in_int8():
  with pytest.raises(BadInput, match=r"QUANTIZE='weights' is for decoding: .*int8.gin"):
    make_trainer(make_state(), model=model(quantize='weights'))


def test_a_run_refuses_an_int8_checkpoint(tmp_path):
  """By its name: as the model's source, and as what is restored."""
  path = tmp_path / 'checkpoint_3'
  rounded = quantize.params_to_int8(params())
  saved.write(epath.Path(path), rounded, 3, config.ModelConfig(), None)
  message = rf'{path} has \d+ kernels in int8, and here they must be float32'
  with pytest.raises(BadInput, match=message):
    models.config_from_checkpoint(str(path))
  with pytest.raises(BadInput, match=message):
    restore.checked_path(str(path), model())
