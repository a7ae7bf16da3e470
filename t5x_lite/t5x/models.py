"""Wraps a Flax module into what a trainer needs: loss, metrics, scores, variables.

Decoding is the project's own: its model class overrides `predict_batch_with_aux`.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import seqio
from clu import metrics as clu_metrics
from flax import linen as nn
from flax.core import freeze

from t5x import losses, optimizers
from t5x import metrics as metrics_lib

Batch = Mapping[str, jnp.ndarray]


class BaseModel(abc.ABC):
  """What trainer, evaluator and inference call.

  Subclasses define, with T5X's arguments, `loss_fn` (loss and metrics),
  `predict_batch_with_aux` (predictions and a mapping), `score_batch` and
  `get_initial_variables`.
  """

  FEATURE_CONVERTER_CLS: Callable[..., seqio.FeatureConverter]

  def __init__(self, optimizer_def: optimizers.OptimizerDefType):
    self.optimizer_def = optimizer_def

  def eval_fn(self, params, batch: Batch):
    """Returns the loss and metrics without dropout."""
    return self.loss_fn(params=params, batch=batch, dropout_rng=None)

  def predict_batch(self, params, batch: Batch, rng: jax.Array | None = None):
    """Returns predictions alone."""
    return self.predict_batch_with_aux(params=params, batch=batch, rng=rng)[0]


class BaseTransformerModel(BaseModel):
  """A model with vocabularies and a cross-entropy loss; see `EncoderDecoderModel`."""

  def __init__(
    self,
    module: nn.Module,
    input_vocabulary: seqio.Vocabulary,
    output_vocabulary: seqio.Vocabulary,
    optimizer_def: optimizers.OptimizerDefType,
    decode_fn: Callable[..., Any] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: Any = None,
  ):
    self.module, self._decode_fn = module, decode_fn
    self._input_vocabulary = input_vocabulary
    self._output_vocabulary = output_vocabulary
    self._label_smoothing = label_smoothing
    self._z_loss = z_loss
    self._loss_normalizing_factor = loss_normalizing_factor
    super().__init__(optimizer_def=optimizer_def)

  @property
  def input_vocabulary(self) -> seqio.Vocabulary:
    return self._input_vocabulary

  @property
  def output_vocabulary(self) -> seqio.Vocabulary:
    return self._output_vocabulary

  @property
  def decode_fn(self):
    return self._decode_fn

  @abc.abstractmethod
  def _compute_logits(self, params, batch: Batch, dropout_rng=None):
    """Returns logits [B, T, V]."""

  def loss_fn(self, params, batch: Batch, dropout_rng: jax.Array | None):
    """Cross entropy with z-loss and label smoothing; see `BaseModel`."""
    logits = self._compute_logits(params, batch, dropout_rng)
    factor, weights = losses.get_loss_normalizing_factor_and_weights(
      self._loss_normalizing_factor, batch
    )
    targets = batch['decoder_target_tokens']
    loss, z_loss, _ = losses.compute_weighted_cross_entropy(
      logits, targets, weights, self._label_smoothing, self._z_loss, factor
    )
    suffix = '_segment_ids'
    segments = {
      k.removesuffix(suffix): v for k, v in batch.items() if k.endswith(suffix)
    } or {
      k: batch[k] != 0
      for k in ('encoder_input_tokens', 'decoder_target_tokens')
      if k in batch
    }
    return loss, compute_base_metrics(logits, targets, weights, loss, z_loss, segments)


@dataclasses.dataclass(frozen=True)
class DecoderParams:
  """Defaults of decoding: whether all decodes are returned, and how many are made."""

  return_all_decodes: bool = False
  num_decodes: int = 1


class EncoderDecoderModel(BaseTransformerModel):
  """A T5: encoder and decoder, trained on targets given inputs."""

  FEATURE_CONVERTER_CLS = seqio.EncDecFeatureConverter

  def __init__(
    self,
    module: nn.Module,
    input_vocabulary: seqio.Vocabulary,
    output_vocabulary: seqio.Vocabulary,
    optimizer_def: optimizers.OptimizerDefType,
    decode_fn: Callable[..., Any] | None = None,
    feature_converter_cls: Callable[..., seqio.FeatureConverter] | None = None,
    default_decoder_params: DecoderParams | None = None,
    **loss_arguments,
  ):
    """Keeps its arguments.

    Args:
      module: has T5X's `__call__`, `encode` and `decode`.
      input_vocabulary: of the encoder's tokens.
      output_vocabulary: of the decoder's tokens.
      optimizer_def: trains the parameters.
      decode_fn: kept for subclasses that decode.
      feature_converter_cls: overrides `FEATURE_CONVERTER_CLS`.
      default_decoder_params: kept for subclasses that decode.
      **loss_arguments: label_smoothing, z_loss and loss_normalizing_factor of
        `losses.compute_weighted_cross_entropy`.
    """
    if feature_converter_cls is not None:
      self.FEATURE_CONVERTER_CLS = feature_converter_cls
    self._default_decoder_params = default_decoder_params or DecoderParams()
    vocabularies = (input_vocabulary, output_vocabulary)
    super().__init__(module, *vocabularies, optimizer_def, decode_fn, **loss_arguments)

  def get_initial_variables(self, rng, input_shapes, input_types=None):
    """Initialises the module on ones.

    Args:
      rng: a key.
      input_shapes: feature name to shape, [B, T] or [B, S].
      input_types: feature name to dtype (default: float32 tokens, int32 otherwise).

    Returns:
      The variables, frozen.
    """
    types = input_types or {}

    def ones(feature, default):
      if feature not in input_shapes:
        return None
      return jnp.ones(input_shapes[feature], types.get(feature, default))

    decoder_tokens = ones('decoder_input_tokens', jnp.float32)
    optional = [
      f'{side}_{kind}'
      for side in ('encoder', 'decoder')
      for kind in ('positions', 'segment_ids')
    ]
    variables = self.module.init(
      rng,
      ones('encoder_input_tokens', jnp.float32),
      decoder_tokens,
      decoder_tokens,
      decode=False,
      enable_dropout=False,
      **{name: ones(name, jnp.int32) for name in optional},
    )
    return freeze(variables)

  def _compute_logits(
    self, params, batch: Batch, dropout_rng=None, mutable=False, other_variables=None
  ):
    """Runs the module; dropout is on if it gets an rng. Returns logits [B, T, V]."""
    return self.module.apply(
      {'params': params, **(other_variables or {})},
      batch['encoder_input_tokens'],
      batch['decoder_input_tokens'],
      batch['decoder_target_tokens'],
      encoder_segment_ids=batch.get('encoder_segment_ids'),
      decoder_segment_ids=batch.get('decoder_segment_ids'),
      encoder_positions=batch.get('encoder_positions'),
      decoder_positions=batch.get('decoder_positions'),
      decode=False,
      enable_dropout=dropout_rng is not None,
      rngs=None if dropout_rng is None else {'dropout': dropout_rng},
      mutable=mutable,
    )

  def predict_batch_with_aux(
    self,
    params,
    batch: Batch,
    rng: jax.Array | None = None,
    decoder_params=None,
    return_all_decodes: bool | None = None,
    num_decodes: int | None = None,
    prompt_with_targets: bool = False,
  ):
    """Not here: the stand-in holds no decoder."""
    raise NotImplementedError(
      f'{type(self).__name__} cannot decode: the stand-in for T5X holds no decoder. '
      'Use the model class of gqa_t5x.models, or install the real T5X'
    )

  def score_batch(self, params, batch: Batch, return_intermediates: bool = False):
    """Log-likelihood of the targets, summed over their weighted tokens: [B].

    Raises:
      NotImplementedError: if intermediates are asked for.
    """
    if return_intermediates:
      raise NotImplementedError('return_intermediates needs the real T5X')
    logits = self._compute_logits(params, batch)
    one_hot = jax.nn.one_hot(batch['decoder_target_tokens'], logits.shape[-1])
    loss, _ = losses.cross_entropy_with_logits(logits, one_hot, z_loss=0.0)
    return -jnp.sum(loss * batch['decoder_loss_weights'], axis=-1)


def _count_sequences(segment_ids: jnp.ndarray) -> jnp.ndarray:
  """Number of packed sequences in [B, L] segment ids (0 is padding)."""
  previous = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
  return jnp.sum((segment_ids != previous) & (segment_ids != 0))


def compute_base_metrics(
  logits: jnp.ndarray,
  targets: jnp.ndarray,
  mask: jnp.ndarray | None,
  loss: jnp.ndarray,
  z_loss: jnp.ndarray | None = None,
  segment_ids: Mapping[str, jnp.ndarray] | None = None,
) -> metrics_lib.MetricsMap:
  """T5X's metrics of a batch.

  Args:
    logits: [B, T, V].
    targets: [B, T] token ids.
    mask: [B, T] of 0 and 1, or None for all ones.
    loss: summed loss, a scalar.
    z_loss: the part of it that is z-loss.
    segment_ids: feature name to [B, L] segment ids (0 is padding).
  """
  average, rate = clu_metrics.Average, metrics_lib.TimeRate
  sequences, tokens = jnp.array(targets.shape[0]), jnp.array(targets.size)
  real_tokens = targets.size if mask is None else jnp.sum(mask)
  devices = jax.device_count()
  metrics = {
    'accuracy': clu_metrics.Accuracy.from_model_output(
      logits=logits, labels=targets.astype(jnp.int32), mask=mask
    ),
    'loss': metrics_lib.AveragePerStep(total=loss),
    'loss_per_nonpadding_target_token': average(total=loss, count=real_tokens),
    'loss_per_all_target_tokens': average(total=loss, count=tokens),
    'timing/seqs_per_second': rate(numerator=sequences),
    'timing/steps_per_second': metrics_lib.StepsPerTime(),
    'timing/seconds': metrics_lib.Time(),
    'timing/seqs': metrics_lib.Sum(sequences),
    'timing/seqs_per_second_per_core': rate(numerator=sequences / devices),
    'timing/target_tokens_per_second': rate(numerator=tokens),
    'timing/target_tokens_per_second_per_core': rate(numerator=tokens / devices),
    'non_padding_fraction/loss_weights': average(total=real_tokens, count=tokens),
  }
  if z_loss is not None:
    for name, value in (('z_loss', z_loss), ('cross_ent_loss', loss - z_loss)):
      metrics[name] = metrics_lib.AveragePerStep(total=value)
      metrics[f'{name}_per_all_target_tokens'] = average(total=value, count=tokens)
  if segment_ids is not None:
    real, total = jnp.array(0), jnp.array(0)
    for name, ids in segment_ids.items():
      metrics[f'effective_batch_size/{name}'] = metrics_lib.AveragePerStep(
        total=_count_sequences(ids)
      )
      size, non_padding = jnp.array(ids.size), jnp.sum(ids != 0)
      metrics[f'non_padding_fraction/{name}'] = average(total=non_padding, count=size)
      real, total = real + non_padding, total + size
    metrics['non_padding_fraction/overall'] = average(total=real, count=total)
  return metrics
