"""A toy model for the tests of the stand-in, which compiles in a moment."""

import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning as nn_partitioning
from t5x import adafactor, models, partitioning, utils

from helpers import tiny_task


class Toy(nn.Module):
  """Predicts a target token from the previous one and the mean of the inputs."""

  vocab_size: int = 384
  width: int = 130
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(
    self,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    encoder_positions=None,
    decoder_positions=None,
    *,
    enable_dropout=True,
    decode=False,
  ):
    def kernel(name, shape, axes):
      init = nn.initializers.normal(0.1)
      return nn_partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)

    table = kernel('table', (self.vocab_size, self.width), ('vocab', 'embed'))
    out = kernel('out', (self.width, self.vocab_size), ('embed', 'vocab'))
    scale = kernel('scale', (self.width,), ('embed',))
    inputs = table[encoder_input_tokens.astype(int)].mean(axis=1, keepdims=True)
    x = table[decoder_input_tokens.astype(int)] + inputs * scale
    x = nn.Dropout(self.dropout_rate)(x, deterministic=not enable_dropout)
    return jnp.tanh(x) @ out


def toy_model(**kwargs):
  """A model of the toy for tiny_task, with Adafactor."""
  vocabulary = tiny_task.vocabulary()
  return models.EncoderDecoderModel(
    Toy(**kwargs), vocabulary, vocabulary, adafactor.Adafactor()
  )


def toy_initializer(model, optimizer=True, **partitioner):
  """An initializer of its state."""
  shapes = {'encoder_input_tokens': (8, 16), 'decoder_input_tokens': (8, 16)}
  return utils.TrainStateInitializer(
    model.optimizer_def if optimizer else None,
    model.get_initial_variables,
    shapes,
    partitioning.PjitPartitioner(num_partitions=1, **partitioner),
  )
