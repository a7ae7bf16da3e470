"""Trainers of the tiny model, without an engine around them."""

import functools

import jax
import seqio
from flax import core
from t5x import adafactor, train_state

from gqa_t5x.model import network
from gqa_t5x.training import models, trainer
from helpers import model_oracle as oracle

K = 2


def model(num_kv_heads=K, eos_id=1, quantize=None, **kwargs):
  vocabulary = seqio.PassThroughVocabulary(size=oracle.V, eos_id=eos_id)
  return models.EncoderDecoderModel(
    network.Transformer(oracle.config(num_kv_heads, quantize=quantize)),
    vocabulary,
    vocabulary,
    adafactor.Adafactor(decay_rate=0.8, step_offset=0),
    **kwargs,
  )


def params(num_kv_heads=K):
  return oracle.params(oracle.config(num_kv_heads))


@functools.cache
def make_state(num_kv_heads=K):
  shapes = oracle.initial_shapes(oracle.config(num_kv_heads))
  variables = {'params': params(num_kv_heads), 'params_axes': shapes['params_axes']}
  optimizer_def = adafactor.Adafactor(decay_rate=0.8, step_offset=0)
  return train_state.FlaxOptimTrainState.create(optimizer_def, core.freeze(variables))


def make_trainer(state, **kwargs):
  arguments = dict(
    model=model(),
    train_state=state,
    partitioner=None,
    eval_names=[],
    summary_dir=None,
    train_state_axes=None,
    rng=jax.random.PRNGKey(0),
    learning_rate_fn=lambda step: 0.01,
    num_microbatches=None,
  )
  return trainer.Trainer(**(arguments | kwargs))
