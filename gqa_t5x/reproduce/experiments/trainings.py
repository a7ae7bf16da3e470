"""How the small models of the study against training are pre-trained: a table."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import optax

SIZE = 'tiny'
BATCH_SIZE = 8  # packed rows
VALIDATION_BATCHES = 80
CALIBRATION_BATCHES = 80  # of the training split
UPTRAINED = (0.01, 0.02, 0.05)  # of the pre-training steps


def adafactor_rate(step: jax.Array) -> jax.Array:
  """T5's, relative to the parameters: 1 / sqrt(step) after 500 steps."""
  return (step + 1.0).clip(500) ** -0.5


def adam_rate(step: jax.Array) -> jax.Array:
  """Rises to .003 in 200 steps, and falls as 1 / sqrt(step) from 500 on."""
  return 0.003 * ((step + 1.0) / 200).clip(max=1) * (step / 500.0).clip(1) ** -0.5


def adafactor() -> optax.GradientTransformation:
  """T5's optimizer."""
  return optax.adafactor(adafactor_rate)


def adam() -> optax.GradientTransformation:
  """Adam with gradients clipped at norm 1."""
  adam = optax.adam(adam_rate, b2=0.98)
  return optax.chain(optax.clip_by_global_norm(1.0), adam)


@dataclasses.dataclass(frozen=True)
class Training:
  """A pre-training.

  Attributes:
    title: what a reader calls it.
    task: seqio task, with `lengths` of its features.
    optimizer: makes it.
    steps: those after which the model is converted; the last ends the training.
  """

  title: str
  task: str
  lengths: Mapping[str, int]
  optimizer: Callable[[], optax.GradientTransformation]
  steps: tuple[int, ...]


_SPANS = 'pydocs_span_corruption', {'inputs': 128, 'targets': 29}
# Each target token is a token of the input, and no other text tells which: the decoder
# cannot do without cross-attention.
_REVERSAL = 'pydocs_reversal', {'inputs': 64, 'targets': 64}
TRAININGS = {
  'adam': Training('Adam', *_SPANS, adam, (4000,)),
  'adafactor': Training('Adafactor', *_SPANS, adafactor, (1000, 4000, 16000)),
  'reversal': Training('Adam, reversal', *_REVERSAL, adam, (4000,)),
}
