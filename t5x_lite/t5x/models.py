"""Wraps a Flax module into what a trainer needs: loss, metrics, scores, variables.

Decoding is the project's own: its model class overrides `predict_batch_with_aux`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import seqio
from clu import metrics as clu_metrics
from flax import linen as nn
from flax.core import freeze

from t5x import adafactor, losses
from t5x import metrics as metrics_lib

Batch = Mapping[str, jnp.ndarray]


@dataclasses.dataclass(frozen=True)
class DecoderParams:
  """Defaults of decoding: whether all decodes are returned, and how many are made."""

  return_all_decodes: bool = False
  num_decodes: int = 1


class EncoderDecoderModel:
  """A T5: encoder and decoder, trained on targets given inputs. Arguments are T5X's.

  `decode_fn` and `default_decoder_params` are kept for subclasses that decode.
  """

  FEATURE_CONVERTER_CLS = seqio.EncDecFeatureConverter

  def __init__(
    self,
    module: nn.Module,
    input_vocabulary: seqio.Vocabulary,
    output_vocabulary: seqio.Vocabulary,
    optimizer_def: adafactor.Adafactor,
    decode_fn: Callable[..., Any] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: Any = None,
    default_decoder_params: DecoderParams | None = None,
  ):
    self.module, self.optimizer_def, self.decode_fn = module, optimizer_def, decode_fn
    self.input_vocabulary = input_vocabulary
    self.output_vocabulary = output_vocabulary
    self._label_smoothing, self._z_loss = label_smoothing, z_loss
    self._loss_normalizing_factor = loss_normalizing_factor
    self._default_decoder_params = default_decoder_params or DecoderParams()

  def get_initial_variables(self, rng, input_shapes, input_types=None):
    """Initialises the module on ones; returns the variables, frozen.

    `input_shapes` and `input_types` are by feature name; types are by default float32
    for tokens, int32 otherwise.
    """

    def ones(feature):
      if feature not in input_shapes:
        return None
      default = jnp.float32 if feature.endswith('tokens') else jnp.int32
      return jnp.ones(input_shapes[feature], (input_types or {}).get(feature, default))

    kinds = ('segment_ids', 'positions')
    optional = [f'{side}_{kind}' for side in ('encoder', 'decoder') for kind in kinds]
    decoder_tokens = ones('decoder_input_tokens')
    tokens = (ones('encoder_input_tokens'), decoder_tokens, decoder_tokens)
    features = {name: ones(name) for name in optional}
    off = {'decode': False, 'enable_dropout': False}
    return freeze(self.module.init(rng, *tokens, **off, **features))

  def _compute_logits(self, params, batch: Batch, dropout_rng=None) -> jnp.ndarray:
    """Runs the module; dropout is on if it gets an rng. Returns logits [B, T, V]."""
    return self.module.apply(
      {'params': params},
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
    )

  def loss_fn(self, params, batch: Batch, dropout_rng: jax.Array | None):
    """Returns the loss, a scalar, and the metrics of a batch."""
    logits = self._compute_logits(params, batch, dropout_rng)
    factor, weights = losses.get_loss_normalizing_factor_and_weights(
      self._loss_normalizing_factor, batch
    )
    targets = batch['decoder_target_tokens']
    loss, z_loss, _ = losses.compute_weighted_cross_entropy(
      logits, targets, weights, self._label_smoothing, self._z_loss, factor
    )
    names = ('encoder_input_tokens', 'decoder_target_tokens')
    segments = {
      name.removesuffix('_segment_ids'): ids
      for name, ids in batch.items()
      if name.endswith('_segment_ids')
    } or {name: batch[name] != 0 for name in names}
    return loss, compute_base_metrics(logits, targets, weights, loss, z_loss, segments)

  def eval_fn(self, params, batch: Batch):
    """Returns the loss and metrics without dropout."""
    return self.loss_fn(params, batch, dropout_rng=None)

  def predict_batch(self, params, batch: Batch, rng: jax.Array | None = None):
    """Returns predictions alone."""
    return self.predict_batch_with_aux(params=params, batch=batch, rng=rng)[0]

  def predict_batch_with_aux(self, params, batch: Batch, *args, **kwargs):
    """Not here: the stand-in holds no decoder."""
    raise NotImplementedError(
      f'{type(self).__name__} cannot decode: the stand-in for T5X holds no decoder. '
      'Use the model class of gqa_t5x.models, or install the real T5X'
    )

  def score_batch(self, params, batch: Batch, return_intermediates: bool = False):
    """Log-likelihood of the targets, summed over their weighted tokens: [B]."""
    if return_intermediates:
      raise NotImplementedError('return_intermediates needs the real T5X')
    logits = self._compute_logits(params, batch)
    one_hot = jax.nn.one_hot(batch['decoder_target_tokens'], logits.shape[-1])
    loss, _ = losses.cross_entropy_with_logits(logits, one_hot, z_loss=0.0)
    return -jnp.sum(loss * batch['decoder_loss_weights'], axis=-1)


BaseTransformerModel = EncoderDecoderModel  # T5X has others, too.


def compute_base_metrics(
  logits: jnp.ndarray,
  targets: jnp.ndarray,
  mask: jnp.ndarray | None,
  loss: jnp.ndarray,
  z_loss: jnp.ndarray,
  segment_ids: Mapping[str, jnp.ndarray],
) -> metrics_lib.MetricsMap:
  """T5X's metrics of a batch.

  Logits are [B, T, V], targets and mask (0 or 1; None: all ones) [B, T], segment ids by
  feature [B, L] (0 is padding); the loss is a sum, and `z_loss` a part of it.
  """
  average, rate = clu_metrics.Average, metrics_lib.TimeRate
  sequences, tokens = jnp.array(targets.shape[0]), jnp.array(targets.size)
  real_tokens = targets.size if mask is None else jnp.sum(mask)
  devices = jax.device_count()
  metrics = {
    'accuracy': clu_metrics.Accuracy.from_model_output(
      logits=logits, labels=targets.astype(jnp.int32), mask=mask
    ),
    'loss': metrics_lib.AveragePerStep(loss),
    'loss_per_nonpadding_target_token': average(total=loss, count=real_tokens),
    'loss_per_all_target_tokens': average(total=loss, count=tokens),
    'timing/seqs_per_second': rate(sequences),
    'timing/steps_per_second': metrics_lib.StepsPerTime(),
    'timing/seconds': metrics_lib.Time(),
    'timing/seqs': metrics_lib.Sum(sequences),
    'timing/seqs_per_second_per_core': rate(sequences / devices),
    'timing/target_tokens_per_second': rate(tokens),
    'timing/target_tokens_per_second_per_core': rate(tokens / devices),
    'non_padding_fraction/loss_weights': average(total=real_tokens, count=tokens),
  }
  for name, value in (('z_loss', z_loss), ('cross_ent_loss', loss - z_loss)):
    metrics[name] = metrics_lib.AveragePerStep(value)
    metrics[f'{name}_per_all_target_tokens'] = average(total=value, count=tokens)
  overall = average(total=jnp.array(0), count=jnp.array(0))
  for name, ids in segment_ids.items():
    part = average(total=jnp.sum(ids != 0), count=jnp.array(ids.size))
    metrics[f'non_padding_fraction/{name}'] = part
    previous = jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1]
    sequences = jnp.sum((ids != previous) & (ids != 0))
    metrics[f'effective_batch_size/{name}'] = metrics_lib.AveragePerStep(sequences)
    overall = overall.merge(part)
  metrics['non_padding_fraction/overall'] = overall
  return metrics
